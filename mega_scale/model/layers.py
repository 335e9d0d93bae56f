"""The layers of a model: `MegaBlock` is the last, its parts come before it.

Legend: B batch, L length, S encoder length, D channels, N moving averages per channel, Z width of queries and keys,
E width of values, C chunk, K chunks, I queries, J keys, W outputs of a linear layer.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from mega_scale.model.basic_layers import INDICES, ChunkedAttention, MegaDropout, check_ids, check_inputs
from mega_scale.model.configuration_mega import BATCH_NORMS, MegaConfig
from mega_scale.ops import without_autocast
from mega_scale.ops.attention import chunk_attention
from mega_scale.ops.elementwise import EAGER, divide_by_rms, recomputed
from mega_scale.ops.ema import Carry, damped_ema_and_residual, ema_coefficients

if TYPE_CHECKING:
    from mega_scale.model.cache import LayerState
    from mega_scale.model.rows import DocumentBorders

_EPSILON = 1e-5  # of all norms


class MegaScaleNorm(nn.Module):
    """`g x / rms(x)` with one learned scalar g (arXiv 1910.05895); statistics in fp32."""

    scalar: nn.Parameter | None

    def __init__(self, eps: float = _EPSILON, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("scalar", nn.Parameter(torch.ones(1)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        return divide_by_rms(x, self.scalar, self.eps)


class MegaRMSNorm(nn.RMSNorm):
    """`g x / rms(x)` with a learned g per channel (arXiv 1910.07467). In 4.37.2 it returns its input unnormalised."""

    def forward(self, x: Tensor) -> Tensor:
        return divide_by_rms(x, self.weight, self.eps or 0.0)


class MegaSequenceNorm(nn.Module):
    """The norm named by `normalization_type`; batch norms take their statistics from valid positions only."""

    def __init__(self, kind: str, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.norm: nn.Module
        if kind == "scalenorm":
            self.norm = MegaScaleNorm(_EPSILON, affine)
        elif kind in BATCH_NORMS:
            norm = nn.BatchNorm1d if kind == "batchnorm" else nn.SyncBatchNorm
            self.norm = norm(channels, eps=_EPSILON, affine=affine)
        else:
            self.norm = (nn.LayerNorm if kind == "layernorm" else MegaRMSNorm)(channels, _EPSILON, affine)
        self.over_batch = kind in BATCH_NORMS

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x (B, L, D); mask (B, L) bool marks the positions that batch statistics count."""
        if not self.over_batch:
            return self.norm(x)
        if mask is None or not self.training:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        out = torch.zeros_like(x)
        out[mask] = self.norm(x[mask])
        return out


