"""The `kernels` sub-command of launch/benchmark.py: what compilation makes of the Triton kernels. It needs no GPU."""

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch


def add_kernels_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Declare the options of `kernels`."""
    command.add_argument(
        "--architectures", type=positive, nargs="+", default=[80, 90], help="compute capabilities: 80 A100, 90 H100"
    )
    command.add_argument(
        "--dtypes", nargs="+", choices=("bf16", "fp16", "fp32"), default=["bf16", "fp32"], help="of tokens"
    )
    command.add_argument("--states", type=positive, nargs="+", default=[16], help="moving averages per channel")
    command.add_argument("--keys", type=positive, nargs="+", default=[4096], help="of a chunk of attention")


def run_kernels(args: argparse.Namespace) -> None:
    """The `kernels` sub-command: compile, print.

    Args:
        args: the command line.

    Raises:
        ValueError: triton is not installed, or interprets kernels in this process.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("kernels are compiled by triton, which is not installed: pip install 'mega_scale[triton]'")
    from mega_scale.ops.triton_report import compile_kernels, compiler_version

    rows = compile_kernels(args.architectures, args.dtypes, args.states, args.keys)
    lines = [
        "Kernels of the damped EMA and of attention, compiled here by triton and its ptxas, and not run. Registers "
        "and spills (stored and loaded) are a thread's, shared memory is a program's; products are instructions for "
        "matrix units.",
        f"Versions: triton {compiler_version()}, torch {torch.__version__}.",
        "",
        "| kernel | GPU | tokens | size | warps | registers | shared memory, KiB | spills, bytes | products |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        figures = [row.size, row.warps, row.registers, f"{row.shared_bytes / 1024:.1f}", row.spill_bytes]
        cells = [row.kernel, row.architecture, row.dtype, *figures, row.products]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    print("\n".join(lines))
    if args.json:
        report = {"benchmark": "kernels", "triton": compiler_version(), "rows": [row._asdict() for row in rows]}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
