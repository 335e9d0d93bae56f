"""Causal softmax attention of whole chunks in blocks of queries, each of which meets only the keys up to its end.

A masked product over a whole chunk computes twice what is seen. In n blocks a share of (n + 1) / 2n is left, in matrix
products that are still large. The weights of those blocks are kept for the backward pass: of the width of half a chunk
a token, they are small beside a block's other activations.

Legend: G chunks of all sequences, C chunk, Z width of queries and keys, E width of values, c queries in a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops.attention.bias import toeplitz
from mega_scale.ops.modes import once_differentiable, without_autocast

_BLOCK = 128


def causal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, block: int = _BLOCK) -> Tensor:
    """`softmax(q k^T Z^-1/2 + bias) v` over the keys up to each query.

    Scores and the gradients of queries and keys are computed in fp32; products with values, which are the widest, in
    the dtype of v.

    Args:
        q: (B, K, C, Z), any floating dtype.
        k: (B, K, C, Z).
        v: (B, K, C, E).
        bias: (2C - 1,), as in `chunk_attention`.
        block: c.

    Returns:
        (B, K, C, E) in the dtype of v; it can be differentiated once.
    """
    with without_autocast(q.device):
        dtype = torch.promote_types(v.dtype, torch.float32)
        matrix = toeplitz(bias.to(dtype), q.shape[2])
        q, k = (t.to(dtype).flatten(0, 1) for t in (q, k))
        return _CausalAttention.apply(q, k, v.flatten(0, 1), matrix, block).view(v.shape)


def _blocks(chunk: int, size: int) -> Iterator[tuple[slice, int]]:
    """Queries of each block, and the number of keys that they meet."""
    for begin in range(0, chunk, size):
        end = min(begin + size, chunk)
        yield slice(begin, end), end


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, block: int) -> Tensor:
        """q, k (G, C, Z), v (G, C, E), matrix (C, C)."""
        ctx.block, scale, chunk = block, q.shape[-1] ** -0.5, q.shape[1]
        future = torch.full((block, block), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        out, kept = torch.empty_like(v), []
        for rows, end in _blocks(chunk, block):
            own = rows.stop - rows.start
            start = matrix[rows, :end].clone()
            start[:, -own:] += future[:own, :own]
            scores = torch.baddbmm(start.expand(len(q), -1, -1), q[:, rows], k[:, :end].mT, alpha=scale)
            weights = scores.softmax(-1).to(v.dtype)
            # Not written into `out` by the product itself, whose result selective checkpointing could then not keep.
            out[:, rows] = weights @ v[:, :end]
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        scale, chunk = q.shape[-1] ** -0.5, q.shape[1]
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_matrix = q.new_zeros(chunk, chunk)
        # From the end: the last block, which meets every key, writes what the others add to.
        for (rows, end), weights in reversed(list(zip(_blocks(chunk, ctx.block), kept, strict=True))):
            d_out = gradient[:, rows]
            d_weights = (d_out @ v[:, :end].mT).to(q.dtype)
            wide = weights.to(q.dtype)
            d_scores = torch._softmax_backward_data(d_weights, wide, -1, q.dtype)
            d_matrix[rows, :end] = d_scores.sum(0)
            torch.mul(d_scores, scale, out=d_scores)
            torch.bmm(d_scores, k[:, :end], out=d_q[:, rows])
            if end == chunk:
                torch.bmm(d_scores.mT, q[:, rows], out=d_k)
                torch.bmm(weights.mT, d_out, out=d_v)
            else:
                d_k[:, :end].baddbmm_(d_scores.mT, q[:, rows])
                d_v[:, :end].baddbmm_(weights.mT, d_out)
        return d_q, d_k, d_v, d_matrix, None
