"""The command `launch/plan.py`, and `launch/pretrain.py --rehearse`: options, what is planned, and exit codes."""

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mega_scale.checkpoint.goodput import GPUS
from mega_scale.checkpoint.goodput import report as goodput_report
from mega_scale.checkpoint.goodput import table as goodput_table
from mega_scale.config import RunConfig, parse
from mega_scale.files import replace_text
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.parallel.devices import Device
from mega_scale.parallel.mesh import divisors
from mega_scale.planner.report import collective_lines, layout_lines, memory_lines, save_lines, step_lines
from mega_scale.planner.search import Candidate, search
from mega_scale.planner.times import Memory, memory_limit, memory_of, step_time
from mega_scale.planner.trace import Cluster, Trace, depths, parameter_count, prepare, rehearse
from mega_scale.process import refuse
from mega_scale.settings import require

DOES_NOT_FIT = 3
GIB = 2**30
_DESCRIPTION = """Plan a run before it is submitted: follow one of its ranks through two steps on tensors without
memory, and print what it holds, sends and takes. Exit code 2: the run would be refused or fail, with its line;
3: it does not fit. All other words are those of launch/pretrain.py: --config FILE, KEY=VALUE."""


def main(arguments: Sequence[str], *, description: str = _DESCRIPTION) -> None:
    """Run the command. Raises ValueError or OSError for what is refused, SystemExit 3 for what does not fit."""
    options = _parser(description)
    args, words = options.parse_known_args(arguments)
    warnings.simplefilter("ignore")  # of PyTorch, about tensors without memory
    config = parse(words)
    device = Device.named(args.gpu, _overrides(args.set), args.devices)
    compiled = device.kind == "cuda" if config.train.compile is None else config.train.compile
    cluster = Cluster(args.nodes, args.gpus_per_node, device, compiled)
    for name in ("nodes", "gpus_per_node", "top"):
        value = getattr(args, name)
        require(value >= 1, f"--{name.replace('_', '-')}", value, "give at least 1")
    if code := (_search if args.search else _rehearse)(args, config, cluster):
        raise SystemExit(code)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/plan.py", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts of the run (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="ranks on each host (default: 8)")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(Device.known())}, or one of --devices (default: h100)",
    )
    parser.add_argument(
        "--devices", type=Path, metavar="FILE", help="devices of yours, as mega_scale/parallel/devices.yaml has them"
    )
    parser.add_argument(
        "--rank", type=int, action="append", metavar="R", help="follow this rank too, beside the first and the last"
    )
    parser.add_argument("--full", action="store_true", help="follow all blocks, not two small numbers of them")
    parser.add_argument("--search", action="store_true", help="look for the fastest layout")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts that --search traces (default: 5)")
    parser.add_argument("--failures", action="store_true", help="also print goodput, and how often to save")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="another figure of the device or links")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and time there (png, pdf, svg)")
    return parser


def _overrides(words: Sequence[str] | None) -> dict[str, float]:
    found = {}
    for word in words or ():
        name, _, text = word.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            raise ValueError(
                f"--set {word} is not possible: write NAME=VALUE with a number, as kernel=2.0e-6"
            ) from None
    return found


