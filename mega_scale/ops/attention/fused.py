"""Softmax attention in chunks through `scaled_dot_product_attention`, the Toeplitz bias passed as its mask.

Legend: B batch, K chunks, I queries, J keys, Z width of queries and keys, E width of values.
"""

import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.attention.documents import ChunkDocuments
from mega_scale.ops.attention.reference import bias_matrix, open_empty_chunks, visible_keys


def fused_attention(
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
    mask = bias_matrix(bias.to(q.dtype), q.shape[2])
    if isinstance(offset, int) and offset + 1 >= k.shape[2]:
        causal = False  # already the first query sees every key, as in a decoding step
    visible = visible_keys(q.shape[2], k.shape[2], causal, offset, open_empty_chunks(key_mask), q.device, documents)
    if visible is not None:
        mask = mask.masked_fill(~visible, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
