"""Single-head attention of chunks of tokens to themselves: the reference, and faster forms of the same.

* eager: scores, bias, activation, masks and values written out. The reference, and the only form of laplace and relu2.
* sdpa: softmax by `scaled_dot_product_attention`, the positional bias passed as its mask.
* causal: softmax in blocks of queries, each of which meets only the keys up to its end. A masked product over a whole
  chunk computes twice what is seen; in n blocks a share of (n + 1) / 2n is left, in products that are still large. The
  weights are saved for the backward pass: half a chunk's width a token, little beside a block's other activations.
* triton: the same on a GPU in half precision, with documents (`attention_triton`).

Positional biases are functions of the distance alone, so that one vector holds a whole Toeplitz matrix.

Legend: B batch, K chunks, I queries, J keys, C chunk, Z width of queries and keys, E width of values, c queries of a
block, G chunks of all rows, M centre of a table of biases.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.modes import any_length, in_memory, once_differentiable, traced, without_autocast, written_out

ACTIVATIONS = ("softmax", "laplace", "relu2")
IMPLEMENTATIONS = ("auto", "eager", "sdpa", "causal", "triton")
# Queries of a block of the causal form; on a GPU products have to be larger.
_CPU_BLOCK, _GPU_BLOCK = 128, 512


@dataclass(frozen=True)
class ChunkDocuments:
    """Which document each key of a chunk is of; make it with `of`, once for all layers.

    Args:
        numbers: (B, K, J) int64: keys see each other where their numbers are equal.
        several: (M,) int64: the chunks, counted as b * K + k, that hold more than one document.
        single: (B K - M,) int64: the others.
        order: (B K,) int64: where each chunk stands when those of `single` come before those of `several`.
    """

    numbers: Tensor
    several: Tensor
    single: Tensor
    order: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> "ChunkDocuments":
        """Sort chunks by whether they need a mask (a GPU waits). Under a compiler or a tracer all get one."""
        if not in_memory(numbers):
            every = torch.arange(numbers.shape[0] * numbers.shape[1], device=numbers.device)
            return cls(numbers, every, every[:0], every)
        mixed = (numbers != numbers[..., :1]).any(-1).flatten()
        order = mixed.to(torch.uint8).argsort(stable=True)
        single, several = order.tensor_split([int((~mixed).sum())])
        return cls(numbers, several, single, order.argsort())

    def of_several(self) -> "ChunkDocuments":
        """Those chunks alone that hold several documents, as one row: numbers (1, M, J)."""
        every = torch.arange(len(self.several), device=self.several.device)
        return ChunkDocuments(self.numbers.flatten(0, 1)[self.several][None], every, every[:0], every)

    def same(self, queries: int, offset: int) -> Tensor:
        """Whether each query, the first being key `offset`, is of the document of each key: (B, K, I, J) bool."""
        return self.numbers[..., offset : offset + queries, None] == self.numbers[..., None, :]


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
        q: (B, K, I, Z), any floating dtype.
        k: (B, K, J, Z).
        v: (B, K, J, E).
        bias: (I + J - 1,), or (B, I + J - 1) with an offset for every row: its entry m belongs to key minus query
            `m - (I - 1) - offset` (see `key_minus_query`).
        activation: softmax, laplace or relu2.
        causal: whether query i sees keys up to `i + offset` only.
        offset: keys that precede the first query, tokens: one number, or (B,) int64, one for every row.
        key_mask: (B, K, J) bool, true for valid keys. A softmax chunk without any valid key attends as if unmasked.
        dropout: probability of dropping a weight, or a function of weights (B, K, I, J) that drops some; eager only.
        return_weights: whether to return the weights; eager only.
        documents: of keys, numbers (B, K, J): a query sees those of its own document only, query i being key
            `offset + i` (one number for all rows); none where chunks hold one document each.
        impl: auto, eager (the reference), sdpa (softmax), causal (softmax without masks, documents or dropout, as many
            queries as keys, half the work of a masked product), or triton (the same with documents, for half precision
            on a GPU). auto takes the last that serves; triton outside torch.compile and on a compute capability of 8 or
            newer only.

    Returns:
        (B, K, I, E) in the dtype of v, and the weights before dropout (B, K, I, J) or none.

    Raises:
        ValueError: a shape does not fit, or the implementation lacks what is asked for.
    """
    _check(q, k, bias, activation, offset, key_mask, documents, impl)
    if documents is not None and not documents.several.numel():
        documents = None
    fused = activation == "softmax" and not return_weights and not callable(dropout)
    whole = causal and q.shape[2] == k.shape[2] and isinstance(offset, int) and offset == 0
    whole = whole and fused and key_mask is None and dropout == 0
    plain = whole and documents is None
    if (impl == "causal" and not plain) or (impl == "triton" and not whole):
        raise ValueError(
            f"impl={impl!r} is softmax over the keys up to each query alone, without offset, masks, "
            f"{'documents, ' if impl == 'causal' else ''}dropout or weights to return: use impl='sdpa' or 'eager'"
        )
    if impl == "auto":
        kernels = whole and _suits_triton(v)
        # Python counts blocks of queries, and one chunk may be of a length that a compiler leaves open.
        blocks = plain and not any_length() and not (torch.compiler.is_compiling() and k.shape[1] == 1)
        impl = "triton" if kernels else "causal" if blocks else "sdpa" if fused else "eager"
    if impl == "sdpa" and (activation != "softmax" or return_weights or callable(dropout)):
        raise ValueError(
            f"impl='sdpa' has neither weights to return or to drop by a function, nor activation={activation!r}: "
            "use impl='eager'"
        )

    if impl == "causal":
        return causal_attention(q, k, v, bias, _GPU_BLOCK if q.is_cuda else _CPU_BLOCK), None
    if impl == "triton":
        # Not before it is needed: triton may not be installed.
        from mega_scale.ops.attention_triton import triton_attention  # noqa: PLC0415

        return triton_attention(q, k, v, bias, None if documents is None else documents.numbers), None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, documents: ChunkDocuments | None
    ) -> tuple[Tensor, Tensor | None]:
        reference = partial(_reference_attention, activation=activation, dropout=dropout)
        form = reference if callable(dropout) or impl == "eager" else partial(_fused_attention, dropout=dropout)
        return form(q, k, v, bias, causal=causal, offset=offset, key_mask=key_mask, documents=documents)

    if documents is not None and documents.single.numel() and not return_weights and not callable(dropout):
        return _attend_apart(q, k, v, key_mask, documents, attend), None
    out, weights = attend(q, k, v, key_mask, documents)
    return out, weights if return_weights else None


