"""Gradients of gates on a GPU, for compiled blocks: one kernel, which sums the bias's gradient, and attention's means.

A bias that a product adds has its gradient by a pass of its own over what the gate's kernel just wrote: no compiler
sums columns in a kernel that writes other tensors, nor does a product. So the product is without bias, the gate adds
it, and this kernel sums over tokens what it writes. Outputs are plain PyTorch, which a compiler fuses with its
surroundings.

A program sums every n-th tile of tokens of its columns, and n partial sums are added after, always in one order.

Legend: T tokens, H heads, W channels of a head, n programs along tokens, m tiles of columns in a head.

    dy, x, out, d_out, dx  (T, H W) contiguous, bf16, fp16 or fp32
    bias                   (H W,), added to x
    delta                  (T, H, m) fp32: parts of `sum d_out out` over a head's channels
    sums                   (n, H W) fp32: of the gradient of x, over tokens
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import launch, once_differentiable, operator

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError(
        "gradients of gates by a Triton kernel need triton: pip install 'mega_scale[triton]'"
    ) from missing

_MOST_COLUMNS, _ELEMENTS = 1024, 2048  # of a program's tile
_WARPS = 4
# Enough for a GPU; each has a row of partial sums.
_PROGRAMS = 1024


@triton.jit
def gate_slopes_kernel(
    dy, x, bias, out, d_out, dx, delta, sums, tokens, width, heads, GATES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of `silu(x + bias)`, or with GATES of `out silu(x + bias)`; program (j, i) has the j-th tile of columns and every
    n-th tile of tokens from the i-th on."""
    tiles = tl.cdiv(width, COLUMNS)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    of_head = tile * COLUMNS + tl.arange(0, COLUMNS)
    column, inside = head * width + of_head, of_head < width
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(tl.program_id(1) * ROWS, tokens, tl.num_programs(1) * ROWS):
        token = (begin + tl.arange(0, ROWS)).to(tl.int64)
        at = token[:, None] * (width * heads) + column[None, :]
        there = (token < tokens)[:, None] & inside[None, :]
        pre = tl.load(x + at, mask=there, other=0.0).to(tl.float32) + shift[None, :]
        slope = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
        share = tl.sigmoid(pre)
        rise = share * (1.0 + pre * (1.0 - share))
        if GATES:
            value = tl.load(out + at, mask=there, other=0.0).to(tl.float32)
            of_value = (slope * pre * share).to(d_out.dtype.element_ty)
            tl.store(d_out + at, of_value, mask=there)
            # Of what is stored, as gradients of scores subtract it from products of that.
            mean = tl.sum(of_value.to(tl.float32) * value, 1)
            tl.store(delta + (token * heads + head) * tiles + tile, mean, mask=token < tokens)
            slope *= value
        slope *= rise
        tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=there)
        total += slope
    tl.store(sums + tl.program_id(1).to(tl.int64) * (width * heads) + column, tl.sum(total, 0), mask=inside)


def gate_constants(width: int) -> dict[str, int]:
    """What the kernel is compiled with, by the channels of a head."""
    columns = min(_MOST_COLUMNS, 1 << (width - 1).bit_length())
    return {"COLUMNS": columns, "ROWS": _ELEMENTS // columns, "num_warps": _WARPS}


def silu_of_sum(x: Tensor, bias: Tensor) -> Tensor:
    """`silu(x + bias)` in the dtype of x, (..., W) and (W,), bf16, fp16 or fp32; differentiable once."""
    result: Tensor = _SiluOfSum.apply(x, bias)
    return result


class _SiluOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return F.silu(x + bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        dx, sums = silu_gradient(dy.flatten(0, -2), x.flatten(0, -2), bias)
        return dx.view(x.shape), sums.sum(0).to(bias.dtype)


def _grid(tokens: int, width: int, heads: int) -> tuple[int, int]:
    """Tiles of columns, and programs along tokens."""
    own = gate_constants(width)
    tiles = heads * -(-width // own["COLUMNS"])
    return tiles, max(1, min(-(-tokens // own["ROWS"]), _PROGRAMS // tiles))


def _silu_gradient_fake(dy, x, bias):
    return torch.empty_like(x), x.new_empty(_grid(len(x), x.shape[1], 1)[1], x.shape[1], dtype=torch.float32)


@operator(_silu_gradient_fake)
def silu_gradient(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`dx` and `sums` of `silu(x + bias)`, from the gradient of it; all (T, W)."""
    dx, sums = _silu_gradient_fake(dy, x, bias)
    own = gate_constants(x.shape[1])
    launch(
        gate_slopes_kernel, _grid(len(x), x.shape[1], 1),
        dy, x, bias, x, x, dx, sums, sums, *x.shape, 1, GATES=False, **own,
    )  # fmt: skip
    return dx, sums


def _gate_gradients_fake(dy, out, x, bias, heads):
    width = x.shape[1] // heads
    d_out, dx = torch.empty_like(x), torch.empty_like(x)
    tiles, programs = _grid(len(x), width, heads)
    delta = x.new_empty(len(x), heads, tiles // heads, dtype=torch.float32)
    return d_out, dx, delta, x.new_empty(programs, x.shape[1], dtype=torch.float32)


@operator(_gate_gradients_fake)
def gate_gradients(
    dy: Tensor, out: Tensor, x: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`d_out`, `dx`, `delta` and `sums` of `out silu(x + bias)`, from the gradient of it; all (T, H W)."""
    made = _gate_gradients_fake(dy, out, x, bias, heads)
    d_out, dx, delta, sums = made
    width = x.shape[1] // heads
    sizes, own = (len(x), width, heads), gate_constants(width)
    launch(gate_slopes_kernel, _grid(*sizes), dy, x, bias, out, d_out, dx, delta, sums, *sizes, GATES=True, **own)
    return made
