"""Division by the root mean square, with a backward pass that keeps the input and a number a token.

Legend: D channels, last.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.once import once_differentiable
from mega_scale.ops.tracing import written_out


def divide_by_rms(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """`gain x / sqrt(mean(x^2) + eps)` over the last dimension.

    Args:
        x: (..., D), any floating dtype; statistics are at least fp32.
        gain: (1,) or (D,); none for one.
        eps: added to the mean square.

    Returns:
        In the shape and dtype of x. Differentiable once, but where something reads along.
    """
    if x.is_cuda and (gain is None or gain.dtype == x.dtype):
        return _fused(x, gain, eps)
    if torch.is_grad_enabled() and not written_out():
        out: Tensor = _DivideByRms.apply(x, gain, eps)
        return out
    return plain_divide_by_rms(x, gain, eps)


def plain_divide_by_rms(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """The same written out, for autograd: the reference."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _scaled(wide, _inverse_rms(wide, eps), gain).to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)


def _scaled(x: Tensor, inverse: Tensor, gain: Tensor | None) -> Tensor:
    """A scalar gain is applied to a number a token, before x is read."""
    if gain is None or gain.numel() == 1:
        return x * (inverse if gain is None else inverse * gain)
    return x * inverse * gain


def _fused(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """By PyTorch's kernel for GPUs, which keeps as little and reads memory once."""
    width = x.shape[-1]
    if gain is None or gain.numel() == width:
        return F.rms_norm(x, (width,), gain, eps)
    return F.rms_norm(x, (width,), None, eps) * gain


class _DivideByRms(torch.autograd.Function):
    """Reads and writes x as few times as separate operations can."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, gain, inverse)
        return _scaled(wide, inverse, gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, gain, inverse = ctx.saved_tensors
        x, dtype = x.to(inverse.dtype), x.dtype
        gradient = gradient.to(inverse.dtype)
        d_gain, scale = None, inverse
        if gain is not None and gain.numel() > 1:
            if ctx.needs_input_grad[1]:
                d_gain = (gradient * x).mul_(inverse).sum(tuple(range(x.dim() - 1))).to(gain.dtype)
            gradient = gradient * gain
        dots = torch.einsum("...d,...d->...", gradient, x)[..., None]
        if gain is not None and gain.numel() == 1:
            d_gain, scale = (dots * inverse).sum().reshape(gain.shape).to(gain.dtype), inverse * gain
        # d/dx of x r(x), with dr/dx = -r^3 x / D.
        d_x = (gradient * scale).addcmul_(x, dots * scale * inverse.square() / -x.shape[-1])
        return d_x.to(dtype), d_gain, None
