"""Gated attention, alone and to an encoder, and the block that holds both.

Legend: B batch, L length, S encoder length, D channels, Z width of queries and keys, E width of values, C chunk,
K chunks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from mega_scale.model.cache import DocumentBorders, LayerState, LeftPadding, remember
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.layers import (
    BIASES,
    MegaDropout,
    MegaMultiDimensionDampedEma,
    MegaNormalizedFeedForwardNetwork,
    MegaSequenceNorm,
)
from mega_scale.ops import ANY_LENGTH, chunk_count, join_chunks, split_chunks, tracing
from mega_scale.ops.attention import ChunkDocuments, chunk_attention
from mega_scale.ops.elementwise import EAGER, recomputed


class MegaMovingAverageGatedAttention(nn.Module):
    """Moving average, attention in chunks, and gates (arXiv 2209.10655, equations 8 to 15)."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.config = config
        self.chunk = config.chunk_size if config.use_chunking else None  # C, tokens
        self.activation = ACT2FN[config.activation]
        self.gates = EAGER
        self.ema_dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.hidden_dropout_prob, config.use_feature_dropout)
        self.attention_dropout = MegaDropout(config.attention_probs_dropout_prob)
        self.norm = MegaSequenceNorm(config.normalization_type, config.hidden_size, config.norm_affine)
        self.ema_gate = MegaMultiDimensionDampedEma(config)
        self.v_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.segments = {
            "update": config.hidden_size,
            "shared": config.shared_representation_size,
            "gate": config.intermediate_size,
            "candidate": config.hidden_size,
        }
        self.mx_proj = nn.Linear(config.hidden_size, sum(self.segments.values()))
        self.h_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.qk_weight = nn.Parameter(torch.empty(2, config.shared_representation_size))
        self.qk_bias = nn.Parameter(torch.empty(2, config.shared_representation_size))
        self.rel_pos_bias = BIASES[config.relative_positional_bias](config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        pads: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        return_weights: bool = False,
        borders: DocumentBorders | None = None,
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """Update the residual stream (B, L, D) after `state`; also returns weights and the state after x, or none.

        Args:
            mask: (B, L) bool, true for valid positions; after a state also of columns before them.
            pads: padding before each row's first token, (B,) int64, from which chunks count; none where no row has any.
            borders: of the documents in x, in rows without padding before them; none where each row has one.
            return_weights: (B, K, C, C), or (B, 1, L, position + L) while one chunk holds everything.
        """
        length = x.shape[1]
        new_mask = None if mask is None else mask[:, -length:]
        normed = self.norm(x, new_mask) if self.config.normalize_before_mega else x
        averaged, ema_state = self.ema_gate(
            normed, new_mask, None if state is None else state.ema, None if borders is None else borders.starts
        )
        averaged = self.ema_dropout(averaged)
        pre = self.v_proj(normed)
        with recomputed(self.activation, pre) as v:
            segments: Any = self.mx_proj(averaged)
            if not isinstance(segments, tuple):  # as from a layer for each, which ranks can share
                segments = segments.split(list(self.segments.values()), -1)
            update, z, gate, candidate = segments
            # They keep what precision they have: relu2 squares their scores.
            q, k = self.gates.queries_and_keys(z, self.qk_weight, self.qk_bias)
            seen: Any = 0 if state is None else state.position
            if return_state and torch.compiler.is_exporting():
                # A number would hold for the calls that are like this one.
                seen = torch.zeros((), dtype=torch.long, device=x.device) + seen
            kept = remember(state, k, v, self.chunk) if return_state and pads is None else None
            if pads is None:
                documents = None if borders is None else borders.chunks
                attended, weights = self._attend(q, k, v, mask, state, kept, return_weights, documents)
            else:
                padding = LeftPadding.lay(pads, seen, 0 if state is None else state.keys.shape[1], length, self.chunk)
                attended, weights, kept = self._attend_left_padded(q, k, v, mask, state, padding, return_weights)
        with recomputed(self.gates.gate, attended, gate) as gated:
            candidate = candidate + self.h_proj(gated)
        if self.config.activation == "silu" and not (self.dropout.training and self.dropout.p):
            out = self.gates.update(x, update, candidate)
        else:
            out = torch.addcmul(x, torch.sigmoid(update), self.dropout(self.activation(candidate)) - x)
        if not self.config.normalize_before_mega:
            out = self.norm(out, new_mask)
        if not return_state or ema_state is None:
            return out, weights, None
        assert kept is not None
        return out, weights, LayerState(ema_state, *kept, seen + length)

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
        if more and (key_mask is not None or not self.config.is_decoder):
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
            out, weights = self._attend_in_chunks(q, k, v, valid, padding.shift, return_weights)
            out = out[:, 0]
        else:
            out, weights = self._attend_in_chunks(padding.in_slots(q), k, v, valid, 0, return_weights)
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
        documents: ChunkDocuments | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries (B, I, Z) to keys (B, J, Z) and values (B, J, E) in whole chunks, (B, K, C, E)."""
        laid_out = tracing() in ANY_LENGTH and q.shape[1] == k.shape[1]
        size = self.chunk if self.chunk is not None and (laid_out or k.shape[1] > self.chunk) else None
        q, k, v = (t.unsqueeze(1) if size is None else split_chunks(t, size) for t in (q, k, self.hidden_dropout(v)))
        if key_mask is not None:
            key_mask = key_mask.unsqueeze(1) if size is None else split_chunks(key_mask, size)
        drop = self.attention_dropout
        return chunk_attention(
            q, k, v, self.rel_pos_bias(q.shape[2], k.shape[2], offset),
            activation=self.config.attention_activation,
            causal=self.config.is_decoder,
            offset=offset,
            key_mask=key_mask,
            dropout=0.0 if not drop.training else drop if drop.drop else drop.p,  # a fused one drops by itself
            return_weights=return_weights,
            documents=documents,
            impl="eager" if return_weights or self.config._attn_implementation == "eager" else "auto",
        )  # fmt: skip


class MegaGatedCrossAttention(nn.Module):
    """`x + sigmoid(u) (dropout(act(W_h(O silu(r)))) - x)`, O the attention of q to the encoder; no EMA, no chunks."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation = ACT2FN[config.activation]
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.hidden_dropout_prob, config.use_feature_dropout)
        self.norm = MegaSequenceNorm(config.normalization_type, config.hidden_size, config.norm_affine)
        self.k_proj = nn.Linear(config.hidden_size, config.shared_representation_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size + config.shared_representation_size)
        self.h_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.rel_pos_bias = BIASES[config.relative_positional_bias](config)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        key_mask: Tensor | None,
        offset: int | Tensor,
        return_weights: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Update the residual stream x (B, L, D) from position `offset` on, one number or (B,); mask (B, L) is of x.

        Keys (B, S, Z), values (B, S, D) and their mask (B, S) are the encoder's. Also returns weights (B, L, S).
        """
        config = self.config
        prenorm = config.normalize_before_mega
        update, gate, q = self.q_proj(self.norm(x, mask) if prenorm else x).split(
            [config.hidden_size, config.hidden_size, config.shared_representation_size], -1
        )
        attended, weights = chunk_attention(
            q.unsqueeze(1), keys.unsqueeze(1), self.hidden_dropout(values).unsqueeze(1),
            self.rel_pos_bias(x.shape[1], keys.shape[1], offset),
            activation=config.attention_activation,
            offset=offset,
            key_mask=None if key_mask is None else key_mask.unsqueeze(1),
            dropout=config.attention_probs_dropout_prob if self.training else 0.0,
            return_weights=return_weights,
            impl="eager" if return_weights or config._attn_implementation == "eager" else "auto",
        )  # fmt: skip
        hidden = self.dropout(self.activation(self.h_proj(attended.squeeze(1) * F.silu(gate))))
        out = torch.addcmul(x, torch.sigmoid(update), hidden - x)
        if not prenorm:
            out = self.norm(out, mask)
        return out, None if weights is None else weights.squeeze(1)


class MegaBlock(GradientCheckpointingLayer):
    """One layer of a Mega model: the unit of activation checkpointing and of sharding."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.mega_layer = MegaMovingAverageGatedAttention(config)
        self.cross_attn = MegaGatedCrossAttention(config) if config.add_cross_attention else None
        self.nffn = MegaNormalizedFeedForwardNetwork(config) if config.use_normalized_ffn else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        pads: Tensor | None = None,
        encoder_output: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        state: LayerState | None = None,
        encoder: tuple[Tensor, Tensor] | None = None,
        return_state: bool = False,
        return_weights: bool = False,
        borders: DocumentBorders | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, LayerState | None, tuple[Tensor, Tensor] | None]:
        """Update the residual stream; arguments as in `MegaMovingAverageGatedAttention`.

        Cross-attention takes the encoder's output (B, S, D), or what an earlier call made of it, and its mask (B, S).
        Also returns, or none, weights of self-attention and of cross-attention (B, L, S), and the states after x.
        """
        seen = 0 if state is None else state.position
        x, weights, state = self.mega_layer(x, mask, pads, state, return_state, return_weights, borders)
        new_mask = None if mask is None else mask[:, -x.shape[1] :]
        cross_weights = None
        if (attn := self.cross_attn) is not None:
            if encoder is None:
                encoder = attn.k_proj(encoder_output), attn.activation(attn.v_proj(encoder_output))
            offset = seen if pads is None else seen - pads
            x, cross_weights = attn(x, *encoder, encoder_mask, offset, return_weights, new_mask)
        if self.nffn is not None:
            x = self.nffn(x, new_mask)
        return x, weights, cross_weights, state, encoder if return_state else None
