"""Single-head attention of chunks of tokens to themselves: the reference, and faster forms of the same.

* eager: scores, bias, activation, masks and values written out. The reference, and the only form of laplace and relu2.
* sdpa: softmax by `scaled_dot_product_attention`, the positional bias passed as its mask.
* causal: softmax in blocks of queries, each of which meets only the keys up to its end. A masked product over a whole
  chunk computes twice what is seen; in n blocks a share of (n + 1) / 2n is left, in products that are still large. The
  weights are saved for the backward pass: half a chunk's width a token, little beside a block's other activations.
* triton: the same on a GPU in half precision, with documents (`attention_triton`).

Positional biases are functions of the distance alone, so that one vector holds a whole Toeplitz matrix.

Legend: B batch, K chunks, I queries, J keys, C chunk, Z width of queries and keys, E width of values, c queries of a
block, G chunks of all rows.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import ANY_LENGTH, in_memory, once_differentiable, runs_triton, tracing, without_autocast

ACTIVATIONS = ("softmax", "laplace", "relu2")
IMPLEMENTATIONS = ("auto", "eager", "sdpa", "causal", "triton")
# Queries of a block of the causal form; on a GPU products have to be larger.
_CPU_BLOCK, _GPU_BLOCK = 128, 512


class ChunkDocuments(NamedTuple):
    """Which document each key of a chunk is of; make it with `of`, once for all layers. All are int64."""

    numbers: Tensor  # (B, K, J): keys see each other where these are equal
    several: Tensor  # (M,): the chunks, counted as b * K + k, that hold more than one document
    single: Tensor  # (B K - M,): the others
    order: Tensor  # (B K,): where each chunk stands when those of `single` come before those of `several`

    @classmethod
    def of(cls, numbers: Tensor) -> "ChunkDocuments":
        """Sort chunks by whether they need a mask (a GPU waits). Under a compiler or a tracer all get one."""
        if not in_memory(numbers):
            return cls.all_several(numbers)
        mixed = (numbers != numbers[..., :1]).any(-1).flatten()
        order = mixed.to(torch.uint8).argsort(stable=True)
        single, several = order.tensor_split([int((~mixed).sum())])
        return cls(numbers, several, single, order.argsort())

    @classmethod
    def all_several(cls, numbers: Tensor) -> "ChunkDocuments":
        """Give every chunk a mask."""
        every = torch.arange(numbers.shape[0] * numbers.shape[1], device=numbers.device)
        return cls(numbers, every, every[:0], every)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    activation: str = "softmax",
    causal: bool = False,
    offset: int | Tensor = 0,
    key_mask: Tensor | None = None,
    dropout: float | Callable[[Tensor], Tensor] = 0.0,
    return_weights: bool = False,
    documents: ChunkDocuments | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention of every chunk to itself (arXiv 2209.10655, equations 16 to 19, and section 3.4).

    softmax: `softmax(q k^T Z^-1/2 + bias)`; laplace and relu2: `f(q k^T / n + bias)`, n the query's position in the
    chunk plus one when causal, else the chunk's number of valid keys, at least one. With `documents`, n counts keys of
    the query's document only.

    Args:
        q: (B, K, I, Z), any floating dtype; k is (B, K, J, Z), v (B, K, J, E).
        bias: (I + J - 1,), or (B, I + J - 1) with an offset for every row: its entry m belongs to key minus query
            `m - (I - 1) - offset`.
        causal: whether query i sees keys up to `i + offset` only.
        offset: keys that precede the first query, tokens: one number, or (B,) int64, one for every row.
        key_mask: (B, K, J) bool, true for valid keys. A softmax chunk without any valid key attends as if unmasked.
        dropout: probability of dropping a weight, or a function of weights (B, K, I, J) that drops some; eager only.
        return_weights: eager only.
        documents: of keys, numbers (B, K, J): a query sees those of its own document only, query i being key
            `offset + i` (one number for all rows); none where chunks hold one document each.
        impl: eager, sdpa, causal (without masks, documents or dropout, as many queries as keys), triton (the same with
            documents), or auto: the last that serves, triton outside torch.compile and on a compute capability of 8 or
            newer only.

    Returns (B, K, I, E) in the dtype of v, and the weights before dropout (B, K, I, J) or none. Raises ValueError where
    a shape does not fit, or the implementation lacks what is asked for.
    """
    for name, choice, allowed in (("activation", activation, ACTIVATIONS), ("impl", impl, IMPLEMENTATIONS)):
        if choice not in allowed:
            raise ValueError(f"{name}={choice!r} is unknown: choose one of {', '.join(allowed)}")
    queries, keys, by_row = q.shape[2], k.shape[2], isinstance(offset, Tensor)
    expected = (*q.shape[:1], queries + keys - 1) if by_row else (queries + keys - 1,)
    if bias.shape != expected:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: {queries} queries and {keys} keys need {expected}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:3]):
        raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}: expected bool {tuple(k.shape[:3])}")
    if documents is not None and (by_row or documents.numbers.shape != k.shape[:3]):
        raise ValueError(
            f"documents have numbers of shape {tuple(documents.numbers.shape)} and an offset of type "
            f"{type(offset).__name__}: expected {tuple(k.shape[:3])} and one offset for all rows"
        )
    if documents is not None and not documents.several.numel():
        documents = None
    fused = activation == "softmax" and not return_weights and not callable(dropout)
    whole = causal and queries == keys and isinstance(offset, int) and offset == 0
    whole = whole and fused and key_mask is None and dropout == 0
    if (impl == "causal" and not (whole and documents is None)) or (impl == "triton" and not whole):
        raise ValueError(
            f"impl={impl!r} is softmax over the keys up to each query alone, without offset, masks, "
            f"{'documents, ' if impl == 'causal' else ''}dropout or weights to return: use impl='sdpa' or 'eager'"
        )
    if impl == "sdpa" and not fused:
        raise ValueError(
            f"impl='sdpa' has neither weights to return or to drop by a function, nor activation={activation!r}: "
            "use impl='eager'"
        )
    if impl == "auto":
        # Python counts blocks of queries, and one chunk may be of a length that a compiler leaves open.
        any_length = tracing() in ANY_LENGTH or (k.shape[1] == 1 and torch.compiler.is_compiling())
        kernels = whole and v.dtype in (torch.bfloat16, torch.float16) and runs_triton(v)
        blocks = whole and documents is None and not any_length
        impl = "triton" if kernels else "causal" if blocks else "sdpa" if fused else "eager"

    if impl == "causal":
        return causal_attention(q, k, v, bias, _GPU_BLOCK if q.is_cuda else _CPU_BLOCK), None
    if impl == "triton":
        # Not before it is needed: triton may not be installed.
        from mega_scale.ops.attention_triton import triton_attention  # noqa: PLC0415

        return triton_attention(q, k, v, bias, None if documents is None else documents.numbers), None

    rules: dict[str, Any] = {"activation": activation, "causal": causal, "offset": offset, "dropout": dropout}
    rules["eager"] = impl == "eager"
    if documents is None or not documents.single.numel() or return_weights or callable(dropout):
        out, weights = _masked_attention(q, k, v, bias, key_mask, documents, **rules)
        return out, weights if return_weights else None
    # Chunks of several documents attend with a mask of their own, for which alone they pay; the others without.
    flat = [None if t is None else t.flatten(0, 1) for t in (q, k, v, key_mask)]
    parts = []
    mixed = ChunkDocuments.all_several(documents.numbers.flatten(0, 1)[documents.several][None])
    for chunks, own in ((documents.single, None), (documents.several, mixed)):
        of_q, of_k, of_v, mask = (None if t is None else t[chunks][None] for t in flat)
        assert of_q is not None and of_k is not None and of_v is not None
        parts.append(_masked_attention(of_q, of_k, of_v, bias, mask, own, **rules)[0][0])
    return torch.cat(parts)[documents.order].view(*q.shape[:3], v.shape[-1]), None


