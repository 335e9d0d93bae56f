"""Gradients of a layer norm on a GPU, for compiled blocks: one kernel, which sums the gradient of a bias before it.

As with gates (`gates_triton.py`), a bias that the product before the norm left out is added where the norm reads its
tokens, and its gradient is the sum of what this kernel writes. The outputs are plain PyTorch.

Legend: T tokens, D channels, n programs.

    dy, x, dx   (T, D) contiguous, bf16, fp16 or fp32
    shift       (D,), added to x; gain (D,) fp32
    mean, rstd  (T,) fp32: of x + shift, its mean and the inverse of its deviation
    sums        (n, 3, D) fp32: gradients of the gain, of the norm's bias and of x, over tokens
"""

from typing import Any

import torch
from torch import Tensor

from mega_scale.ops import launch, once_differentiable, operator

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError(
        "gradients of norms by a Triton kernel need triton: pip install 'mega_scale[triton]'"
    ) from missing

# A program holds tokens whole, and three sums of each channel.
_ELEMENTS, _WARPS = 4096, 16
# Enough for a GPU; each has three rows of partial sums.
_PROGRAMS = 256


@triton.jit
def layer_norm_slopes_kernel(
    dy, x, shift, gain, mean, rstd, dx, sums, tokens, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program i has every n-th tile of tokens from the i-th on."""
    column = tl.arange(0, COLUMNS)
    inside = column < width
    before = tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    scale = tl.load(gain + column, mask=inside, other=0.0)[None, :]
    of_gain, of_bias = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    of_shift = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        token = begin + tl.arange(0, ROWS)
        there = (token < tokens)[:, None] & inside[None, :]
        at = token.to(tl.int64)[:, None] * width + column[None, :]
        slope = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
        middle = tl.load(mean + token, mask=token < tokens, other=0.0)[:, None]
        inverse = tl.load(rstd + token, mask=token < tokens, other=0.0)[:, None]
        normal = tl.load(x + at, mask=there, other=0.0).to(tl.float32) + before
        normal = tl.where(there, (normal - middle) * inverse, 0.0)
        of_gain += slope * normal
        of_bias += slope
        slope *= scale
        level, tilt = tl.sum(slope, 1) / width, tl.sum(slope * normal, 1) / width
        slope = tl.where(there, (slope - level[:, None] - normal * tilt[:, None]) * inverse, 0.0)
        of_shift += slope
        tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=there)
    sums += tl.program_id(0).to(tl.int64) * 3 * width + column
    tl.store(sums, tl.sum(of_gain, 0), mask=inside)
    tl.store(sums + width, tl.sum(of_bias, 0), mask=inside)
    tl.store(sums + 2 * width, tl.sum(of_shift, 0), mask=inside)


def layer_norm_constants(width: int) -> dict[str, int]:
    """What the kernel is compiled with, by its channels."""
    columns = 1 << (width - 1).bit_length()
    return {"COLUMNS": columns, "ROWS": max(_ELEMENTS // columns, 1), "num_warps": _WARPS}


def layer_norm_of_sum(x: Tensor, shift: Tensor, gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`gain (x + shift - mean) / std + bias` in the dtype of x, with mean and deviation of each token's `x + shift`.

    x is (..., D), bf16, fp16 or fp32, the others are (D,), gain and bias fp32, or none for one
    and zero. Differentiable once.
    """
    result: Tensor = _LayerNormOfSum.apply(x, shift, gain, bias, float(eps))
    return result


class _LayerNormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x.float() + shift, x.shape[-1:], gain, bias, eps)
        ctx.save_for_backward(x, shift, gain, mean, rstd)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, gain, mean, rstd = ctx.saved_tensors
        scale = torch.ones(x.shape[-1], device=x.device) if gain is None else gain
        flat = dy.flatten(0, -2), x.flatten(0, -2), shift, scale, mean.flatten(), rstd.flatten()
        dx, sums = layer_norm_gradient(*flat)
        of_gain, of_bias, of_shift = sums.sum(0).unbind()
        _, _, *affine, _ = ctx.needs_input_grad
        return (
            dx.view(x.shape), of_shift.to(shift.dtype), of_gain if affine[0] else None, of_bias if affine[1] else None,
            None,
        )  # fmt: skip


def _layer_norm_gradient_fake(dy, x, shift, gain, mean, rstd):
    return torch.empty_like(x), x.new_empty(_programs(x), 3, x.shape[1], dtype=torch.float32)


def _programs(x: Tensor) -> int:
    return max(1, min(-(-len(x) // layer_norm_constants(x.shape[1])["ROWS"]), _PROGRAMS))


@operator(_layer_norm_gradient_fake)
def layer_norm_gradient(
    dy: Tensor, x: Tensor, shift: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """`dx` and `sums`."""
    dx, sums = _layer_norm_gradient_fake(dy, x, shift, gain, mean, rstd)
    own = layer_norm_constants(x.shape[1])
    launch(layer_norm_slopes_kernel, (len(sums),), dy, x, shift, gain, mean, rstd, dx, sums, *x.shape, **own)
    return dx, sums