def _check(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    activation: str,
    offset: int | Tensor,
    key_mask: Tensor | None,
    documents: ChunkDocuments | None,
    impl: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: choose one of {', '.join(ACTIVATIONS)}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    expected = (*((q.shape[0],) if isinstance(offset, Tensor) else ()), q.shape[2] + k.shape[2] - 1)
    if bias.shape != expected:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}: {q.shape[2]} queries and {k.shape[2]} keys need {expected}"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:3]):
        raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}: expected bool {tuple(k.shape[:3])}")
    if documents is not None and (documents.numbers.shape != k.shape[:3] or isinstance(offset, Tensor)):
        raise ValueError(
            f"documents have numbers of shape {tuple(documents.numbers.shape)} and an offset of type "
            f"{type(offset).__name__}: expected {tuple(k.shape[:3])} and one offset for all rows"
        )


def _suits_triton(v: Tensor) -> bool:
    """Whether `auto` takes the Triton kernels; asks for the cheapest first."""
    return (
        v.is_cuda
        and v.dtype in (torch.bfloat16, torch.float16)
        and in_memory(v)
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(v.device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


_Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, ChunkDocuments | None], tuple[Tensor, Tensor | None]]


def _attend_apart(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, documents: ChunkDocuments, attend: _Attend
) -> Tensor:
    """Attend with a mask of their own in chunks of several documents, which alone pay for it, and without in others.

    Args:
        q: (B, K, I, Z).
        k: (B, K, J, Z).
        v: (B, K, J, E).
        key_mask: (B, K, J) bool, or none.
        documents: of the keys; some chunks hold one and some several.
        attend: q, k, v, key_mask and documents to the output, and weights that are not used.

    Returns:
        (B, K, I, E).
    """
    flat = [None if t is None else t.flatten(0, 1) for t in (q, k, v, key_mask)]

    def some(chunks: Tensor, documents: ChunkDocuments | None) -> Tensor:
        q, k, v, key_mask = (None if t is None else t[chunks][None] for t in flat)
        assert q is not None and k is not None and v is not None
        return attend(q, k, v, key_mask, documents)[0][0]

    parts = [some(documents.single, None), some(documents.several, documents.of_several())]
    return torch.cat(parts)[documents.order].view(*q.shape[:3], v.shape[-1])


