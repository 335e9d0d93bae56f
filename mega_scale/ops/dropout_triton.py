"""Dropout by place on a GPU: one kernel a site and pass, whose hash of places stays in registers.

It keeps what `keep_mask` keeps, bit for bit. The backward pass hashes again, so nothing is saved but numbers. Other
kernels take `place_hash`, `column_hash` and `keep`, as those of attention, whose weights never lie in memory as such:

    place = place_hash(row, position, key)       # of a query: one a program, or a tensor of them
    column = column_hash(column, key)            # of its keys
    weight = tl.where(keep(place, column, threshold), weight * factor, 0.0)

with key, threshold and factor from `launch_numbers`; row, position and column are int32 or int64 numbers in the global
batch, of which the last 32 bits count. Of an attention weight the row is that of the batch, the position that of the
query in its row, and the column the key's place in its chunk, plus MOST_KEYS times the head.
"""

from typing import Any

import torch
from torch import Tensor

from mega_scale.ops import NAMESPACE, launch
from mega_scale.ops.elementwise import MOST_KEYS

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("dropout by Triton kernels needs triton: pip install 'mega_scale[triton]'") from missing

_ELEMENTS = 4096  # of a program
_WARPS = 4
_HEAD_COLUMNS = tl.constexpr(MOST_KEYS)


@triton.jit
def _mix(number):
    """Hash 32-bit numbers that wrap, as `_mix64` does those that do not."""
    number = (number ^ (number >> 16)) * 0x7FEB352D
    number = (number ^ (number >> 16)) * 0x2C1B3C6D
    return number ^ (number >> 15)


@triton.jit
def place_hash(row, position, key):
    """Hash of a token in the global batch, uint32; all given are integers."""
    return _mix(_mix(row.to(tl.uint32) + key.to(tl.uint32)) + position.to(tl.uint32))


@triton.jit
def column_hash(column, key):
    """Hash of a channel, or of a key of an attention weight, uint32."""
    return _mix(column.to(tl.uint32) + (key.to(tl.uint32) ^ 0x9E3779B9))


@triton.jit
def keep(place, column, threshold):
    """Whether elements stay, of the shape that `place_hash` and `column_hash` are broadcast to."""
    mixed = place ^ column
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return (mixed ^ (mixed >> 16)).to(tl.int32, bitcast=True) >= threshold


@triton.jit(do_not_specialize=["key", "first_row", "first_position", "first_column", "threshold"])
def dropout_kernel(
    x, residual, y, key, first_row, first_position, first_column, threshold, factor, lines, width, queries, heads,
    chunks, RESIDUAL: tl.constexpr, HEADS: tl.constexpr, FEATUREWISE: tl.constexpr, LINES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Lines (B, chunks, heads, queries) of `width` elements, a token or a query each."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    token, head = line, line * 0
    if HEADS:
        head = line // queries % heads
        token = line // (queries * heads) * queries + line % queries
    row, position = token // (queries * chunks), token % (queries * chunks) + first_position
    place = place_hash(row + first_row, position * 0 if FEATUREWISE else position, key)
    columns = (column + first_column)[None, :]
    if HEADS:
        columns += head[:, None] * _HEAD_COLUMNS
    stays = keep(place[:, None], column_hash(columns, key), threshold)
    at = line.to(tl.int64)[:, None] * width + column[None, :]
    there = (line < lines)[:, None] & (column < width)[None, :]
    # As PyTorch multiplies numbers of 16 bits.
    result = tl.where(stays, tl.load(x + at, mask=there, other=0.0).to(tl.float32) * factor, 0.0)
    if RESIDUAL:
        result = result.to(x.dtype.element_ty).to(tl.float32)
        result += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=there)


def launch_numbers(p: float, key: int, dtype: torch.dtype) -> tuple[int, int, float]:
    """The key and the threshold as kernels take them, and what elements of a dtype that stay are multiplied with."""
    factor = float(torch.ones((), dtype=dtype).div_(1.0 - p))
    return _signed(key), round(p * 2**32) - 2**31, factor


def dropout_constants(width: int) -> dict[str, int]:
    """What the kernel is compiled for, by the last dimension's size."""
    columns = min(_ELEMENTS, 1 << (width - 1).bit_length())
    return {"LINES": _ELEMENTS // columns, "WIDTH": columns, "num_warps": _WARPS}


def triton_dropout(
    x: Tensor, residual: Tensor | None, p: float, key: int, row: int, position: int, column: int, featurewise: bool
) -> Tensor:
    """What `PositionalDropout` computes, by one kernel, and one for the gradient: x (B, L, D) or weights (B, K, [H,] I,
    J) in bf16, fp16 or fp32, the residual none or alike."""
    result: Tensor = _dropout(x, residual, p, key, row, position, column, featurewise)
    return result


@torch.library.custom_op(f"{NAMESPACE}::dropout", mutates_args=())
def _dropout(
    x: Tensor, residual: Tensor | None, p: float, key: int, row: int, position: int, column: int, featurewise: bool
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if not x.numel():
        return y
    batch, width = len(x), x.shape[-1]
    heads = x.shape[2] if x.dim() == 5 else 1
    chunks = x.shape[1] if x.dim() > 3 else 1
    lines, own = x.numel() // width, dropout_constants(width)
    key, threshold, factor = launch_numbers(p, key, x.dtype)
    grid = (-(-lines // own["LINES"]), -(-width // own["WIDTH"]))
    launch(
        dropout_kernel, grid,
        x, x if residual is None else residual.contiguous(), y, key, *map(_signed, (row, position, column)),
        threshold, factor, lines, width, lines // (batch * chunks * heads), heads, chunks,
        RESIDUAL=residual is not None, HEADS=heads > 1, FEATUREWISE=featurewise, **own,
    )  # fmt: skip
    return y


def _signed(number: int) -> int:
    """The last 32 bits of a number, as a kernel takes it whatever its size."""
    return (number + 2**31) % 2**32 - 2**31


@_dropout.register_fake
def _(x: Tensor, residual: Tensor | None, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_numbers(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.residual, ctx.numbers = inputs[1] is not None, inputs[2:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = _dropout(dy, None, *ctx.numbers) if ctx.needs_input_grad[0] else None
    return dx, dy if ctx.residual else None, *(None for _ in ctx.numbers)


_dropout.register_autograd(_backward, setup_context=_keep_numbers)
