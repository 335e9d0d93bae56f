"""Attention of new tokens to themselves and to those that a cache remembers: what both families do around it.

Legend: B batch, L new tokens, Z width of queries and keys, E width of values, C chunk, K chunks, I queries, J keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mega_scale.model.basic_layers import MegaDropout
from mega_scale.model.cache import LayerState, remember
from mega_scale.model.configuration import BaseConfig
from mega_scale.model.rows import DocumentBorders, LeftPadding
from mega_scale.ops import ANY_LENGTH, chunk_count, join_chunks, split_chunks, tracing
from mega_scale.ops.attention import ChunkDocuments


class ChunkedAttention(nn.Module):
    """Lays queries, keys and values out in chunks, remembered ones among them; a family's attention is a subclass."""

    def __init__(self, config: BaseConfig, causal: bool = True) -> None:
        super().__init__()
        self.chunk, self.causal = config.attention_chunk, causal  # C, tokens, or none
        self.attention_dropout = MegaDropout(config.attention_probs_dropout_prob)

    def attend_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        offset: int | Tensor,
        return_weights: bool,
        documents: ChunkDocuments | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of every chunk to itself: q (B, K, I, Z), k (B, K, J, Z), v (B, K, J, E) to (B, K, I, E), and
        weights or none. The other arguments are those of `chunk_attention`."""
        raise NotImplementedError

    def drop_values(self, v: Tensor) -> Tensor:
        """Dropout of values (B, J, E); a cache is not used while training, so it may meet remembered ones too."""
        return v

    def weight_dropout(self) -> Any:
        """What `chunk_attention` is to drop weights by: a probability, or a function that drops by itself."""
        drop = self.attention_dropout
        return 0.0 if not drop.training else drop if drop.drop else drop.p

    @staticmethod
    def position(state: LayerState | None, return_state: bool, x: Tensor) -> Any:
        """Columns before x: a number, or a tensor without dimensions in a program that hands its state on."""
        seen: Any = 0 if state is None else state.position
        if return_state and torch.compiler.is_exporting():
            # A number would hold for the calls that are like this one.
            seen = torch.zeros((), dtype=torch.long, device=x.device) + seen
        return seen

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        pads: Tensor | None,
        seen: Any,
        state: LayerState | None,
        return_state: bool,
        return_weights: bool,
        borders: DocumentBorders | None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Attention of q (B, L, Z) to k (B, L, Z), v (B, L, E) and those of the state, after `seen` columns.

        The mask (B, L) bool, after a state also of columns before, is true for valid positions; `pads` (B,) int64 is
        the padding before each row's first token, from which chunks count; `borders` are of documents in rows without
        such padding. Returns (B, L, E), weights or none, and with `return_state` keys and values to remember.
        """
        if pads is None:
            kept = remember(state, k, v, self.chunk) if return_state else None
            documents = None if borders is None else borders.chunks
            return *self._attend(q, k, v, mask, state, kept, return_weights, documents), kept
        padding = LeftPadding.lay(pads, seen, 0 if state is None else state.keys.shape[1], q.shape[1], self.chunk)
        return self._attend_left_padded(q, k, v, mask, state, padding, return_weights)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        state: LayerState | None,
        kept: tuple[Tensor, Tensor] | None,
        return_weights: bool,
        documents: ChunkDocuments | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q (B, L, Z) to remembered keys and k, which `kept` holds already; returns (B, L, E)."""
        length, any_length = q.shape[1], tracing() in ANY_LENGTH
        position: Any = 0 if state is None else state.position
        seen = position % self.chunk if self.chunk else position
        total = seen + length
        # Dropout of values happens below, on remembered ones too: a cache is not used while training.
        if seen and kept is not None and (self.chunk is None or total < self.chunk):
            k, v = (tensor[:, :total] for tensor in kept)
        elif seen and state is not None:
            k, v = torch.cat([state.keys[:, :seen], k], 1), torch.cat([state.values[:, :seen], v], 1)
        key_mask = None if mask is None else mask[:, -total:]
        if self.chunk is None or (not any_length and total <= self.chunk):
            out, weights = self._attend_in_chunks(q, k, v, key_mask, seen, return_weights, documents)
            return out[:, 0], weights
        # Whole chunks: remembered keys get dummy queries, the last chunk is filled up with masked keys.
        pad = chunk_count(total, self.chunk) * self.chunk - total
        more = any_length or pad > 0
        if more and (key_mask is not None or not self.causal):
            valid = q.new_ones(q.shape[0], total, dtype=torch.bool) if key_mask is None else key_mask
            key_mask = F.pad(valid, (0, pad), value=False)
        if seen or more:  # padding by nothing would copy
            q, k, v = F.pad(q, (0, 0, seen, pad)), F.pad(k, (0, 0, 0, pad)), F.pad(v, (0, 0, 0, pad))
        out, weights = self._attend_in_chunks(q, k, v, key_mask, 0, return_weights, documents)
        return join_chunks(out, seen, total), weights

    def _attend_left_padded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        state: LayerState | None,
        padding: LeftPadding,
        return_weights: bool,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """The same for left-padded rows; also returns the keys and values to remember."""
        k = padding.in_slots(k, None if state is None else state.keys)
        v = padding.in_slots(v, None if state is None else state.values)
        kept, valid = (k, v), padding.valid(mask)
        if self.chunk is not None:
            kept = padding.open_chunk(k, self.chunk), padding.open_chunk(v, self.chunk)
        if padding.length == 1:
            out, weights = self._attend_in_chunks(q, k, v, valid, padding.shift, return_weights, None)
            out = out[:, 0]
        else:
            out, weights = self._attend_in_chunks(padding.in_slots(q), k, v, valid, 0, return_weights, None)
            out = padding.out_of_slots(out.flatten(1, 2))
        if weights is not None and self.chunk is None:
            weights = padding.by_column(weights)
        return out, weights, kept

    def _attend_in_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        offset: int | Tensor,
        return_weights: bool,
        documents: ChunkDocuments | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries (B, I, Z) to keys (B, J, Z) and values (B, J, E) in whole chunks, (B, K, C, E)."""
        laid_out = tracing() in ANY_LENGTH and q.shape[1] == k.shape[1]
        size = self.chunk if self.chunk is not None and (laid_out or k.shape[1] > self.chunk) else None
        q, k, v = (t.unsqueeze(1) if size is None else split_chunks(t, size) for t in (q, k, self.drop_values(v)))
        if key_mask is not None:
            key_mask = key_mask.unsqueeze(1) if size is None else split_chunks(key_mask, size)
        return self.attend_chunks(q, k, v, key_mask, offset, return_weights, documents)
