"""Causal softmax attention of whole chunks on a GPU: large matrix products, and Triton kernels for what is between.

Values of Mega are thousands of channels wide, wider than fused attention kernels hold in a multiprocessor. So products
are the vendor's, in blocks of queries that each meet only the keys up to their end; scores are in fp32, and one kernel
makes weights of them. The weights are saved for the backward pass: C numbers a token and head, about as many as its
values.

Legend: H heads, G chunks of all sequences and heads, C chunk, Z width of a head's queries and keys, E width of its
values, R queries of a block, from `first` on, J the keys that they meet, from the chunk's first on. WIDTH is J padded
to a power of two; `bias` and `d_bias` are used with BIAS only, `since` with DOCUMENTS.

    scores, d_weights    (G, R, J) fp32, contiguous
    weights, d_scores    (G, C, C), any floating dtype; only the block's queries and keys are written
    bias                 (2C - 1,) fp32: its entry m belongs to key minus query m - (C - 1)
    since                (G, C) int32: the first key that a query sees
    d_bias               (splits, C, C) fp32: its entry (s, i, a) belongs to query i and the key a before it
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import device_kind, launch, once_differentiable, without_autocast

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("attention by Triton kernels needs triton: pip install 'mega_scale[triton]'") from missing

_LEAST_BLOCK = 128
_BLOCKS = 8
# Enough of the gradients' programs for a GPU.
_PROGRAMS = 1024


@triton.jit
def weights_kernel(
    scores, bias, since, weights, first, keys, chunk, scale,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Weights of one query, zero where it does not see; program (i, j) has query i of the block in group j."""
    query = first + tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    key = tl.arange(0, WIDTH)
    visible = key <= query
    if DOCUMENTS:
        visible = visible & (key >= tl.load(since + group * chunk + query))
    at = (group * tl.num_programs(0) + tl.program_id(0)) * keys + key
    score = tl.load(scores + at, mask=visible, other=0.0) * scale
    if BIAS:
        score += tl.load(bias + (chunk - 1 - query) + key, mask=visible, other=0.0)
    score = tl.where(visible, score, float("-inf"))
    # Each query sees itself, so the largest score is a number.
    power = tl.exp(score - tl.max(score, 0))
    weight = power / tl.sum(power, 0)
    row = (group * chunk + query) * chunk
    tl.store(weights + row + key, weight.to(weights.dtype.element_ty), mask=key < keys)


