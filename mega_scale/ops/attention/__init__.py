"""Single-head attention inside chunks: one entry, a reference and a fused form."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mega_scale.ops.attention.bias import key_minus_query, rotary_bias, simple_bias, toeplitz
from mega_scale.ops.attention.causal import causal_attention
from mega_scale.ops.attention.documents import ChunkDocuments, attend_apart
from mega_scale.ops.attention.fused import fused_attention
from mega_scale.ops.attention.reference import ACTIVATIONS, reference_attention

IMPLEMENTATIONS = ("auto", "eager", "sdpa", "causal")


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
        impl: auto, eager (the reference), sdpa (softmax), or causal (softmax without masks or dropout, as many queries
            as keys, half the work of a masked product), which auto prefers on CPUs.

    Returns:
        (B, K, I, E) in the dtype of v, and the weights before dropout (B, K, I, J) or none.

    Raises:
        ValueError: a shape does not fit, or the implementation lacks what is asked for.
    """
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
    if documents is not None:
        if documents.numbers.shape != k.shape[:3] or isinstance(offset, Tensor):
            raise ValueError(
                f"documents have numbers of shape {tuple(documents.numbers.shape)} and an offset of type "
                f"{type(offset).__name__}: expected {tuple(k.shape[:3])} and one offset for all rows"
            )
        if not documents.several.numel():
            documents = None
    fused = activation == "softmax" and not return_weights and not callable(dropout)
    plain = causal and q.shape[2] == k.shape[2] and isinstance(offset, int) and offset == 0
    plain = plain and fused and key_mask is None and documents is None and dropout == 0
    if impl == "causal" and not plain:
        raise ValueError(
            "impl='causal' is softmax over the keys up to each query alone, without offset, masks, documents, dropout "
            "or weights to return: use impl='sdpa' or 'eager'"
        )
    if impl == "auto":
        impl = ("causal" if plain and q.device.type == "cpu" else "sdpa") if fused else "eager"
    if impl == "sdpa" and (activation != "softmax" or return_weights or callable(dropout)):
        raise ValueError(
            f"impl='sdpa' has neither weights to return or to drop by a function, nor activation={activation!r}: "
            "use impl='eager'"
        )

    if impl == "causal":
        return causal_attention(q, k, v, bias), None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, documents: ChunkDocuments | None
    ) -> tuple[Tensor, Tensor | None]:
        reference = partial(reference_attention, activation=activation, dropout=dropout)
        form = reference if callable(dropout) or impl == "eager" else partial(fused_attention, dropout=dropout)
        return form(q, k, v, bias, causal=causal, offset=offset, key_mask=key_mask, documents=documents)

    if documents is not None and documents.single.numel() and not return_weights and not callable(dropout):
        return attend_apart(q, k, v, key_mask, documents, attend), None
    out, weights = attend(q, k, v, key_mask, documents)
    return out, weights if return_weights else None


__all__ = [
    "IMPLEMENTATIONS",
    "ChunkDocuments",
    "chunk_attention",
    "key_minus_query",
    "rotary_bias",
    "simple_bias",
    "toeplitz",
]