def _rehearse(args: argparse.Namespace, config: RunConfig, cluster: Cluster) -> int:
    planned, model = prepare(config, cluster)
    last = cluster.size - 1
    ranks = sorted({0, last, *(args.rank or ())})
    for rank in ranks:
        require(0 <= rank <= last, "--rank", rank, f"choose one of the {cluster.size} ranks, 0 to {last}")
    counts = None if args.full else depths(model, planned)
    micro_batches = planned.engine_config(cluster.size).accumulation
    print(_header(cluster, planned, model, counts, micro_batches), flush=True)
    found: dict[str, Any] = {}
    fits = True
    for rank in ranks:
        trace = _traced(planned, model, cluster, rank, args.full)
        memory = memory_of(trace, planned, cluster)
        lines, facts = _describe(trace, memory, planned, model, cluster, brief=rank != ranks[0])
        print("\n".join([f"\nrank {rank}", *lines]), flush=True)
        found[str(rank)] = facts
        fits &= memory.fits
        if args.plot and rank == ranks[0]:
            from mega_scale.planner.pictures import draw

            draw(args.plot, trace, memory, facts["time"])
    print(_larger(planned, model, cluster, memory, trace, args.full))
    if args.failures:
        step_s = step_time(trace, planned, model, cluster).seconds
        rows = goodput_table(parameter_count(model), step_s, sorted({cluster.size, *GPUS}))
        print("goodput, as GPUs fail\n" + goodput_report(rows, step_s))
    _write(args.json, {"figures": cluster.device.figures(), "ranks": found, "fits": fits})
    if not fits:
        print(
            f"error: the run does not fit into {memory_limit(cluster) / GIB:.1f} GiB of {cluster.device.name}: lower "
            "train.micro_batch_size, set parallel.activation_checkpoint=1, raise parallel.sp or parallel.tp, or take "
            "more hosts; --search looks for layouts that fit",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return 0 if fits else DOES_NOT_FIT


def _traced(planned: RunConfig, model: BaseConfig, cluster: Cluster, rank: int, full: bool) -> Trace:
    """The trace of a rank; a failure of the run ends the command in one line, with the place in our code."""
    try:
        return rehearse(planned, model, cluster, rank, full=full)
    except ValueError:
        raise
    except Exception as error:
        root = str(Path(__file__).parents[1])
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(root)]
        frames = [frame for frame in frames if f"{os.sep}planner{os.sep}" not in frame.filename]
        place = f", at {os.path.relpath(frames[-1].filename, root)}:{frames[-1].lineno}" if frames else ""
        refuse(f"rank {rank} fails: {type(error).__name__}: {error}{place}")


def _header(
    cluster: Cluster,
    config: RunConfig,
    model: BaseConfig,
    counts: tuple[int, int] | None,
    micro_batches: int,
) -> str:
    mesh = config.parallel.mesh(cluster.size)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh._asdict().items())
    parallel, train = config.parallel, config.train
    lines = [
        f"{cluster.size:,} ranks: {cluster.nodes} hosts of {cluster.per_node} {cluster.device.name}; {axes}; "
        f"{parallel.engine}, zero_stage {parallel.zero_stage}, {train.dtype}",
        f"{model.num_hidden_layers} blocks, " + ("all followed" if counts is None else "from {} and {}".format(*counts))
        + f"; {micro_batches} micro-batches of {train.micro_batch_size} x {config.data.sequence_length:,} tokens",
    ]  # fmt: skip
    if config.parallel.engine == "deepspeed" and train.dtype == "bf16" and cluster.device.kind == "cuda":
        lines.append("bf16 under deepspeed follows the list of operators of a CPU's autocast: approximate")
    if config.data.packing == "reset" and cluster.device.kind == "cpu":
        lines.append("data.packing=reset: documents begin in every chunk, which is the most memory that they take")
    return "\n".join([*lines, _figures(cluster.device)])


def _figures(device: Device) -> str:
    shown = {name: value for name, value in device.figures().items() if name != "name"}
    return "figures: " + ", ".join(
        f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in shown.items()
    )


def _describe(
    trace: Trace,
    memory: Memory,
    config: RunConfig,
    model: BaseConfig,
    cluster: Cluster,
    brief: bool,
) -> tuple[list[str], dict[str, Any]]:
    micro_batches = config.engine_config(cluster.size).accumulation
    time = step_time(trace, config, model, cluster)
    facts: dict[str, Any] = {
        "trace": asdict(trace), "memory": memory._asdict() | {"total": memory.total}, "time": time._asdict()
    }  # fmt: skip
    lines = memory_lines(trace, memory)
    if not brief:
        lines += collective_lines(trace, micro_batches)
        tokens = config.train.global_batch_size * config.data.sequence_length
        lines += step_lines(time, micro_batches, tokens, config.train.steps, cluster.size)
        lines += save_lines(trace)
    return lines, facts


