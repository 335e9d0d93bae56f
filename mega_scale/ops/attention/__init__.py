"""Single-head attention inside chunks: one entry, a reference and a fused form."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mega_scale.ops.attention.bias import key_minus_query, rotary_bias, simple_bias, toeplitz
from mega_scale.ops.attention.causal import causal_attention
from mega_scale.ops.attention.documents import ChunkDocuments, attend_apart
from mega_scale.ops.attention.fused import fused_attention
from mega_scale.ops.attention.reference import ACTIVATIONS, reference_attention
from mega_scale.ops.modes import any_length, in_memory

IMPLEMENTATIONS = ("auto", "eager", "sdpa", "causal", "triton")
# Queries that meet the same keys in the causal form on a GPU, where products have to be large.
_GPU_BLOCK = 512


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
        return causal_attention(q, k, v, bias, *((_GPU_BLOCK,) if q.is_cuda else ())), None
    if impl == "triton":
        # Not before it is needed: triton may not be installed.
        from mega_scale.ops.attention.triton_op import triton_attention  # noqa: PLC0415

        return triton_attention(q, k, v, bias, None if documents is None else documents.numbers), None

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


__all__ = [
    "IMPLEMENTATIONS",
    "ChunkDocuments",
    "chunk_attention",
    "key_minus_query",
    "rotary_bias",
    "simple_bias",
    "toeplitz",
]