def laplace(x: Tensor) -> Tensor:
    """The cumulative normal distribution that approximates relu2 (arXiv 2209.10655, equation 12)."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def relu2(x: Tensor) -> Tensor:
    """The squared ReLU (arXiv 2109.08668)."""
    return torch.relu(x).square()


def _visible_keys(
    queries: int,
    keys: int,
    causal: bool,
    offset: int | Tensor,
    key_mask: Tensor | None,
    device: torch.device,
    documents: ChunkDocuments | None = None,
) -> Tensor | None:
    """Which keys each query sees: broadcastable to (B, K, I, J) bool; none when it sees all."""
    visible = None
    if causal:
        last = torch.arange(queries, device=device)[:, None] + _per_row(offset)
        visible = torch.arange(keys, device=device) <= last
    if key_mask is not None:
        visible = key_mask.unsqueeze(-2) if visible is None else visible & key_mask.unsqueeze(-2)
    if documents is not None:
        assert isinstance(offset, int)
        same = documents.same(queries, offset)
        visible = same if visible is None else visible & same
    return visible


def _bias_matrix(bias: Tensor, queries: int) -> Tensor:
    """The bias of every query and key: (I + J - 1,) to (I, J), or (B, I + J - 1) to (B, 1, I, J)."""
    matrix = toeplitz(bias, queries)
    return matrix if bias.dim() == 1 else matrix.unsqueeze(1)


def _per_row(offset: int | Tensor) -> int | Tensor:
    return offset[:, None, None, None] if isinstance(offset, Tensor) else offset


def _open_empty_chunks(key_mask: Tensor | None) -> Tensor | None:
    """The mask with chunks that have no valid key opened, as the softmax of HF 4.37.2 treats them."""
    return None if key_mask is None else key_mask | ~key_mask.any(-1, keepdim=True)


def _reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    activation: str,
    causal: bool,
    offset: int | Tensor,
    key_mask: Tensor | None,
    dropout: float | Callable[[Tensor], Tensor],
    documents: ChunkDocuments | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, K, I, E) and weights (B, K, I, J); arguments as in `chunk_attention`. Scores and weights are fp32."""
    queries, keys = q.shape[2], k.shape[2]
    with without_autocast(q.device):
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2)
        matrix = _bias_matrix(bias.to(dtype), queries)
        if activation == "softmax":
            visible = _visible_keys(queries, keys, causal, offset, _open_empty_chunks(key_mask), q.device, documents)
            scores = scores * q.shape[-1] ** -0.5 + matrix
            if visible is not None:
                scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
            weights = scores.softmax(-1)
        else:
            visible = _visible_keys(queries, keys, causal, offset, key_mask, q.device, documents)
            if documents is not None:
                # n is of the query's document alone; a causal one is a position, which does not depend on masks.
                counted = _visible_keys(
                    queries, keys, causal, offset, None if causal else key_mask, q.device, documents
                )
                assert counted is not None
                count = counted.sum(-1, keepdim=True).clamp(min=1).to(dtype)
            elif causal:
                count = torch.arange(1, queries + 1, device=q.device, dtype=dtype)[:, None] + _per_row(offset)
                # Padding before a row's first token has no position; it is masked, but must stay finite.
                count = count.clamp(min=1) if isinstance(offset, Tensor) else count
            elif key_mask is not None:
                count = key_mask.sum(-1).clamp(min=1)[..., None, None].to(dtype)
            else:
                count = torch.tensor(float(keys), device=q.device, dtype=dtype)
            weights = {"laplace": laplace, "relu2": relu2}[activation](scores / count + matrix)
        if visible is not None:
            weights = weights.masked_fill(~visible, 0.0)
        weights = weights.to(v.dtype)
        kept = dropout(weights) if callable(dropout) else F.dropout(weights, dropout, dropout > 0)
        return kept @ v, weights


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    causal: bool,
    offset: int | Tensor,
    key_mask: Tensor | None,
    dropout: float,
    documents: ChunkDocuments | None = None,
) -> tuple[Tensor, None]:
    """Output (B, K, I, E), and no weights; arguments as in `chunk_attention`. A query that sees no key gets zeros."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    mask = _bias_matrix(bias.to(q.dtype), q.shape[2])
    if isinstance(offset, int) and offset + 1 >= k.shape[2]:
        causal = False  # already the first query sees every key, as in a decoding step
    visible = _visible_keys(q.shape[2], k.shape[2], causal, offset, _open_empty_chunks(key_mask), q.device, documents)
    if visible is not None:
        mask = mask.masked_fill(~visible, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, block: int = _CPU_BLOCK) -> Tensor:
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


def _query_blocks(chunk: int, size: int) -> Iterator[tuple[slice, int]]:
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
        for rows, end in _query_blocks(chunk, block):
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
        for (rows, end), weights in reversed(list(zip(_query_blocks(chunk, ctx.block), kept, strict=True))):
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


def key_minus_query(queries: int, keys: int, offset: int | Tensor, device: torch.device | str) -> Tensor:
    """The distances j - (i + offset) that occur between I queries and J keys, ascending: int64, (I + J - 1,).

    With an offset for every row, (B,), they are (B, I + J - 1).
    """
    distances = torch.arange(-(queries - 1), keys, device=device)
    return distances - (offset[:, None] if isinstance(offset, Tensor) else offset)


def toeplitz(vector: Tensor, queries: int) -> Tensor:
    """The matrix whose entry (i, j) is `vector[I - 1 + j - i]`: (..., I + J - 1) to (..., I, J)."""
    if queries == 1 and not traced():  # a decoding step; a size that grows with it would make a compiled graph its own
        return vector.unsqueeze(-2)
    matrix: Tensor = _rows(vector, queries) if traced() else _Toeplitz.apply(vector, queries)
    return matrix


def _rows(vector: Tensor, queries: int) -> Tensor:
    if written_out():  # unfold takes no size that a compiler leaves open
        places = torch.arange(vector.shape[-1] - queries + 1, device=vector.device)
        return vector[..., places + torch.arange(queries, device=vector.device).flip(0)[:, None]]
    return vector.unfold(-1, vector.shape[-1] - queries + 1, 1).flip(-2)


class _Toeplitz(torch.autograd.Function):
    """PyTorch's own backward of `unfold` takes a GPU as long as a matrix product."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, queries: int) -> Tensor:
        return _rows(vector, queries)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sums of diagonals: with I zeros behind each row, read in rows one shorter, a diagonal is a column."""
        queries, keys = gradient.shape[-2:]
        rows = F.pad(gradient.flip(-2), (0, queries)).flatten(-2)
        return rows[..., : queries * (queries + keys - 1)].unflatten(-1, (queries, -1)).sum(-2), None


def rotary_bias(alpha: Tensor, beta: Tensor, distances: Tensor) -> Tensor:
    """The rotary bias of Mega, an additive function of the distance (arXiv 2209.10655, section 3.3; HF 4.37.2).

    `sum_k (a1 b1 + a2 b2)_k cos(d theta_k) + (a1 b2 - a2 b1)_k sin(d theta_k)`, with d = i - j, the halves 1 and 2 of
    alpha and beta, and `theta_k = 10000^(-k / (Z / 2))`.

    Args:
        alpha: (1, Z) or (Z,), Z even; so is `beta`.
        beta: like alpha.
        distances: j - i, int64 of any shape.

    Returns:
        In the shape of `distances`: fp32, or fp64 for fp64 parameters.
    """
    dtype = torch.promote_types(alpha.dtype, torch.float32)
    with without_autocast(alpha.device):
        a1, a2 = alpha.to(dtype).reshape(-1).chunk(2)
        b1, b2 = beta.to(dtype).reshape(-1).chunk(2)
        half = a1.shape[0]
        theta = 10000.0 ** (-torch.arange(half, device=alpha.device, dtype=dtype) / half)
        angles = -distances.to(dtype)[..., None] * theta
        return angles.cos() @ (a1 * b1 + a2 * b2) + angles.sin() @ (a1 * b2 - a2 * b1)


def simple_bias(table: Tensor, centre: int, distances: Tensor) -> Tensor:
    """The learned bias `table[M - 1 + j - i]`; a distance beyond the table has the bias at its end.

    Args:
        table: (2 max_positions - 1,).
        centre: M, tokens: the chunk in a chunked model, max_positions otherwise.
        distances: j - i, int64 of any shape.

    Returns:
        In the shape of `distances`, in the dtype of the table, at least fp32.
    """
    places = (distances + (centre - 1)).clamp(0, table.shape[0] - 1)
    return table.to(torch.promote_types(table.dtype, torch.float32))[places]
