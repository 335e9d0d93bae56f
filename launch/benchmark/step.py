"""The `step` command: tokens per second of a whole training step, by length, against models of transformers.

Every contender has a process of its own. They take turns, with a matrix product of the model's own sizes between them,
by each library that PyTorch has for it, so that each figure stands beside the machine's ceilings of that moment.
transformers' Mega gets our initial weights, and has to give our loss and gradient norm before anything is timed; so has
ours when compiled.
"""

import argparse
import contextlib
import importlib.util
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mega_scale.model.flops import training_flops_per_token
from mega_scale.parallel.mesh import check_segments

from .harness import (
    GIVES_BACK,
    KEEPS_MEMORY,
    Command,
    Option,
    Worker,
    compare,
    hardware,
    in_turns,
    product_rates,
    report,
    table,
)
from .ours import model_config

TOLERANCE = 1e-3
PEERS = {"llama": "transformers Llama, sdpa", "mamba2": "transformers Mamba2, plain PyTorch"}
MALLOC = {
    "kept": "Processes keep freed memory and have huge pages.",
    "default": "Processes have memory as the system gives it.",
}
_PRODUCT_TOKENS = 2048
_PICTURES = (".png", ".svg")
OPTIONS = {
    "lengths": Option([2048, 8192], "tokens of the sequence"),
    "hidden": Option(512, "hidden size"),
    "layers": Option(4, "blocks"),
    "shared": Option(128, "width of queries and keys"),
    "expanded": Option(1024, "width of values and of the feed-forward network"),
    "averages": Option(16, "moving averages a channel"),
    "chunk": Option(512, "tokens of a chunk"),
    "vocabulary": Option(2048, "words"),
    "llama-expanded": Option(1408, "width of Llama's feed-forward network"),
    "mamba-layers": Option(8, "layers of Mamba2"),
    "mamba-states": Option(128, "states a head of Mamba2"),
    "mamba-chunk": Option(128, "tokens of a chunk of Mamba2"),
    "peer-longest": Option(8192, "longest sequence that peers are given"),
    "bf16": Option(False, "also time ours with bf16 matrix products (autocast)"),
    "compile": Option(False, "also time ours with train.compile"),
    "peers": Option(["llama"], "models of about our size to compare with; none leaves them out", list(PEERS)),
    "peer-python": Option(None, "interpreter with transformers 4.37.2, to compare with"),
    "malloc": Option(
        "kept", "kept: processes keep freed memory, in huge pages; default: the system's way", list(MALLOC)
    ),
    "segment": Option(0, "parallel.activation_checkpoint_segment of ours, tokens; 0 keeps all activations", least=0),
    "plot": Option(None, "PNG or SVG file for a picture of the time per token against the length (extra `plot`)"),
}


def run(args: argparse.Namespace) -> None:
    """Check, time and print. Raises ValueError where Mega computes something else, or a contender fails."""
    if args.plot:
        check_plot(args.plot)
    sizes = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    config = model_config(sizes)
    check_segments(config, args.segment, 1, 1)
    ours = ["ours", *(["ours bf16"] if args.bf16 else []), *(["ours compiled"] if args.compile else [])]
    peers = [*(["mega"] if args.peer_python else []), *args.peers]
    flops = training_flops_per_token(config, max(args.lengths))
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        with tempfile.TemporaryDirectory() as folder:
            rows += _rows(args, length, [*ours, *(peers if length <= args.peer_longest else [])], sizes, Path(folder))
    for row in rows:
        if row["kind"] == "mega" or row["kind"] in ours:
            row["shares"] = {name: row["tokens_per_s"] * flops / found for name, found in row["ceilings"].items()}
    exponents = _exponents(rows)
    text = [
        f"Training step (forward, loss, backward, AdamW) of one sequence, fp32 unless said, {args.threads} CPU "
        f"thread(s), {args.repeats} repeats after {args.warmup} for warm-up, in turns; {flops / 1e6:.1f} MFLOP a token "
        "by the FLOP model. Of torch.mm, of oneDNN: share of what matrix products of the model's sizes in fp32 reach "
        f"by them in the same turns. {MALLOC[args.malloc]}"
        f"{f' Ours is recomputed {args.segment:,} tokens at a time.' if args.segment else ''}",
        _table(rows),
    ]
    if exponents:
        found = ", ".join(f"{name} {power:.2f}" for name, power in exponents.items())
        text.append(f"Time grows as length to the power of (least squares): {found}.")
    if args.plot:
        title = f"Training step of one sequence, {args.threads} CPU thread(s)\n{hardware()}"
        plot_costs(args.plot, _costs(rows), title)
    report(args, text, {"flops_per_token": flops, "rows": rows, "exponents": exponents})


