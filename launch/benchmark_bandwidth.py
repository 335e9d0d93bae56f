"""The `bandwidth` sub-command of benchmark.py: the moving average on a GPU, as a share of a copy's bandwidth.

Bytes are the fewest there can be: forward reads x and writes y, backward reads x and dy and writes dx. What kernels
move beyond that counts against them.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.gpu import copy_bandwidth, gpu_name, milliseconds, require_gpu
from mega_scale.ops.ema import EmaCoefficients, damped_ema

_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHECKED_CHANNELS = 16
_IMPLS = ["triton", "triton_walk", "blocked"]


def add_bandwidth_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Options of the sub-command."""
    command.add_argument("--batch", type=positive, default=1, help="sequences")
    command.add_argument("--length", type=positive, default=32768, help="tokens a sequence")
    command.add_argument("--hidden", type=positive, default=4096, help="channels")
    command.add_argument("--states", type=positive, default=16, help="moving averages per channel")
    command.add_argument("--dtypes", nargs="+", choices=list(_DTYPES), default=list(_DTYPES), help="of tokens")
    command.add_argument("--impls", nargs="+", choices=_IMPLS, default=_IMPLS)


def run_bandwidth(args: argparse.Namespace) -> None:
    """Time forward and backward, and print a table.

    Raises:
        ValueError: there is no GPU, or an implementation computes something else than the recurrence.
    """
    require_gpu("bandwidth")
    ceiling = copy_bandwidth()
    rows = [_row(impl, dtype, args, ceiling) for dtype in args.dtypes for impl in args.impls]
    print(
        f"Damped EMA on {gpu_name()}, torch {torch.__version__}: {args.batch} x {args.length:,} tokens, "
        f"{args.hidden:,} channels, N = {args.states}; {args.repeats} repeats after {args.warmup} for warm-up. "
        f"A copy moves {ceiling / 1e12:.2f} TB/s; shares are of that, for the fewest bytes there can be.\n"
    )
    head = ["", "tokens", "forward ms", "share", "backward ms", "share", "largest error"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([
            row["impl"], row["dtype"], f"{row['forward_ms']:.3f}", f"{row['forward_share']:.2f}",
            f"{row['backward_ms']:.3f}", f"{row['backward_share']:.2f}", f"{row['error']:.1e}",
        ])  # fmt: skip
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    if args.json:
        content = {"benchmark": "bandwidth", "gpu": gpu_name(), "copy_bytes_per_s": ceiling, "rows": rows}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _row(impl: str, dtype: str, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    x = normal(args.batch, args.length, args.hidden).to(_DTYPES[dtype]).requires_grad_()
    dy = normal(args.batch, args.length, args.hidden).to(_DTYPES[dtype])
    pairs = (args.hidden, args.states)
    parameters = [0.2 * normal(*pairs, 1), 0.2 * normal(*pairs, 1), normal(*pairs, 1), normal(*pairs)]
    found = [t.detach().requires_grad_() for t in EmaCoefficients.from_parameters(*parameters)]
    coefficients = EmaCoefficients(*found)

    def forward() -> Tensor:
        return damped_ema(x, coefficients, impl=impl)[0]

    y = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, *found], dy, retain_graph=True)

    error = _error(x, dy, coefficients, [y.detach(), *backward()])
    # not <=, so that NaN fails
    if not error <= _TOLERANCE[dtype]:
        raise ValueError(f"{impl} in {dtype} is not timed: it differs by {error:.1e} from the recurrence")
    forward_ms = statistics.median(milliseconds(forward, args.repeats, args.warmup))
    backward_ms = statistics.median(milliseconds(backward, args.repeats, args.warmup))
    once = x.numel() * x.element_size() / ceiling * 1e3
    return {
        "impl": impl, "dtype": dtype, "forward_ms": forward_ms, "forward_share": 2 * once / forward_ms,
        "backward_ms": backward_ms, "backward_share": 3 * once / backward_ms, "error": error,
    }  # fmt: skip


def _error(x: Tensor, dy: Tensor, coefficients: EmaCoefficients, results: list[Tensor]) -> float:
    """Largest error of outputs and gradients on some channels, relative to a tensor's largest value.

    The truth is the blocked form in fp64, which tests hold to the recurrence, as that would take a kernel a token.
    """
    channels = torch.linspace(0, x.shape[2] - 1, _CHECKED_CHANNELS, device=x.device).long()
    wide = x.detach()[..., channels].double().requires_grad_()
    few = [t.detach()[channels].double().requires_grad_() for t in coefficients]
    y, _ = damped_ema(wide, EmaCoefficients(*few), impl="blocked")
    truth = [y.detach(), *torch.autograd.grad(y, [wide, *few], dy[..., channels].double())]
    own = [t[..., channels] if t.dim() == 3 else t[channels] for t in results]
    return max(
        float((mine.double() - right).abs().max() / right.abs().max()) for mine, right in zip(own, truth, strict=True)
    )
