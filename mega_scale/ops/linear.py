"""A linear layer's products on a CPU in fp32, by the library that is fastest on it.

PyTorch multiplies fp32 matrices with Intel's MKL, which keeps its widest instructions for Intel's processors. oneDNN,
which PyTorch brings as well, uses them on all that have them: on an AMD EPYC products x W^T take 0.84 of the time. The
gradient of W, a sum over tokens, takes as long by either.

Legend: T tokens, D inputs, W outputs.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.modes import in_memory, once_differentiable

# Fewer are a decoding step's, which reads the weight once whatever multiplies it.
_TOKENS = 32
_PROCESSOR = Path("/proc/cpuinfo")
# A PyTorch that was built without oneDNN does not even know its operators.
ONEDNN_PRODUCTS = [torch.ops.mkldnn._linear_pointwise.default] if torch.backends.mkldnn.is_available() else []
"""What activation checkpointing and counters know a product of oneDNN by."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias` as `torch.nn.functional.linear` has it; once differentiable where oneDNN computes it.

    Args:
        x: (..., D), any floating dtype.
        weight: (W, D).
        bias: (W,) or none.

    Returns:
        (..., W).
    """
    tokens = 0 if torch.compiler.is_compiling() else x.numel() // max(x.shape[-1], 1)
    if tokens < _TOKENS or not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    flat: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
    return flat.unflatten(0, x.shape[:-1])


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`, (T, D) and (W, D) to (T, W), for use inside autograd functions."""
    if len(x) < _TOKENS or not _suits_onednn(x, weight):
        # Not F.linear, in whose place DeepSpeed puts an autograd function of its own.
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Asks for the cheapest first."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and _onednn_is_faster()
        and in_memory(x, weight)
    )


@cache
def _onednn_is_faster() -> bool:
    """Whether the processor has wide registers, and a maker for whose processors MKL does not use them."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        lines = _PROCESSOR.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(makers) and "GenuineIntel" not in makers


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (T, D), weight (W, D), bias (W,)."""
        ctx.save_for_backward(x, weight)
        return times_transposed(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            times_transposed(gradient, weight.t()) if of_x else None,
            gradient.t() @ x if of_weight else None,
            # As a product, which reads rows in order; a sum over them takes twice as long.
            (gradient.new_ones(1, len(gradient)) @ gradient)[0] if of_bias else None,
        )