def _larger(config: RunConfig, model: BaseConfig, cluster: Cluster, memory: Memory, trace: Trace, full: bool) -> str:
    """The largest micro-batch that fits, or else the next larger one, as the first rank's trace has it.

    Which to trace is found as if what grows with rows did so in proportion.
    """
    dp = config.parallel.mesh(cluster.size).dp
    micro = config.train.micro_batch_size
    larger = [rows for rows in divisors(config.train.global_batch_size // dp) if rows > micro]
    if not larger:
        return f"train.micro_batch_size={micro} is the largest for this global batch on {dp} data-parallel ranks"
    fixed = sum(trace.held.get(kind, 0.0) for kind in ("weights", "gradients", "moments", "engine", "gathered"))
    scale = 1 + (memory.slack / memory.peak if memory.peak else 0.0)
    need = {rows: (fixed + (memory.peak - fixed) * rows / micro) * scale + memory.outside for rows in larger}
    for rows in [rows for rows in reversed(larger) if need[rows] <= memory.limit] or larger[:1]:
        other = replace(config, train=replace(config.train, micro_batch_size=rows))
        found = memory_of(_traced(other, model, cluster, 0, full), other, cluster)
        if found.fits:
            break
    word = "would fit" if found.fits else "would not fit"
    return f"train.micro_batch_size={rows} {word}: {found.total / GIB:.1f} of {found.limit / GIB:.1f} GiB"


def _search(args: argparse.Namespace, config: RunConfig, cluster: Cluster) -> int:
    planned, model = prepare_any(config, cluster)
    print(f"{cluster.size:,} ranks: {cluster.nodes} hosts of {cluster.per_node} {cluster.device.name}")
    print(_figures(cluster.device), flush=True)
    best = search(planned, model, cluster, args.top, log=lambda line: print(line, flush=True))
    rows = [_row(one, cluster) for one in best]
    print("\n".join(layout_lines(rows)))
    first = best[0]
    fits = first.memory is not None and first.memory.fits
    if fits:
        print("\nto paste: " + " ".join(first.keys))
    else:
        print(f"error: no layout fits into {memory_limit(cluster) / GIB:.1f} GiB: take more hosts", file=sys.stderr)
    _write(args.json, {"figures": cluster.device.figures(), "layouts": rows, "keys": first.keys, "fits": fits})
    return 0 if fits else DOES_NOT_FIT


def prepare_any(config: RunConfig, cluster: Cluster) -> tuple[RunConfig, BaseConfig]:
    """As `prepare`, of a run whose own layout need not be one of the cluster's."""
    from mega_scale.planner.search import without_layout

    return prepare(without_layout(config, cluster), cluster)


def _row(one: Candidate, cluster: Cluster) -> dict[str, Any]:
    memory, time, config = one.memory, one.time, one.config
    assert memory is not None and time is not None
    mesh, parallel, train = config.parallel.mesh(cluster.size), config.parallel, config.train
    days = train.steps * time.seconds / 86_400
    every, policy = parallel.activation_checkpoint, parallel.activation_checkpoint_policy
    segment = parallel.activation_checkpoint_segment
    recomputed = "-" if not every else f"every {every} {policy}" + (f" in {segment}" if segment else "")
    axes = " x ".join(map(str, mesh))
    return {
        "layout": f"{axes}, rows {train.micro_batch_size}, {recomputed}",
        "GiB": f"{memory.total / GIB:.1f}", "left": f"{(memory.limit - memory.total) / GIB:.1f}",
        "kernels ms": f"{1e3 * time.kernels:,.0f}", "exposed": f"{1e3 * time.exposed:,.0f}",
        "sharding": f"{1e3 * time.network:,.0f}", "host": f"{1e3 * time.host:,.0f}",
        "step ms": f"{1e3 * time.seconds:,.0f}", "bound by": time.bound, "MFU": f"{time.mfu:.1%}",
        "tokens/s": f"{train.global_batch_size * config.data.sequence_length / time.seconds:,.0f}",
        "days": f"{days:,.1f}", "device hours": f"{24 * days * cluster.size:,.0f}",
    }  # fmt: skip


def _write(path: Path | None, facts: dict[str, Any]) -> None:
    if path is not None:
        replace_text(path, json.dumps(facts, indent=1) + "\n")
