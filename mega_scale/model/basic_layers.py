"""What both families are made of: products, dropout, the output layer, checks of token ids, attention in chunks.

Legend: B batch, L new tokens, D channels, V vocabulary, W outputs of a linear layer, Z width of queries and keys, E
width of values, C chunk, K chunks, I queries, J keys.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.ops import ANY_LENGTH, chunk_count, in_memory, join_chunks, split_chunks, tracing
from mega_scale.ops.attention import ChunkDocuments
from mega_scale.ops.elementwise import PositionalDropout
from mega_scale.ops.linear import linear, linear_cross_entropy

if TYPE_CHECKING:
    from mega_scale.model.cache import LayerState
    from mega_scale.model.rows import DocumentBorders, LeftPadding
    from mega_scale.model.static_cache import OpenChunk

INDICES = (torch.int64, torch.int32)  # dtypes of token ids


class MegaLinear(nn.Linear):
    """(B, L, D) to (B, L, W), by whichever library is fastest on a CPU whatever hooks it has: for trainers."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class MegaDropout(nn.Module):
    """Zeroes elements of (B, L, D) with probability p while training; featurewise: one draw for a feature of a row."""

    drop: Any = None  # does it, where PyTorch is not to draw: as here, but for p

    def __init__(self, p: float, featurewise: bool = False) -> None:
        super().__init__()
        self.p = float(p)
        self.featurewise = featurewise

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x after dropout, plus the residual."""
        if self.training and self.p > 0 and self.drop is not None:
            return self.drop(x, residual)
        if self.training and self.p > 0:
            x = (
                x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)
                if self.featurewise
                else F.dropout(x, self.p)
            )
        return x if residual is None else residual + x

    def of_weights(self) -> float | PositionalDropout:
        """What attention does to its weights: their probability of being dropped, or what drops them by place."""
        if not self.training or self.drop is None:
            return self.p if self.training else 0.0
        return self.drop.of_weights()


class LanguageModelHead(nn.Linear):
    """A linear layer that can also take targets, whatever hooks it has: what trainers make of it."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of (B, L, D); with targets (B, L) int64, -100 where there is none, the sum of losses."""
        if targets is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, self.bias, targets.to(input.device))


def use_own_linear(model: PreTrainedModel) -> None:
    """Make plain linear layers `MegaLinear`, and the output a `LanguageModelHead`, in place; parameters and ties stay.

    For models that this project runs: programs that look for `nn.Linear` itself, to quantise it, find none.
    """
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                with torch.device("meta"):
                    kind = LanguageModelHead if layer is head else MegaLinear
                    new = kind(layer.in_features, layer.out_features, layer.bias is not None)
                new.weight, new.bias = layer.weight, layer.bias
                parent.add_module(name, new)


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, channels: int) -> Tensor:
    """The one of input_ids (B, L) int64 and inputs_embeds (B, L, D) that is given.

    Raises ValueError for both or none of the two, and for other shapes or dtypes.
    """
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    shape = tuple(given.shape)
    if input_ids is None:
        name, expected = "inputs_embeds", f"(batch, length, {channels})"
        fits = shape[2:] == (channels,)
    else:
        name, expected = "input_ids", "int64 (batch, length)"
        fits = len(shape) == 2 and given.dtype in INDICES
    if not fits or shape[1] < 1:
        raise ValueError(f"{name} is {given.dtype} {shape}: expected {expected}, at least one token long")
    return given


def check_ids(ids: Tensor, rows: int, name: str, size: str) -> None:
    """Refuse ids outside 0 to rows - 1 on a CPU; other devices say so themselves, and later."""
    if not in_memory(ids) or not ids.numel() or not ids.is_cpu:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"{name} holds {low if low < 0 else high}: expected 0 to {rows - 1} ({size}={rows})")


