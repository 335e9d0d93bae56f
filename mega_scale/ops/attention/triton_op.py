"""Causal softmax attention of whole chunks in half precision: large matrix products, and a kernel for what is between.

Values of Mega are thousands of channels wide, wider than fused attention kernels hold in a multiprocessor. So products
are the vendor's, in blocks of queries that each meet only the keys up to their end; scores are in fp32, and one kernel
makes weights of them. The weights are kept for the backward pass: C numbers a token, as
many as its values or fewer.

Legend: G chunks of all sequences, C chunk, Z width of queries and keys, E width of values, J keys that a block meets.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops.attention.triton_softmax import scores_gradient_kernel, weights_kernel
from mega_scale.ops.ema.triton_kernels import interpreted
from mega_scale.ops.modes import once_differentiable, without_autocast

_LEAST_BLOCK = 128
_BLOCKS = 8
# Enough of the gradients' programs for a GPU.
_PROGRAMS = 1024


def triton_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, numbers: Tensor | None = None) -> Tensor:
    """`softmax(q k^T Z^-1/2 + bias) v` over the keys up to each query, of its own document.

    Queries and keys are rounded to the dtype of v, as fused attention does. Scores, softmax and the gradients of
    weights are fp32; weights and the gradients of scores are multiplied in the dtype of v.

    Args:
        q: (B, K, C, Z), any floating dtype.
        k: (B, K, C, Z).
        v: (B, K, C, E), bf16 or fp16; in fp32 matrix products are slow.
        bias: (2C - 1,), as in `chunk_attention`.
        numbers: (B, K, C), which do not decrease in a chunk, equal in a document; none: a chunk is one document.

    Returns:
        (B, K, C, E) in the dtype of v; it can be differentiated once.

    Raises:
        ValueError: v is not on a GPU and kernels are not interpreted, or there is no kernel for its dtype.
    """
    if not v.is_cuda and not interpreted():
        raise ValueError(
            f"impl='triton' needs a GPU and v is on {v.device}: use impl='causal', or 'sdpa' for documents"
        )
    if v.dtype == torch.float64:
        raise ValueError("impl='triton' computes in fp32 and v is in fp64: use impl='causal', or 'sdpa' for documents")
    with without_autocast(q.device):
        q, k = (t.to(v.dtype).flatten(0, 1) for t in (q, k))
        since = None if numbers is None else _first_keys(numbers.flatten(0, 1))
        return _TritonAttention.apply(q, k, v.flatten(0, 1), bias.float().contiguous(), since).view(v.shape)


def _first_keys(numbers: Tensor) -> Tensor:
    """The place in its chunk where each token's document begins: (G, C) int32."""
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    places = torch.arange(numbers.shape[1], device=numbers.device)
    return torch.where(begins, places, 0).cummax(1).values.int()


def _blocks(chunk: int) -> Iterator[tuple[slice, int]]:
    """Queries of each block, and the number of keys that they meet."""
    size = max(chunk // _BLOCKS, _LEAST_BLOCK)
    for begin in range(0, chunk, size):
        end = min(begin + size, chunk)
        yield slice(begin, end), end


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Product of half-precision matrices in fp32, which CPUs (where kernels are interpreted) lack."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def softmax_constants(keys: int) -> dict[str, int]:
    """What kernels are compiled with for a block that meets so many keys."""
    width = 1 << (keys - 1).bit_length()
    return {"WIDTH": width, "num_warps": min(max(width // 512, 1), 16)}


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, since: Tensor | None) -> Tensor:
        """q, k (G, C, Z), v (G, C, E), bias (2C - 1,), since (G, C)."""
        groups, chunk, width = q.shape
        out, weights = torch.empty_like(v), v.new_empty(groups, chunk, chunk)
        for rows, keys in _blocks(chunk):
            scores = _wide_product(q[:, rows], k[:, :keys].mT)
            with torch.cuda.device_of(q):
                weights_kernel[(scores.shape[1], groups)](
                    scores, bias, since, weights, rows.start, keys, chunk, width**-0.5, DOCUMENTS=since is not None,
                    **softmax_constants(keys),
                )  # fmt: skip
            # Not written into `out` by the product itself, whose result selective checkpointing could then not keep.
            out[:, rows] = torch.bmm(weights[:, rows, :keys], v[:, :keys])
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        (groups, chunk), scale = q.shape[:2], q.shape[-1] ** -0.5
        blocks = list(_blocks(chunk))
        splits = min(groups, -(-_PROGRAMS // blocks[0][1]))
        d_bias = q.new_empty(splits, chunk, chunk, dtype=torch.float32)
        d_scores, d_q, d_k, d_v = (torch.empty_like(t) for t in (weights, q, k, v))
        for rows, keys in blocks:
            d_weights = _wide_product(d_out[:, rows], v[:, :keys].mT)
            with torch.cuda.device_of(q):
                scores_gradient_kernel[(d_weights.shape[1], splits)](
                    d_weights, weights, d_scores, d_bias, rows.start, keys, chunk, groups, **softmax_constants(keys)
                )
            torch.bmm(d_scores[:, rows, :keys], k[:, :keys], out=d_q[:, rows])
        # A block of keys is seen from its first token on: one product sums over all of its queries.
        for own, _ in blocks:
            queries = slice(own.start, chunk)
            torch.bmm(d_scores[:, queries, own].mT, q[:, queries], out=d_k[:, own])
            torch.bmm(weights[:, queries, own].mT, d_out[:, queries], out=d_v[:, own])
        by_distance = d_bias.sum((0, 1)).flip(0)
        d_bias = torch.cat([by_distance, by_distance.new_zeros(chunk - 1)])
        return d_q.mul_(scale), d_k.mul_(scale), d_v, d_bias, None
