"""The `step` sub-command of benchmark.py: tokens per second of a whole training step, by length, against peers.

Every contender has a process of its own; they take turns, with a matrix product of the model's own sizes between them,
by each library that PyTorch has for it, so that each figure stands beside the machine's ceilings of that moment.
transformers' Mega gets our initial weights, and has to give our loss and gradient norm before anything is timed; so has
ours when compiled.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.machine import hardware
from launch.plots import check_plot, exponent, plot_costs
from launch.worker_process import WorkerProcess
from mega_scale import MegaConfig
from mega_scale.model.flops import training_flops_per_token
from mega_scale.parallel.mesh import check_segments

# A process that is timed does not give memory back to the system, which would clear its pages anew in every step, at a
# cost that differs from step to step; and it gets huge pages where the system has them, for matrix products of tensors
# that are not in a cache are 5 to 10 percent slower without. Peaks of memory are those of processes that give back what
# they free: of what is in use, and not of what a heap is left with.
_KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
_WORKER = Path(__file__).with_name("benchmark_step_worker.py")
_TOLERANCE = 1e-3
_CEILING_TOKENS, _CEILING_RUNS = 2048, 8
PEERS = {"llama": "transformers Llama, sdpa", "mamba2": "transformers Mamba2, plain PyTorch"}
_MALLOC = {
    "kept": "Processes keep freed memory and have huge pages.",
    "default": "Peers have memory as the system gives it, ours as launch/pretrain.py asks for it.",
}
_HEAD = ["tokens", "", "tokens/s", "least", "greatest", "of torch.mm", "of oneDNN", "peak MB", "times ours"]


def add_step_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Options of the sub-command."""
    command.add_argument("--lengths", type=positive, nargs="+", default=[2048, 8192], help="tokens of the sequence")
    for name, size, words in (
        ("hidden", 512, "hidden size"),
        ("layers", 4, "blocks"),
        ("shared", 128, "width of queries and keys"),
        ("expanded", 1024, "width of values and of the feed-forward network"),
        ("averages", 16, "moving averages a channel"),
        ("chunk", 512, "tokens of a chunk"),
        ("vocabulary", 2048, "words"),
        ("llama-expanded", 1408, "width of Llama's feed-forward network"),
        ("mamba-layers", 8, "layers of Mamba2"),
        ("mamba-states", 128, "states a head of Mamba2"),
        ("mamba-chunk", 128, "tokens of a chunk of Mamba2"),
        ("peer-longest", 8192, "longest sequence that peers are given"),
    ):
        command.add_argument(f"--{name}", type=positive, default=size, help=words)
    command.add_argument("--bf16", action="store_true", help="also time ours with bf16 matrix products (autocast)")
    command.add_argument("--compile", action="store_true", help="also time ours with train.compile")
    words = "transformers' models of about our size to compare with; none leaves them out"
    command.add_argument("--peers", nargs="*", choices=list(PEERS), default=["llama"], help=words)
    command.add_argument("--peer-python", default=None, help="interpreter with transformers 4.37.2, to compare with")
    command.add_argument(
        "--malloc", choices=["kept", "default"], default="kept",
        help="kept: contenders keep freed memory and get huge pages; default: peers have what the system gives, ours "
        "what launch/pretrain.py asks the system for",
    )  # fmt: skip
    words = "parallel.activation_checkpoint_segment of ours, tokens; 0 keeps all activations"
    command.add_argument("--segment", type=int, default=0, help=words)
    words = "PNG or SVG file for a picture of the time per token against the length (extra `plot`)"
    command.add_argument("--plot", default=None, metavar="FILE", help=words)


def run_step(args: argparse.Namespace) -> None:
    """Time training steps, and print a table.

    Raises:
        ValueError: transformers' Mega computes something else, a contender fails, or what is asked for cannot be done.
    """
    if args.plot:
        check_plot(args.plot)
    config = MegaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, num_hidden_layers=args.layers,
        shared_representation_size=args.shared, intermediate_size=args.expanded, nffn_hidden_size=args.expanded,
        ema_projection_size=args.averages, chunk_size=args.chunk, use_chunking=True, is_decoder=True,
        bidirectional=False,
    )  # fmt: skip
    check_segments(config, args.segment, 1, 1)
    sizes = {name: value for name, value in vars(args).items() if isinstance(value, int | list)}
    kinds = {"ours": sys.executable}
    if args.bf16:
        kinds["ours bf16"] = sys.executable
    if args.compile:
        kinds["ours compiled"] = sys.executable
    if args.peer_python:
        kinds["mega"] = args.peer_python
    kinds |= dict.fromkeys(args.peers, sys.executable)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for length in args.lengths:
            present = {kind: python for kind, python in kinds.items() if _takes(kind, length, args.peer_longest)}
            rows += _length(length, present, sizes, args, Path(name))
    flops = training_flops_per_token(config, max(args.lengths))
    for row in rows:
        if row["kind"] == "mega" or row["kind"].startswith("ours"):
            row["shares"] = {name: row["tokens_per_s"] * flops / found for name, found in row["ceilings"].items()}
    print(
        f"Training step (forward, loss, backward, AdamW) of one sequence, fp32 unless said, {args.threads} CPU "
        f"thread(s), {args.repeats} repeats after {args.warmup} for warm-up, in turns; {flops / 1e6:.1f} MFLOP a token "
        "by the FLOP model. Of torch.mm, of oneDNN: share of what matrix products of the model's sizes in fp32 reach "
        "by them in the same turns. "
        f"{_MALLOC[args.malloc]}"
        f"{f' Ours is recomputed {args.segment:,} tokens at a time.' if args.segment else ''}\n"
        f"Machine: {hardware()}. torch {torch.__version__}.\n"
    )
    print(_table(rows))
    exponents = _exponents(rows)
    if exponents:
        found = ", ".join(f"{name} {power:.2f}" for name, power in exponents.items())
        print(f"\nTime grows as length to the power of (least squares): {found}.")
    if args.plot:
        title = f"Training step of one sequence, {args.threads} CPU thread(s)\n{hardware()}"
        plot_costs(args.plot, _costs(rows), title)
    if args.json:
        content = {"benchmark": "step", "sizes": sizes, "hardware": hardware(), "flops_per_token": flops, "rows": rows}
        content["exponents"] = exponents
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _takes(kind: str, length: int, peer_longest: int) -> bool:
    return kind.startswith("ours") or length <= peer_longest