class ChunkedAttention(nn.Module):
    """Lays queries, keys and values out in chunks, remembered ones among them; a family's attention is a subclass."""

    def __init__(self, config: BaseConfig, causal: bool = True) -> None:
        super().__init__()
        self.config: Any = config  # of the subclass's family
        self.chunk, self.causal = config.attention_chunk, causal  # C, tokens, or none
        self.attention_dropout = MegaDropout(config.attention_probs_dropout_prob)

    def attend_chunks(self, q: Tensor, k: Tensor, v: Tensor, **rules: Any) -> tuple[Tensor, Tensor | None]:
        """Attention of every chunk to itself: q (B, K, I, Z), k (B, K, J, Z), v (B, K, J, E) to (B, K, I, E), and
        weights or none. The rules are arguments of `chunk_attention` that do not depend on the family.

        What is dropped of values may be of remembered ones too: a cache is not used while training.
        """
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        pads: Tensor | None,
        state: "LayerState | None",
        return_state: bool,
        return_weights: bool,
        borders: "DocumentBorders | None",
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Any] | None]:
        """Attention of q (B, L, Z) to k (B, L, Z), v (B, L, E) and those of the state, which come before.

        The mask (B, L) bool, after a state also of columns before, is true for valid positions; `pads` (B,) int64 is
        the padding before each row's first token, from which chunks count; `borders` are of documents in rows without
        such padding. Returns (B, L, E), weights or none, and with `return_state` what to remember: keys, values, and
        columns so far, a tensor without dimensions in a program that is exported.
        """
        if state is not None and state.rows is not None:
            return self._attend_in_place(q, k, v, state, state.rows, return_weights)
        seen: Any = 0 if state is None else state.position
        if return_state and torch.compiler.is_exporting():
            # A number would hold for the calls that are like this one.
            seen = torch.zeros((), dtype=torch.long, device=q.device) + seen
        if pads is None:
            kept = None
            if return_state:
                from mega_scale.model.cache import remember

                kept = remember(state, k, v, self.chunk)
            documents = None if borders is None else borders.chunks
            out, weights = self._attend(q, k, v, mask, state, kept, return_weights, documents)
        else:
            from mega_scale.model.rows import LeftPadding

            padding = LeftPadding.lay(pads, seen, 0 if state is None else state.keys.shape[1], q.shape[1], self.chunk)
            out, weights, kept = self._attend_left_padded(q, k, v, mask, state, padding, return_weights)
        return out, weights, None if kept is None else (*kept, seen + q.shape[1])

    def _attend_in_place(
        self, q: Tensor, k: Tensor, v: Tensor, state: "LayerState", rows: "OpenChunk", return_weights: bool
    ) -> tuple[Tensor, None, tuple[Tensor, Tensor, Any]]:
        """Attention of one token a row to a static cache's keys, among which its own is written first."""
        if return_weights:
            raise ValueError("output_attentions=True with a static cache: use mega_scale.MegaCache")
        place = rows.place(state.position)
        rows.write(place, state.keys, k)
        rows.write(place, state.values, v)
        if getattr(self.config, "attention_activation", "softmax") != "softmax":
            # These divide scores by the place in the chunk, but count keys of the token's document only.
            q = q * ((place + 1) / (place + 1 - rows.first)).to(q.dtype)[:, None, None]
        out, _ = self._attend_in_chunks(q, state.keys, state.values, rows.visible(place), place, False, None)
        return out[:, 0], None, (state.keys, state.values, state.position)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        state: "LayerState | None",
        kept: tuple[Tensor, Tensor] | None,
        return_weights: bool,
        documents: ChunkDocuments | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q (B, L, Z) to remembered keys and k, which `kept` holds already; returns (B, L, E)."""
        length, any_length = q.shape[1], tracing() in ANY_LENGTH
        position: Any = 0 if state is None else state.position
        seen = position % self.chunk if self.chunk else position
        total = seen + length
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
        state: "LayerState | None",
        padding: "LeftPadding",
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
        q, k, v = (t.unsqueeze(1) if size is None else split_chunks(t, size) for t in (q, k, v))
        if key_mask is not None:
            key_mask = key_mask.unsqueeze(1) if size is None else split_chunks(key_mask, size)
        return self.attend_chunks(
            q, k, v,
            causal=self.causal,
            offset=offset,
            key_mask=key_mask,
            dropout=self.attention_dropout.of_weights(),
            return_weights=return_weights,
            documents=documents,
            impl="eager" if return_weights or self.config._attn_implementation == "eager" else "auto",
        )  # fmt: skip
