"""Queries and keys of a Megalodon on a GPU, for compiled blocks: one kernel each way.

Heads of a layer's outputs are divided by their root mean square, scaled and shifted twice, and turned by position.
Compilers make several kernels of that, since turning reads neighbours, and sums for scales read tokens again. Here a
program has tokens of a head, whole: it reads them once and writes both results, or the gradient of the one input and
sums over its tokens of those of parameters, which are added after in one order. The root mean square is computed again.

Legend: T tokens, H heads, W channels of a head, even, R rows of turns, n programs along tokens. A channel and its
neighbour, which are turned together, are in two tensors of one half of the channels each.

    z, q, k, dq, dk, dz  (T, H W) contiguous, bf16, fp16 or fp32
    bias                 (H W,), added to z, or none
    gamma, beta          (2, H W): queries', then keys'
    turns                (R, W / 2, 2) fp32, cosines and sines; token t has row t modulo R
    sums                 (n, 5, H W) fp32: by scales of queries and of keys, by shifts of both, by z
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
    raise ImportError("queries and keys by Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

MOST_CHANNELS = 1024
"""Of a head: a program holds them all, and five sums of each."""
_ELEMENTS, _WARPS = 1024, 4
# Enough for a GPU; each has five rows of partial sums.
_PROGRAMS = 512


@triton.jit
def _pairs(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Even and odd channels of a tile, in fp32."""
    return tl.split(tl.reshape(tile.to(tl.float32), (ROWS, COLUMNS // 2, 2)))


@triton.jit
def _together(even, odd, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What `_pairs` took apart."""
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))


@triton.jit
def _of_pairs(vector, of_pair, inside):
    """Numbers of even and of odd channels, (1, COLUMNS / 2) fp32 each."""
    even = tl.load(vector + 2 * of_pair, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(vector + 2 * of_pair + 1, mask=inside, other=0.0).to(tl.float32)
    return even[None, :], odd[None, :]


@triton.jit
def _normal(z, shift_even, shift_odd, at, there, width, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Even and odd channels over their root mean square, and its inverse (ROWS, 1)."""
    even, odd = _pairs(tl.load(z + at, mask=there, other=0.0), ROWS, COLUMNS)
    even, odd = even + shift_even, odd + shift_odd
    inverse = tl.rsqrt(tl.sum(even * even + odd * odd, 1) / width + eps)[:, None]
    return even * inverse, odd * inverse, inverse


@triton.jit
def queries_kernel(
    z, bias, gamma, beta, turns, q, k, tokens, width, heads, rows, factor, eps, BIAS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, h) has the i-th tile of tokens of head h."""
    head, step = tl.program_id(1), width * heads
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    of_head, of_pair = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS // 2)
    pairs = 2 * of_pair < width
    there = (token < tokens)[:, None] & (of_head < width)[None, :]
    at = token[:, None] * step + (head * width + of_head)[None, :]
    shift_even, shift_odd = 0.0, 0.0
    if BIAS:
        shift_even, shift_odd = _of_pairs(bias + head * width, of_pair, pairs)
    even, odd, _ = _normal(z, shift_even, shift_odd, at, there, width, eps, ROWS, COLUMNS)
    of_turn = (token % rows)[:, None] * width + of_head[None, :]
    cos, sin = _pairs(tl.load(turns + of_turn, mask=there, other=0.0), ROWS, COLUMNS)
    for kind in tl.static_range(2):
        of_kind = kind * step + head * width
        scale_even, scale_odd = _of_pairs(gamma + of_kind, of_pair, pairs)
        begin_even, begin_odd = _of_pairs(beta + of_kind, of_pair, pairs)
        a = even * ((scale_even + 1.0) * factor) + begin_even
        b = odd * ((scale_odd + 1.0) * factor) + begin_odd
        turned = _together(a * cos - b * sin, b * cos + a * sin, ROWS, COLUMNS)
        tl.store((q if kind == 0 else k) + at, turned.to(q.dtype.element_ty), mask=there)


@triton.jit
def _slopes(
    dy, gamma, at, there, cos, sin, even, odd, of_pair, pairs, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Gradients of shifts, of scales, and of what is scaled, each of even and odd channels."""
    a, b = _pairs(tl.load(dy + at, mask=there, other=0.0), ROWS, COLUMNS)
    of_even, of_odd = a * cos + b * sin, b * cos - a * sin
    scale_even, scale_odd = _of_pairs(gamma, of_pair, pairs)
    back_even, back_odd = of_even * ((scale_even + 1.0) * factor), of_odd * ((scale_odd + 1.0) * factor)
    return of_even, of_odd, of_even * even, of_odd * odd, back_even, back_odd


@triton.jit
def _store_sums(sums, even, odd, of_pair, pairs):
    tl.store(sums + 2 * of_pair, tl.sum(even, 0), mask=pairs)
    tl.store(sums + 2 * of_pair + 1, tl.sum(odd, 0), mask=pairs)


@triton.jit
def queries_slopes_kernel(
    dq, dk, z, bias, gamma, turns, dz, sums, tokens, width, heads, rows, factor, eps, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, h) has every n-th tile of tokens of head h, from the i-th on."""
    head, step = tl.program_id(1), width * heads
    of_head, of_pair = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS // 2)
    pairs = 2 * of_pair < width
    shift_even, shift_odd = 0.0, 0.0
    if BIAS:
        shift_even, shift_odd = _of_pairs(bias + head * width, of_pair, pairs)
    zero = tl.zeros((ROWS, COLUMNS // 2), tl.float32)
    q_scale_even, q_scale_odd, k_scale_even, k_scale_odd = zero, zero, zero, zero
    q_shift_even, q_shift_odd, k_shift_even, k_shift_odd = zero, zero, zero, zero
    z_even, z_odd = zero, zero
    for begin in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        token = (begin + tl.arange(0, ROWS)).to(tl.int64)
        there = (token < tokens)[:, None] & (of_head < width)[None, :]
        at = token[:, None] * step + (head * width + of_head)[None, :]
        even, odd, inverse = _normal(z, shift_even, shift_odd, at, there, width, eps, ROWS, COLUMNS)
        of_turn = (token % rows)[:, None] * width + of_head[None, :]
        cos, sin = _pairs(tl.load(turns + of_turn, mask=there, other=0.0), ROWS, COLUMNS)
        own = gamma + head * width
        a, b, c, d, of_even, of_odd = _slopes(
            dq, own, at, there, cos, sin, even, odd, of_pair, pairs, factor, ROWS, COLUMNS
        )
        q_shift_even, q_shift_odd, q_scale_even, q_scale_odd = (
            q_shift_even + a, q_shift_odd + b, q_scale_even + c, q_scale_odd + d,
        )  # fmt: skip
        a, b, c, d, more_even, more_odd = _slopes(
            dk, own + step, at, there, cos, sin, even, odd, of_pair, pairs, factor, ROWS, COLUMNS
        )
        k_shift_even, k_shift_odd, k_scale_even, k_scale_odd = (
            k_shift_even + a, k_shift_odd + b, k_scale_even + c, k_scale_odd + d,
        )  # fmt: skip
        of_even, of_odd = of_even + more_even, of_odd + more_odd
        mean = (tl.sum(of_even * even + of_odd * odd, 1) / width)[:, None]
        of_even, of_odd = (of_even - even * mean) * inverse, (of_odd - odd * mean) * inverse
        z_even, z_odd = z_even + of_even, z_odd + of_odd
        tl.store(dz + at, _together(of_even, of_odd, ROWS, COLUMNS).to(dz.dtype.element_ty), mask=there)
    sums += tl.program_id(0).to(tl.int64) * 5 * step + head * width
    _store_sums(sums, q_scale_even, q_scale_odd, of_pair, pairs)
    _store_sums(sums + step, k_scale_even, k_scale_odd, of_pair, pairs)
    _store_sums(sums + 2 * step, q_shift_even, q_shift_odd, of_pair, pairs)
    _store_sums(sums + 3 * step, k_shift_even, k_shift_odd, of_pair, pairs)
    _store_sums(sums + 4 * step, z_even, z_odd, of_pair, pairs)


def queries_constants(width: int) -> dict[str, int]:
    """What both kernels are compiled with, by the channels of a head."""
    columns = max(2, 1 << (width - 1).bit_length())
    return {"COLUMNS": columns, "ROWS": max(_ELEMENTS // columns, 1), "num_warps": _WARPS}


def turned_queries_and_keys(
    z: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, turns: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`normalized_queries_and_keys` of `z + bias`, turned: z (B, L, H W) to queries and keys, both (B, L, H W).

    gamma and beta are (2, H W), turns (L, W / 2, 2) or (B, L, W / 2, 2); z is bf16, fp16 or fp32, and W even, up to
    `MOST_CHANNELS`. Differentiable once, but not by turns.
    """
    q, k = _Queries.apply(z.flatten(0, -2), bias, gamma, beta, turns.flatten(0, -3).contiguous(), heads, float(eps))
    return q.view(z.shape), k.view(z.shape)


class _Queries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, turns: Tensor, heads: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, bias, gamma, turns)
        ctx.heads, ctx.eps, ctx.dtype = heads, eps, beta.dtype
        q, k = turned_queries(z, bias, gamma, beta, turns, heads, eps)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        z, bias, gamma, turns = ctx.saved_tensors
        dz, sums = queries_gradients(dq, dk, z, bias, gamma, turns, ctx.heads, ctx.eps)
        total = sums.sum(0)
        of_gamma = (total[:2] * (z.shape[1] // ctx.heads) ** -0.5).to(gamma.dtype)
        of_bias = None if bias is None else total[4].to(bias.dtype)
        return dz, of_bias, of_gamma, total[2:4].to(ctx.dtype), None, None, None


def _sizes(z: Tensor, turns: Tensor, heads: int, eps: float) -> tuple[Any, ...]:
    """What both kernels take of sizes: tokens, channels of a head, heads, rows of turns, W^-1/2, eps."""
    width = z.shape[1] // heads
    return len(z), width, heads, len(turns), width**-0.5, eps


def _turned_queries_fake(z, bias, gamma, beta, turns, heads, eps):
    return torch.empty_like(z), torch.empty_like(z)


@operator(_turned_queries_fake)
def turned_queries(
    z: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, turns: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys (T, H W)."""
    q, k = torch.empty_like(z), torch.empty_like(z)
    sizes = _sizes(z, turns, heads, eps)
    own = queries_constants(sizes[1])
    given = (z, z if bias is None else bias, gamma, beta, turns, q, k)
    launch(queries_kernel, (-(-len(z) // own["ROWS"]), heads), *given, *sizes, BIAS=bias is not None, **own)
    return q, k


def _programs(z: Tensor, heads: int) -> int:
    tiles = -(-len(z) // queries_constants(z.shape[1] // heads)["ROWS"])
    return max(1, min(tiles, _PROGRAMS // heads))


def _queries_gradients_fake(dq, dk, z, bias, gamma, turns, heads, eps):
    return torch.empty_like(z), z.new_empty(_programs(z, heads), 5, z.shape[1], dtype=torch.float32)


@operator(_queries_gradients_fake)
def queries_gradients(
    dq: Tensor, dk: Tensor, z: Tensor, bias: Tensor | None, gamma: Tensor, turns: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`dz` and `sums`."""
    dz, sums = _queries_gradients_fake(dq, dk, z, bias, gamma, turns, heads, eps)
    sizes = _sizes(z, turns, heads, eps)
    given = (dq, dk, z, z if bias is None else bias, gamma, turns, dz, sums)
    own = queries_constants(sizes[1])
    launch(queries_slopes_kernel, (len(sums), heads), *given, *sizes, BIAS=bias is not None, **own)
    return dz, sums