def _length(
    length: int, kinds: dict[str, str], sizes: dict[str, Any], args: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Figures of all contenders at one length."""
    file = folder / "sizes.json"
    file.write_text(json.dumps({**sizes, "lengths": [length], "weights": str(folder / "weights.pt")}))

    def start(kind: str, **environment: str) -> WorkerProcess:
        command = [kinds[kind], str(_WORKER), kind, str(file), str(args.threads)]
        errors = (folder / f"{kind}.txt").open("w+", encoding="utf-8")
        try:
            return WorkerProcess(command, args.threads, errors, environment)
        except OSError as error:
            raise ValueError(f"--peer-python {kinds[kind]} cannot be started: {error.strerror}") from error

    first: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        worker = start(kind, **_GIVES_BACK)
        try:
            first[kind] = worker.ask(f"check {length}")
        finally:
            worker.close()
    for other, name in (("mega", "transformers'"), ("ours compiled", "compiled it")):
        if other in first:
            _require_equal(first["ours"], first[other], name)
    workers: dict[str, WorkerProcess] = {}
    try:
        for kind in kinds:
            workers[kind] = start(kind, **(_KEEPS_MEMORY if args.malloc == "kept" else {}))
        times: dict[str, list[float]] = {kind: [] for kind in workers}
        ceilings: list[dict[str, float]] = []
        for turn in range(args.warmup + args.repeats):
            for kind, worker in workers.items():
                found = _ceilings(args.hidden, args.expanded)
                ms = worker.ask(f"time {length}")["ms"]
                if turn >= args.warmup:
                    times[kind].append(ms)
                    ceilings.append(found)
    finally:
        for worker in workers.values():
            worker.close()
    ours = statistics.median(times["ours"])
    return [
        {
            "length": length, "kind": kind, "tokens_per_s": 1e3 * length / statistics.median(found),
            "least": 1e3 * length / max(found), "greatest": 1e3 * length / min(found),
            "ceilings": {name: statistics.median(each[name] for each in ceilings) for name in ceilings[0]},
            "shares": {}, "megabytes": first[kind]["megabytes"],
            "ours_times": statistics.median(found) / ours, "parameters": workers[kind].ready["parameters"],
            "transformers": workers[kind].ready["transformers"],
        }
        for kind, found in times.items()
    ]  # fmt: skip


def _require_equal(ours: dict[str, float], reference: dict[str, float], whose: str) -> None:
    for name in ("loss", "norm"):
        # not <=, so that NaN fails
        if not abs(ours[name] - reference[name]) <= _TOLERANCE * abs(reference[name]):
            raise ValueError(f"nothing is timed: our {name} is {ours[name]:.6f}, {whose} is {reference[name]:.6f}")


def _ceilings(hidden: int, expanded: int) -> dict[str, float]:
    """Operations per second of fp32 matrix products as the model has them, the best of some, by library."""
    x, weight = torch.ones(_CEILING_TOKENS, hidden), torch.ones(hidden, 2 * expanded)
    products: dict[str, Callable[[], Tensor]] = {"torch.mm": lambda: torch.mm(x, weight)}
    if torch.backends.mkldnn.is_available():
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight.t(), None, "none", [], "")
    best = dict.fromkeys(products, float("inf"))
    for _ in range(_CEILING_RUNS):
        for name, product in products.items():
            began = time.perf_counter()
            product()
            best[name] = min(best[name], time.perf_counter() - began)
    return {name: 2 * _CEILING_TOKENS * hidden * 2 * expanded / seconds for name, seconds in best.items()}


def _name(row: dict[str, Any]) -> str:
    """What a contender is called in tables and pictures."""
    if row["kind"] == "mega":
        return f"transformers {row['transformers']} Mega"
    return PEERS.get(row["kind"], row["kind"])


def _costs(rows: list[dict[str, Any]]) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Median, least and greatest microseconds a token, by contender and length."""
    costs: dict[str, dict[int, tuple[float, float, float]]] = {}
    for row in rows:
        of_tokens = tuple(1e6 / row[name] for name in ("tokens_per_s", "greatest", "least"))
        costs.setdefault(_name(row), {})[row["length"]] = of_tokens
    return costs


def _exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The power of the length that a step's time grows as, for contenders that were given several."""
    costs = _costs(rows)
    times = {name: {length: length * cost[0] for length, cost in found.items()} for name, found in costs.items()}
    return {name: exponent(found) for name, found in times.items() if len(found) > 1}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [_HEAD, ["---"] * len(_HEAD)]
    for row in rows:
        shares = [f"{row['shares'][name]:.2f}" if name in row["shares"] else "" for name in ("torch.mm", "oneDNN")]
        lines.append([
            f"{row['length']:,}", f"{_name(row)} ({row['parameters'] / 1e6:.1f}M)",
            f"{row['tokens_per_s']:,.0f}", f"{row['least']:,.0f}", f"{row['greatest']:,.0f}", *shares,
            f"{row['megabytes']:,.0f}", f"{row['ours_times']:.2f}",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
