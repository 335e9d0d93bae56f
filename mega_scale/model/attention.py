"""The gated attention sublayer of a Mega block: moving average, attention in chunks, gates.

Legend: B batch, L length, D channels, Z width of queries and keys, E width of values, C chunk, K chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mega_scale.model.cache import LayerState, remember
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.dropout import MegaDropout
from mega_scale.model.ema import MegaMultiDimensionDampedEma
from mega_scale.model.norm import MegaSequenceNorm
from mega_scale.ops.attention import chunk_attention, key_minus_query, rotary_bias, simple_bias


class MegaSimpleRelativePositionalBias(nn.Module):
    """A learned bias per distance; the table has `max_positions` on either side, read about the chunk when chunked."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.chunked = config.use_chunking
        self.centre = config.chunk_size if config.use_chunking else config.max_positions
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * config.max_positions - 1))

    def forward(self, queries: int, keys: int, offset: int) -> Tensor:
        """The bias of I queries after `offset` keys against J keys, (I + J - 1,)."""
        if not self.chunked and keys > self.centre:
            raise ValueError(
                f"a sequence of {keys} tokens is longer than max_positions={self.centre}, the limit of "
                "relative_positional_bias='simple': shorten it, use chunks, or use the rotary bias"
            )
        distances = key_minus_query(queries, keys, offset, self.rel_pos_bias.device)
        return simple_bias(self.rel_pos_bias, self.centre, distances)


class MegaRotaryRelativePositionalBias(nn.Module):
    """A learned function of the distance, defined at any distance."""

    _float_tensor: Tensor

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, config.shared_representation_size))
        self.b_param = nn.Parameter(torch.empty(1, config.shared_representation_size))
        # Not used; checkpoints of 4.37.2 have it, and load strictly.
        self.register_buffer("_float_tensor", torch.zeros(1))

    def forward(self, queries: int, keys: int, offset: int) -> Tensor:
        """The bias of I queries after `offset` keys against J keys, (I + J - 1,)."""
        return rotary_bias(self.alpha, self.b_param, key_minus_query(queries, keys, offset, self.alpha.device))


def positional_bias(config: MegaConfig) -> nn.Module:
    """The bias module that `relative_positional_bias` names."""
    if config.relative_positional_bias == "simple":
        return MegaSimpleRelativePositionalBias(config)
    return MegaRotaryRelativePositionalBias(config)


class MegaMovingAverageGatedAttention(nn.Module):
    """Moving average, attention in chunks, and gates (arXiv 2209.10655, equations 8 to 15)."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation = ACT2FN[config.activation]
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.hidden_dropout_prob, config.use_feature_dropout)
        self.norm = MegaSequenceNorm(config.normalization_type, config.hidden_size, config.norm_affine)
        self.ema_gate = MegaMultiDimensionDampedEma(config)
        self.v_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.segments = [
            config.hidden_size,
            config.shared_representation_size,
            config.intermediate_size,
            config.hidden_size,
        ]
        self.mx_proj = nn.Linear(config.hidden_size, sum(self.segments))
        self.h_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.qk_weight = nn.Parameter(torch.empty(2, config.shared_representation_size))
        self.qk_bias = nn.Parameter(torch.empty(2, config.shared_representation_size))
        self.rel_pos_bias = positional_bias(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """Update the residual stream.

        Args:
            x: (B, L, D).
            mask: bool, true for valid positions: (B, L), or (B, position + L) after a state.
            state: of the tokens before x; decoders only.
            return_state: whether to return the state after x.
            return_weights: whether to return attention weights.

        Returns:
            (B, L, D); weights, (B, K, C, C) or (B, 1, L, position + L) while one chunk holds everything, or none; state
            or none.
        """
        length = x.shape[1]
        new_mask = None if mask is None else mask[:, -length:]
        normed = self.norm(x, new_mask) if self.config.normalize_before_mega else x
        v = self.activation(self.v_proj(normed))
        averaged, ema_state = self.ema_gate(normed, new_mask, None if state is None else state.ema)
        averaged = self.dropout(averaged)
        update, z, gate, candidate = self.mx_proj(averaged).split(self.segments, -1)
        z = F.silu(z)
        # Each row is applied on its own: the stacked (B, L, 2, Z) product would double the memory of queries and keys.
        q = (z * self.qk_weight[0] + self.qk_bias[0]).to(v.dtype)
        k = (z * self.qk_weight[1] + self.qk_bias[1]).to(v.dtype)
        attended, weights = self._attend(q, k, v, mask, state, return_weights)

        hidden = self.activation(candidate + self.h_proj(attended * F.silu(gate)))
        out = torch.addcmul(x, torch.sigmoid(update), self.dropout(hidden) - x)
        if not self.config.normalize_before_mega:
            out = self.norm(out, new_mask)
        if not return_state or ema_state is None:
            return out, weights, None
        chunk = self.config.chunk_size if self.config.use_chunking else None
        return out, weights, remember(state, ema_state, k, v, chunk)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: LayerState | None, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of new tokens to their chunk: of q (B, L, Z) to remembered keys and k; returns (B, L, E)."""
        length = q.shape[1]
        seen = 0 if state is None else state.position
        if self.config.use_chunking:
            seen %= self.config.chunk_size
        if state is not None and seen:
            k = torch.cat([state.keys[:, :seen], k], 1)
            # Dropout of values happens below, on remembered ones too: a cache is not used while training.
            v = torch.cat([state.values[:, :seen], v], 1)
        v = self.hidden_dropout(v)
        total = seen + length
        key_mask = mask
        if mask is not None:
            missing = total - mask.shape[1]
            key_mask = F.pad(mask, (missing, 0), value=True) if missing > 0 else mask[:, -total:]

        offset = seen
        if self.config.use_chunking and total > self.config.chunk_size:
            # Whole chunks: remembered keys get dummy queries, the last chunk is filled up with masked keys.
            pad = -total % self.config.chunk_size
            q = F.pad(q, (0, 0, seen, pad))
            k, v = F.pad(k, (0, 0, 0, pad)), F.pad(v, (0, 0, 0, pad))
            if pad and (key_mask is not None or not self.config.is_decoder):
                valid = q.new_ones(q.shape[0], total, dtype=torch.bool) if key_mask is None else key_mask
                key_mask = F.pad(valid, (0, pad), value=False)
            offset = 0
            q, k, v = (t.unflatten(1, (-1, self.config.chunk_size)) for t in (q, k, v))
        else:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        if key_mask is not None:
            key_mask = key_mask.unflatten(1, (-1, k.shape[2]))
        eager = self.config._attn_implementation == "eager" or return_weights
        out, weights = chunk_attention(
            q, k, v, self.rel_pos_bias(q.shape[2], k.shape[2], offset),
            activation=self.config.attention_activation,
            causal=self.config.is_decoder,
            offset=offset,
            key_mask=key_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            return_weights=return_weights,
            impl="eager" if eager else "auto",
        )  # fmt: skip
        first = seen - offset  # dummy queries before the new ones
        return out.flatten(1, 2)[:, first : first + length], weights
