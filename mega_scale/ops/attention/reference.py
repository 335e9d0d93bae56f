"""Attention in chunks, written out: scores, bias, activation, masks, values.

Legend: B batch, K chunks, I queries, J keys, Z width of queries and keys, E width of values.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.attention.bias import toeplitz
from mega_scale.ops.attention.documents import ChunkDocuments
from mega_scale.ops.modes import without_autocast

ACTIVATIONS = ("softmax", "laplace", "relu2")


def laplace(x: Tensor) -> Tensor:
    """The cumulative normal distribution that approximates relu2 (arXiv 2209.10655, equation 12)."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def relu2(x: Tensor) -> Tensor:
    """The squared ReLU (arXiv 2109.08668)."""
    return torch.relu(x).square()


def visible_keys(
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


def bias_matrix(bias: Tensor, queries: int) -> Tensor:
    """The bias of every query and key: (I + J - 1,) to (I, J), or (B, I + J - 1) to (B, 1, I, J)."""
    matrix = toeplitz(bias, queries)
    return matrix if bias.dim() == 1 else matrix.unsqueeze(1)


def _per_row(offset: int | Tensor) -> int | Tensor:
    return offset[:, None, None, None] if isinstance(offset, Tensor) else offset


def open_empty_chunks(key_mask: Tensor | None) -> Tensor | None:
    """The mask with chunks that have no valid key opened, as the softmax of HF 4.37.2 treats them."""
    return None if key_mask is None else key_mask | ~key_mask.any(-1, keepdim=True)


def reference_attention(
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
        matrix = bias_matrix(bias.to(dtype), queries)
        if activation == "softmax":
            visible = visible_keys(queries, keys, causal, offset, open_empty_chunks(key_mask), q.device, documents)
            scores = scores * q.shape[-1] ** -0.5 + matrix
            if visible is not None:
                scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
            weights = scores.softmax(-1)
        else:
            visible = visible_keys(queries, keys, causal, offset, key_mask, q.device, documents)
            if documents is not None:
                # n is of the query's document alone; a causal one is a position, which does not depend on masks.
                counted = visible_keys(queries, keys, causal, offset, None if causal else key_mask, q.device, documents)
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
