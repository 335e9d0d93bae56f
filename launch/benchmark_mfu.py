"""The `mfu` sub-command of benchmark.py: training steps of a recipe's model on a GPU, against a Llama of its size.

Ours is the trainer's own step: its engine on one process, bf16 with fp32 masters, sliced loss, clipping, AdamW. MFU is
the model's operations over the vendor's peak of matrix products; recomputed activations do not count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.gpu import gpu_name, matmul_flops, require_gpu
from mega_scale.training.metrics import peak_flops

_WORKER = Path(__file__).with_name("mfu_worker.py")


def add_mfu_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Options of the sub-command."""
    command.add_argument("--config", default="configs/megalodon-1.3b.yaml", help="run whose model is trained")
    command.add_argument("--lengths", type=positive, nargs="+", default=[4096, 32768, 131072], help="tokens a sequence")
    command.add_argument("--tokens", type=positive, default=32768, help="of a step; one sequence where it is longer")
    command.add_argument(
        "--recompute", type=int, nargs="+", default=[2, 2, 1], help="for each length, every n-th block; 0 for none"
    )
    command.add_argument(
        "--segment", type=int, nargs="+", default=[0, 0, 0],
        help="for each length, parallel.activation_checkpoint_segment, tokens",
    )  # fmt: skip
    command.add_argument("--peers", nargs="*", choices=["llama"], default=["llama"], help="transformers' models")
    command.add_argument("--llama-expanded", type=positive, default=6144, help="width of Llama's feed-forward network")
    command.add_argument("--compile", action="store_true", help="train.compile; peers' layers are compiled whole")
    command.add_argument("--profile", action="store_true", help="say on standard error which kernels take the time")


def run_mfu(args: argparse.Namespace) -> None:
    """Train some steps, and print a table.

    Raises:
        ValueError: there is no GPU, options do not fit, or a contender fails.
    """
    require_gpu("mfu")
    for name in ("recompute", "segment"):
        if len(getattr(args, name)) != len(args.lengths):
            raise ValueError(f"--{name} has {len(getattr(args, name))} values for {len(args.lengths)} --lengths")
    keys = ("config", "lengths", "tokens", "recompute", "segment", "llama_expanded", "compile", "profile", "repeats",
            "warmup")  # fmt: skip
    sizes = {key: getattr(args, key) for key in keys}
    ceiling, peak = matmul_flops(), peak_flops(torch.device("cuda"), "bf16")
    rows: list[dict[str, Any]] = []
    for kind in ("ours", *args.peers):
        rows += _rows(kind, sizes)
    for row in rows:
        if "median_ms" in row:
            row["tokens_per_s"] = 1e3 * row["batch"] * row["length"] / row["median_ms"]
            row["mfu"] = None if peak is None else row["tokens_per_s"] * row["flops_per_token"] / peak
            row["of_ceiling"] = row["tokens_per_s"] * row["flops_per_token"] / ceiling
    print(
        f"Training step (forward, loss, backward, clipping, AdamW) in bf16 of {args.config}, {args.repeats} repeats "
        f"after {args.warmup} for warm-up{', compiled' if args.compile else ''}.\nMachine: {gpu_name()}, "
        f"torch {torch.__version__}; matrix products of 8192 reach {ceiling / 1e12:.0f} TFLOP/s"
        f"{'' if peak is None else f', the data sheet says {peak / 1e12:.0f}'}.\n"
    )
    print(_table(rows))
    if args.json:
        found = {"gpu": gpu_name(), "ceiling": ceiling, "peak": peak, "sizes": sizes, "rows": rows}
        Path(args.json).write_text(json.dumps({"benchmark": "mfu", **found}, indent=2) + "\n", encoding="utf-8")


def _rows(kind: str, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sizes.json"
        file.write_text(json.dumps(sizes), encoding="utf-8")
        # What a profile says goes straight to standard error.
        command = [sys.executable, str(_WORKER), kind, str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                # Told at once: whoever has a GPU for some minutes may not see the table.
                print(line, end="", file=sys.stderr, flush=True)
                rows.append(json.loads(line))
    if worker.returncode:
        raise ValueError(f"{kind} ended with exit status {worker.returncode} after {len(rows)} lengths")
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["tokens", "sequences", "", "ms a step", "tokens/s", "MFU", "of the ceiling", "peak GB", "recomputed"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        recomputed = {0: "no block", 1: "every block"}.get(row["recompute"], f"every {row['recompute']}nd block")
        if "median_ms" not in row:
            lines.append([f"{row['length']:,}", "", row["kind"], "out of memory", "", "", "", "", recomputed])
            continue
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.3f}"
        lines.append([
            f"{row['length']:,}", str(row["batch"]), f"{row['kind']} ({row['parameters'] / 1e9:.2f}B)",
            f"{row['median_ms']:,.1f}", f"{row['tokens_per_s']:,.0f}", mfu, f"{row['of_ceiling']:.3f}",
            f"{row['peak_gb']:.1f}", recomputed,
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