@triton.jit
def scores_gradient_kernel(
    d_weights, weights, d_scores, d_bias, first, keys, chunk, groups, WIDTH: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Gradients by scaled scores, and by the bias summed over groups; program (i, j) has query i in every n-th group,
    n being the number of programs along j."""
    query = first + tl.program_id(0)
    key = tl.arange(0, WIDTH)
    met = key < keys
    total = tl.zeros((WIDTH,), tl.float32)
    for group in range(tl.program_id(1), groups, tl.num_programs(1)):
        at = (tl.cast(group, tl.int64) * tl.num_programs(0) + tl.program_id(0)) * keys + key
        row = (tl.cast(group, tl.int64) * chunk + query) * chunk
        weight = tl.load(weights + row + key, mask=met, other=0.0).to(tl.float32)
        slope = tl.load(d_weights + at, mask=met, other=0.0)
        slope = weight * (slope - tl.sum(weight * slope, 0))
        tl.store(d_scores + row + key, slope.to(d_scores.dtype.element_ty), mask=met)
        total += slope
    if BIAS:
        own = (tl.program_id(1).to(tl.int64) * chunk + query) * chunk
        tl.store(d_bias + own + (query - key), total, mask=key <= query)
        for begin in range(query + 1, chunk, WIDTH):
            tl.store(d_bias + own + begin + key, tl.zeros((WIDTH,), tl.float32), mask=begin + key < chunk)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    numbers: Tensor | None = None,
) -> Tensor:
    """`softmax(scale q k^T + bias) v` over the keys up to each query, of its own document.

    q and k are (B, K, [H,] C, Z) in any floating dtype, v (B, K, [H,] C, E) in bf16 or fp16 (in fp32 matrix products
    are slow), the bias (2C - 1,) and the scale as in `chunk_attention`; `numbers` (B, K, C) do not decrease in a chunk
    and are equal in a document, none where a chunk is one. Queries and keys are rounded to the dtype of v, as fused
    attention does. Scores, softmax and the gradients of weights are fp32; weights and the gradients of scores are
    multiplied in the dtype of v. Differentiable once.
    """
    if device_kind(v) != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"impl='triton' needs a GPU and v is on {v.device}: use impl='causal', or 'sdpa' for documents"
        )
    if v.dtype == torch.float64:
        raise ValueError("impl='triton' computes in fp32 and v is in fp64: use impl='causal', or 'sdpa' for documents")
    with without_autocast(q.device):
        heads = v.shape[2] if v.dim() == 5 else 1
        q, k = (t.to(v.dtype).flatten(0, -3) for t in (q, k))
        since = None
        if numbers is not None:
            # The place in its chunk where each token's document begins.
            numbers = numbers.flatten(0, 1)
            begins = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
            places = torch.arange(numbers.shape[1], device=numbers.device)
            since = torch.where(begins, places, 0).cummax(1).values.int().repeat_interleave(heads, 0)
        bias = None if bias is None else bias.float().contiguous()
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return _TritonAttention.apply(q, k, v.flatten(0, -3), bias, scale, since).view(v.shape)


def _blocks(chunk: int) -> Iterator[tuple[slice, int]]:
    """Queries of each block, and the number of keys that they meet."""
    size = max(chunk // _BLOCKS, _LEAST_BLOCK)
    for begin in range(0, chunk, size):
        end = min(begin + size, chunk)
        yield slice(begin, end), end


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Product of half-precision matrices in fp32, which CPUs (where kernels are interpreted) lack."""
    return torch.bmm(a, b, out_dtype=torch.float32) if device_kind(a) == "cuda" else torch.bmm(a.float(), b.float())


def softmax_constants(keys: int) -> dict[str, int]:
    """What kernels are compiled with for a block that meets so many keys."""
    width = 1 << (keys - 1).bit_length()
    return {"WIDTH": width, "num_warps": min(max(width // 512, 1), 16)}


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, since: Tensor | None
    ) -> Tensor:
        """q, k (G, C, Z), v (G, C, E), bias (2C - 1,), since (G, C)."""
        groups, chunk, ctx.scale = *q.shape[:2], scale
        out, weights = torch.empty_like(v), v.new_empty(groups, chunk, chunk)
        for rows, keys in _blocks(chunk):
            scores = _wide_product(q[:, rows], k[:, :keys].mT)
            launch(
                weights_kernel, (scores.shape[1], groups),
                scores, bias, since, weights, rows.start, keys, chunk, scale,
                BIAS=bias is not None, DOCUMENTS=since is not None, **softmax_constants(keys),
            )  # fmt: skip
            # Not written into `out` by the product itself, whose result selective checkpointing could then not keep.
            out[:, rows] = torch.bmm(weights[:, rows, :keys], v[:, :keys])
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        (groups, chunk), biased = q.shape[:2], ctx.needs_input_grad[3]
        blocks = list(_blocks(chunk))
        splits = min(groups, -(-_PROGRAMS // blocks[0][1]))
        d_bias = q.new_empty(splits, chunk, chunk, dtype=torch.float32) if biased else None
        d_scores, d_q, d_k, d_v = (torch.empty_like(t) for t in (weights, q, k, v))
        for rows, keys in blocks:
            d_weights = _wide_product(d_out[:, rows], v[:, :keys].mT)
            launch(
                scores_gradient_kernel, (d_weights.shape[1], splits),
                d_weights, weights, d_scores, d_bias, rows.start, keys, chunk, groups,
                BIAS=biased, **softmax_constants(keys),
            )  # fmt: skip
            torch.bmm(d_scores[:, rows, :keys], k[:, :keys], out=d_q[:, rows])
        # A block of keys is seen from its first token on: one product sums over all of its queries.
        for own, _ in blocks:
            queries = slice(own.start, chunk)
            torch.bmm(d_scores[:, queries, own].mT, q[:, queries], out=d_k[:, own])
            torch.bmm(weights[:, queries, own].mT, d_out[:, queries], out=d_v[:, own])
        if d_bias is not None:
            by_distance = d_bias.sum((0, 1)).flip(0)
            d_bias = torch.cat([by_distance, by_distance.new_zeros(chunk - 1)])
        return d_q.mul_(ctx.scale), d_k.mul_(ctx.scale), d_v, d_bias, None, None