def _rows(
    args: argparse.Namespace, length: int, kinds: Sequence[str], sizes: dict[str, Any], folder: Path
) -> list[dict[str, Any]]:
    """Figures of all contenders at one length."""

    def start(kind: str, environment: Mapping[str, str]) -> Worker:
        target = "ours:OurTraining" if kind.startswith("ours") else "peers:PeerTraining"
        arguments = {"kind": kind, "sizes": sizes, "length": length, "weights": str(folder / "weights.safetensors")}
        python, name = (args.peer_python, f"--peer-python {args.peer_python}") if kind == "mega" else (None, kind)
        python = python or sys.executable
        return Worker(target, arguments, name=name, threads=args.threads, python=python, environment=environment)

    first: dict[str, dict[str, float]] = {}
    for kind in kinds:
        with start(kind, GIVES_BACK) as worker:
            first[kind] = worker.call("check", length)
    for kind in {"mega", "ours compiled"} & set(kinds):
        compare(kind, first[kind], {name: first["ours"][name] for name in ("loss", "norm")}, TOLERANCE)
    environment = KEEPS_MEMORY if args.malloc == "kept" else {}
    with contextlib.ExitStack() as stack:
        workers = {kind: stack.enter_context(start(kind, environment)) for kind in kinds}
        known = {kind: worker.call("describe") for kind, worker in workers.items()}
        ceilings: list[dict[str, float]] = []

        def timed(worker: Worker) -> float:
            ceilings.append(product_rates(_PRODUCT_TOKENS, args.hidden, 2 * args.expanded))
            return float(worker.call("time", length))

        contenders = {kind: lambda worker=worker: timed(worker) for kind, worker in workers.items()}
        times = in_turns(contenders, args.repeats, args.warmup)
    ceilings = ceilings[args.warmup * len(kinds) :]
    ours = statistics.median(times["ours"])
    return [
        {
            "length": length, "kind": kind, "tokens_per_s": 1e3 * length / statistics.median(found),
            "least": 1e3 * length / max(found), "greatest": 1e3 * length / min(found),
            "ceilings": {name: statistics.median(each[name] for each in ceilings) for name in ceilings[0]},
            "shares": {}, "megabytes": first[kind]["megabytes"], "ours_times": statistics.median(found) / ours,
            **known[kind],
        }
        for kind, found in times.items()
    ]  # fmt: skip


def _name(row: dict[str, Any]) -> str:
    """What a contender is called in tables and pictures."""
    if row["kind"] == "mega":
        return f"transformers {row['transformers']} Mega"
    return PEERS.get(row["kind"], row["kind"])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["tokens", "", "tokens/s", "least", "greatest", "of torch.mm", "of oneDNN", "peak MB", "times ours"]
    lines = []
    for row in rows:
        shares = [f"{row['shares'][name]:.2f}" if name in row["shares"] else "" for name in ("torch.mm", "oneDNN")]
        speeds = [f"{row[name]:,.0f}" for name in ("tokens_per_s", "least", "greatest")]
        name = f"{_name(row)} ({row['parameters'] / 1e6:.1f}M)"
        lines.append(
            [f"{row['length']:,}", name, *speeds, *shares, f"{row['megabytes']:,.0f}", f"{row['ours_times']:.2f}"]
        )
    return table(head, lines)


def _costs(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Median, least and greatest microseconds a token, by contender and length."""
    costs: dict[str, dict[int, tuple[float, float, float]]] = {}
    for row in rows:
        median, least, greatest = (1e6 / row[name] for name in ("tokens_per_s", "greatest", "least"))
        costs.setdefault(_name(row), {})[row["length"]] = (median, least, greatest)
    return costs


def _exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The power of the length that a step's time grows as, for contenders that were given several."""
    times = {name: {length: length * cost[0] for length, cost in each.items()} for name, each in _costs(rows).items()}
    return {name: exponent(found) for name, found in times.items() if len(found) > 1}


def exponent(times: Mapping[int, float]) -> float:
    """The power of the length that times by length grow as: slope of log time over log length, by least squares."""
    x, y = [math.log(length) for length in times], [math.log(time) for time in times.values()]
    x_mean, y_mean = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return slope / sum((a - x_mean) ** 2 for a in x)


def check_plot(file: str) -> None:
    """Refuse a picture that could not be drawn, before anything is timed for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--plot {file} needs matplotlib, which is not installed: install mega_scale[plot]")
    if Path(file).suffix not in _PICTURES:
        raise ValueError(f"--plot {file}: choose a name that ends in {' or '.join(_PICTURES)}")
    if not Path(file).absolute().parent.is_dir():
        raise ValueError(f"--plot {file}: there is no such folder")


def plot_costs(file: str, costs: Mapping[str, Mapping[int, Sequence[float]]], title: str) -> None:
    """Draw the time per token against the length, one line a contender, with bars from its least to its greatest.

    Args:
        file: a name that `check_plot` allows.
        costs: by contender and length: median, least and greatest microseconds a token.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, found in costs.items():
        lengths = sorted(found)
        medians = [found[length][0] for length in lengths]
        below = [found[length][0] - found[length][1] for length in lengths]
        above = [found[length][2] - found[length][0] for length in lengths]
        axes.errorbar(lengths, medians, yerr=(below, above), marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    every = sorted({length for found in costs.values() for length in found})
    axes.set_xticks(every, labels=[f"{length:,}" for length in every])
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel("microseconds a token")
    axes.set_title(title, fontsize="medium")
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=150)


COMMANDS = {"step": Command(OPTIONS, run, repeats=3, warmup=1)}