class MegaSimpleRelativePositionalBias(nn.Module):
    """A learned bias per distance; the table has `max_positions` on either side, read about the chunk when chunked."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.chunked = config.use_chunking
        self.centre = config.chunk_size if config.use_chunking else config.max_positions
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * config.max_positions - 1))

    def forward(self, queries: int, keys: int, offset: int | Tensor) -> Tensor:
        """The bias of I queries from position `offset` on against J keys, (I + J - 1,), or (B, I + J - 1) for (B,)."""
        reach = keys if isinstance(offset, Tensor) else max(keys, offset + queries)
        if not self.chunked and reach > self.centre:
            raise ValueError(
                f"a sequence of {reach} tokens is longer than max_positions={self.centre}, the limit of "
                "relative_positional_bias='simple': shorten it, use chunks, or use the rotary bias"
            )
        table: Tensor = self.rel_pos_bias
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        distances = torch.arange(1 - queries, keys, device=table.device)
        distances = distances - (offset[:, None] if isinstance(offset, Tensor) else offset)
        # A distance beyond the table has the bias at its end.
        return table[(distances + (self.centre - 1)).clamp(0, table.shape[0] - 1)]


class MegaRotaryRelativePositionalBias(nn.Module):
    """A learned function of the distance, defined at any distance (arXiv 2209.10655, section 3.3; HF 4.37.2).

    `sum_k (a1 b1 + a2 b2)_k cos(d theta_k) + (a1 b2 - a2 b1)_k sin(d theta_k)`, with d = i - j, the halves 1 and 2 of
    alpha and beta, and `theta_k = 10000^(-k / (Z / 2))`: alpha rotated to i, times beta rotated to j.
    """

    _float_tensor: Tensor

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, config.shared_representation_size))
        self.b_param = nn.Parameter(torch.empty(1, config.shared_representation_size))
        # Not used; checkpoints of 4.37.2 have it, and load strictly.
        self.register_buffer("_float_tensor", torch.zeros(1))

    def forward(self, queries: int, keys: int, offset: int | Tensor) -> Tensor:
        """As that of the simple bias; at least fp32."""
        alpha, beta = self.alpha, self.b_param
        dtype = torch.promote_types(alpha.dtype, torch.float32)
        distances = torch.arange(1 - queries, keys, device=alpha.device)
        distances = distances - (offset[:, None] if isinstance(offset, Tensor) else offset)
        with without_autocast(alpha.device):
            a1, a2 = alpha.to(dtype).reshape(-1).chunk(2)
            b1, b2 = beta.to(dtype).reshape(-1).chunk(2)
            half = a1.shape[0]
            theta = 10000.0 ** (-torch.arange(half, device=alpha.device, dtype=dtype) / half)
            angles = -distances.to(dtype)[..., None] * theta
            return angles.cos() @ (a1 * b1 + a2 * b2) + angles.sin() @ (a1 * b2 - a2 * b1)


BIASES = {"rotary": MegaRotaryRelativePositionalBias, "simple": MegaSimpleRelativePositionalBias}


class MegaMultiDimensionDampedEma(nn.Module):
    """`silu(EMA(x) + omega x)` (arXiv 2209.10655, equations 5 and 6; omega and silu as in the public implementations),
    with parameters in fp32: a decay close to one does not survive bf16."""

    carry: Callable[[], Carry | None] | None = None  # what brings the state of other parts, where x is a part of rows
    sum_gradients: Callable[..., tuple[Tensor, ...]] | None = None  # of parameters, where each rank has a share

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        rows = config.hidden_size * (2 if config.bidirectional else 1)
        averages = config.ema_projection_size
        self.gates = EAGER
        self.bidirectional = config.bidirectional
        self.truncation = config.truncation
        self.damping_factor = nn.Parameter(torch.empty(rows, averages, 1))
        self.decay_factor = nn.Parameter(torch.empty(rows, averages, 1))
        self.ema_expansion_matrix = nn.Parameter(torch.empty(rows, averages, 1))
        self.kernel_projection_matrix = nn.Parameter(torch.empty(rows, averages))
        self.residual_weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, state: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Average x (B, L, D) over the sequence; also returns h after the last token, none when truncated.

        The mask (B, L) bool is false for positions that the average leaves out (their omega term stays); the state is h
        before the first token, (B, D, N) fp32; resets (B, L) bool are true where a document begins.
        """
        parameters: tuple[Tensor, ...] = (
            self.damping_factor, self.decay_factor, self.ema_expansion_matrix, self.kernel_projection_matrix,
            self.residual_weight,
        )  # fmt: skip
        if self.sum_gradients is not None:
            parameters = self.sum_gradients(*parameters)
        *of_average, omega = parameters
        coefficients = ema_coefficients(*of_average)
        inputs = x if mask is None else x * mask[..., None]
        y, _, state = damped_ema_and_residual(
            inputs,
            coefficients,
            state,
            resets,
            bidirectional=self.bidirectional,
            truncation=self.truncation,
            carry=None if self.carry is None else self.carry(),
        )
        return self.gates.average(y, x, omega), state


class MegaEmbeddings(nn.Module):
    """Word embeddings, times sqrt(D) if `scale_embeddings`, plus token type embeddings if the model has them."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.channels = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.padding_idx)
        self.token_type_embeddings = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.add_token_type_embeddings else None
        )
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.dropout = MegaDropout(config.embedding_dropout_prob, config.use_feature_dropout)

    def forward(
        self, input_ids: Tensor | None = None, token_type_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Embed input_ids (B, L), or take inputs_embeds (B, L, D); token types, (B, L) or (1, L), are 0 by default.

        Raises ValueError for both or none of the two, for other shapes or dtypes, and for ids that have no row.
        """
        given = check_inputs(input_ids, inputs_embeds, self.channels)
        shape = tuple(given.shape)
        types = None if self.token_type_embeddings is None else token_type_ids
        if types is not None and (types.shape not in (shape[:2], (1, shape[1])) or types.dtype not in INDICES):
            raise ValueError(
                f"token_type_ids is {types.dtype} {tuple(types.shape)}: expected int64 {shape[:2]}, one a token"
            )

        words = self.word_embeddings
        if input_ids is not None and type(words) is nn.Embedding:
            check_ids(input_ids, words.num_embeddings, "input_ids", "vocab_size")
        x = given if input_ids is None else words(input_ids)
        if self.scale != 1.0:
            x = x * self.scale
        if self.token_type_embeddings is not None:
            if types is None:
                types = torch.zeros(shape[:2], dtype=torch.long, device=x.device)
            if type(self.token_type_embeddings) is nn.Embedding:
                check_ids(types, self.token_type_embeddings.num_embeddings, "token_type_ids", "type_vocab_size")
            x = x + self.token_type_embeddings(types)
        return self.dropout(x)