def _masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    key_mask: Tensor | None,
    documents: ChunkDocuments | None,
    *,
    activation: str,
    causal: bool,
    offset: Any,
    dropout: Any,
    eager: bool,
) -> tuple[Tensor, Tensor | None]:
    """The eager form, which also returns weights (B, K, I, J), or `scaled_dot_product_attention`."""
    queries, keys = q.shape[2], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32) if eager else v.dtype
    q, k, matrix = q.to(dtype), k.to(dtype), toeplitz(bias.to(dtype), queries)
    matrix = matrix if bias.dim() == 1 else matrix.unsqueeze(1)  # (I, J) or (B, 1, I, J)
    before = offset[:, None, None, None] if isinstance(offset, Tensor) else offset
    # Which keys a query sees, broadcastable to (B, K, I, J); none: all, as in a decoding step.
    reach = None
    if causal and (eager or not (isinstance(offset, int) and offset + 1 >= keys)):
        last = torch.arange(queries, device=q.device)[:, None] + before
        reach = torch.arange(keys, device=q.device) <= last
    if documents is not None:
        numbers = documents.numbers
        same = numbers[..., offset : offset + queries, None] == numbers[..., None, :]
        reach = same if reach is None else reach & same
    visible = reach
    if key_mask is not None:
        if activation == "softmax":
            key_mask = key_mask | ~key_mask.any(-1, keepdim=True)  # as HF 4.37.2 treats chunks without a valid key
        visible = key_mask.unsqueeze(-2) if reach is None else reach & key_mask.unsqueeze(-2)
    if not eager:
        mask = matrix if visible is None else matrix.masked_fill(~visible, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None

    with without_autocast(q.device):
        scores = q @ k.transpose(-1, -2)
        if activation == "softmax":
            scores = scores * q.shape[-1] ** -0.5 + matrix
            if visible is not None:
                scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
            weights = scores.softmax(-1)
        else:
            if documents is not None:
                # n is of the query's document alone; a causal one is a position, which does not depend on masks.
                counted = reach if causal else visible
                assert counted is not None
                count = counted.sum(-1, keepdim=True).clamp(min=1).to(dtype)
            elif causal:
                count = torch.arange(1, queries + 1, device=q.device, dtype=dtype)[:, None] + before
                # Padding before a row's first token has no position; it is masked, but must stay finite.
                count = count.clamp(min=1) if isinstance(offset, Tensor) else count
            elif key_mask is not None:
                count = key_mask.sum(-1).clamp(min=1)[..., None, None].to(dtype)
            else:
                count = torch.tensor(float(keys), device=q.device, dtype=dtype)
            scores = scores / count + matrix
            if activation == "relu2":
                weights = torch.relu(scores).square()  # arXiv 2109.08668
            else:  # the cumulative normal distribution that approximates it (arXiv 2209.10655, equation 12)
                weights = 0.5 * (1.0 + torch.erf((scores - 0.707107) / (0.282095 * math.sqrt(2.0))))
        if visible is not None:
            weights = weights.masked_fill(~visible, 0.0)
        weights = weights.to(v.dtype)
        kept = dropout(weights) if callable(dropout) else F.dropout(weights, dropout, dropout > 0)
        return kept @ v, weights


def causal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, block: int = _CPU_BLOCK) -> Tensor:
    """`softmax(q k^T Z^-1/2 + bias) v` over the keys up to each query, `block` queries at a time; differentiable once.

    q and k are (B, K, C, Z) in any floating dtype, v and the result (B, K, C, E), the bias (2C - 1,) as in
    `chunk_attention`. Scores and the gradients of queries and keys are computed in fp32; products with values, which
    are the widest, in the dtype of v.
    """
    with without_autocast(q.device):
        dtype = torch.promote_types(v.dtype, torch.float32)
        q, k = (t.to(dtype).flatten(0, 1) for t in (q, k))
        return _CausalAttention.apply(q, k, v.flatten(0, 1), bias.to(dtype), block).view(v.shape)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, block: int) -> Tensor:
        """q, k (G, C, Z), v (G, C, E), bias (2C - 1,)."""
        ctx.block, scale, chunk = block, q.shape[-1] ** -0.5, q.shape[1]
        matrix = bias.unfold(0, chunk, 1).flip(0)
        future = torch.full((block, block), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        out, kept = torch.empty_like(v), []
        for begin in range(0, chunk, block):
            end = min(begin + block, chunk)
            start = matrix[begin:end, :end].clone()
            start[:, begin:] += future[: end - begin, : end - begin]
            scores = torch.baddbmm(start.expand(len(q), -1, -1), q[:, begin:end], k[:, :end].mT, alpha=scale)
            weights = scores.softmax(-1).to(v.dtype)
            # Not written into `out` by the product itself, whose result selective checkpointing could then not keep.
            out[:, begin:end] = weights @ v[:, :end]
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
        for index in reversed(range(len(kept))):
            weights, begin = kept[index], index * ctx.block
            end = min(begin + ctx.block, chunk)
            own, d_out = q[:, begin:end], gradient[:, begin:end]
            d_weights = (d_out @ v[:, :end].mT).to(q.dtype)
            d_scores = torch._softmax_backward_data(d_weights, weights.to(q.dtype), -1, q.dtype)
            d_matrix[begin:end, :end] = d_scores.sum(0)
            torch.mul(d_scores, scale, out=d_scores)
            torch.bmm(d_scores, k[:, :end], out=d_q[:, begin:end])
            if end == chunk:
                torch.bmm(d_scores.mT, own, out=d_k)
                torch.bmm(weights.mT, d_out, out=d_v)
            else:
                d_k[:, :end].baddbmm_(d_scores.mT, own)
                d_v[:, :end].baddbmm_(weights.mT, d_out)
        return d_q, d_k, d_v, _by_distance(d_matrix), None


def toeplitz(vector: Tensor, queries: int) -> Tensor:
    """The matrix whose entry (i, j) is `vector[I - 1 + j - i]`: (..., I + J - 1) to (..., I, J)."""
    if tracing() == "trace":
        return _Toeplitz.forward(None, vector, queries)
    if queries == 1:  # a decoding step; a size that grows with it would make a compiled graph its own
        return vector.unsqueeze(-2)
    matrix: Tensor = _Toeplitz.apply(vector, queries)
    return matrix


class _Toeplitz(torch.autograd.Function):
    """PyTorch's own backward of `unfold` takes a GPU as long as a matrix product."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, queries: int) -> Tensor:
        if tracing():  # unfold takes no size that a compiler leaves open
            places = torch.arange(vector.shape[-1] - queries + 1, device=vector.device)
            return vector[..., places + torch.arange(queries, device=vector.device).flip(0)[:, None]]
        return vector.unfold(-1, vector.shape[-1] - queries + 1, 1).flip(-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _by_distance(gradient), None


def _by_distance(matrix: Tensor) -> Tensor:
    """Sums of diagonals: with I zeros behind each row, read in rows one shorter, a diagonal is a column."""
    queries, keys = matrix.shape[-2:]
    rows = F.pad(matrix.flip(-2), (0, queries)).flatten(-2)
    return rows[..., : queries * (queries + keys - 1)].unflatten(-1, (queries, -1)).sum(-2)
