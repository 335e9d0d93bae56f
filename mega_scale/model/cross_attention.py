"""Gated attention of a decoder to an encoder's output.

Legend: B batch, L decoder length, S encoder length, D channels, Z width of queries and keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.dropout import MegaDropout
from mega_scale.model.linear import apply_linear
from mega_scale.model.norm import MegaSequenceNorm
from mega_scale.model.positional_bias import positional_bias
from mega_scale.ops.attention import chunk_attention


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
        self.rel_pos_bias = positional_bias(config)

    def project(self, encoder: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, S, Z) and values (B, S, D) of an encoder's output (B, S, D)."""
        return apply_linear(self.k_proj, encoder), self.activation(apply_linear(self.v_proj, encoder))

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
        """Update the residual stream.

        Args:
            x: (B, L, D).
            keys: of the encoder's output, (B, S, Z).
            values: likewise, (B, S, D).
            key_mask: (B, S) bool, true for valid positions of the encoder.
            offset: position of the first token of x, one number or (B,).
            return_weights: whether to return attention weights.
            mask: (B, L) bool, true for valid positions of x, for batch norms.

        Returns:
            (B, L, D), and weights (B, L, S) or none.
        """
        config = self.config
        prenorm = config.normalize_before_mega
        update, gate, q = apply_linear(self.q_proj, self.norm(x, mask) if prenorm else x).split(
            [config.hidden_size, config.hidden_size, config.shared_representation_size], -1
        )
        eager = config._attn_implementation == "eager" or return_weights
        attended, weights = chunk_attention(
            q.unsqueeze(1), keys.unsqueeze(1), self.hidden_dropout(values).unsqueeze(1),
            self.rel_pos_bias(x.shape[1], keys.shape[1], offset),
            activation=config.attention_activation,
            offset=offset,
            key_mask=None if key_mask is None else key_mask.unsqueeze(1),
            dropout=config.attention_probs_dropout_prob if self.training else 0.0,
            return_weights=return_weights,
            impl="eager" if eager else "auto",
        )  # fmt: skip
        hidden = self.dropout(self.activation(apply_linear(self.h_proj, attended.squeeze(1) * F.silu(gate))))
        out = torch.addcmul(x, torch.sigmoid(update), hidden - x)
        if not prenorm:
            out = self.norm(out, mask)
        return out, None if weights is None else weights.squeeze(1)