class MegaNormalizedFeedForwardNetwork(nn.Module):
    """`x + dropout(fc2(dropout(act(fc1(norm x)))))`, the norm after the sum when not pre-norm."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.prenorm = config.normalize_before_ffn
        self.activation = ACT2FN[config.activation]
        self.norm = MegaSequenceNorm(config.normalization_type, config.hidden_size, config.norm_affine)
        self.fc1 = nn.Linear(config.hidden_size, config.nffn_hidden_size)
        self.fc2 = nn.Linear(config.nffn_hidden_size, config.hidden_size)
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.nffn_activation_dropout_prob, config.use_feature_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update the residual stream (B, L, D); mask (B, L) bool is true for valid positions, for batch norms."""
        if self.prenorm and not self.norm.over_batch:
            with recomputed(self.norm, x) as normed:
                pre = self.fc1(normed)
        else:
            pre = self.fc1(self.norm(x, mask) if self.prenorm else x)
        with recomputed(self.activation, pre) as active:
            out = self.dropout(self.fc2(self.hidden_dropout(active)), x)
        return out if self.prenorm else self.norm(out, mask)


class MegaMovingAverageGatedAttention(ChunkedAttention):
    """Moving average, attention in chunks, and gates (arXiv 2209.10655, equations 8 to 15)."""

    # Brings all channels of what layers read, where x has a rank's, and what they make of them.
    read_by: Callable[..., tuple[Tensor, ...]] | None = None

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config, causal=config.is_decoder)
        self.activation = ACT2FN[config.activation]
        self.gates = EAGER
        self.ema_dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.hidden_dropout_prob, config.use_feature_dropout)
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
        state: "LayerState | None" = None,
        return_state: bool = False,
        return_weights: bool = False,
        borders: "DocumentBorders | None" = None,
    ) -> "tuple[Tensor, Tensor | None, LayerState | None]":
        """Update the residual stream (B, L, D) after `state`; also returns weights and the state after x, or none.

        The mask (B, L) bool, after a state also of columns before, is true for valid positions; `pads` (B,) int64 is
        the padding before each row's first token, from which chunks count; `borders` are of documents in rows without
        such padding. Weights are (B, K, C, C), or (B, 1, L, position + L) while one chunk holds everything.
        """
        new_mask = None if mask is None else mask[:, -x.shape[1] :]
        normed = self.norm(x, new_mask) if self.config.normalize_before_mega else x
        if self.read_by is None:
            pre = self.v_proj(normed)
        else:
            normed, pre = self.read_by(normed, self.v_proj)
        averaged, ema_state = self.ema_gate(
            normed, new_mask, None if state is None else state.ema, None if borders is None else borders.starts
        )
        averaged = self.ema_dropout(averaged)
        with recomputed(self.activation, pre) as v:
            segments: Any = self.mx_proj(averaged)
            if not isinstance(segments, tuple):  # as from a layer for each, which ranks can share
                segments = segments.split(list(self.segments.values()), -1)
            update, z, gate, candidate = segments
            # They keep what precision they have: relu2 squares their scores.
            q, k = self.gates.queries_and_keys(z, self.qk_weight, self.qk_bias)
            attended, weights, kept = self.attend(q, k, v, mask, pads, state, return_state, return_weights, borders)
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
        from mega_scale.model.cache import LayerState

        return out, weights, LayerState(ema_state, *kept)

    def attend_chunks(self, q: Tensor, k: Tensor, v: Tensor, **rules: Any) -> tuple[Tensor, Tensor | None]:
        if self.training:  # as rows (B, K J, E)
            v = self.hidden_dropout(v.flatten(1, 2)).view(v.shape)
        bias = self.rel_pos_bias(q.shape[2], k.shape[2], rules["offset"])
        return chunk_attention(q, k, v, bias, activation=self.config.attention_activation, **rules)


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
        state: "LayerState | None" = None,
        encoder: tuple[Tensor, Tensor] | None = None,
        return_state: bool = False,
        return_weights: bool = False,
        borders: "DocumentBorders | None" = None,
    ) -> "tuple[Tensor, Tensor | None, Tensor | None, LayerState | None, tuple[Tensor, Tensor] | None]":
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
