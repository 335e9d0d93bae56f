"""The normalised feed-forward network that ends a Mega block.

Legend: B batch, L length, D channels.
"""

from contextlib import nullcontext

from torch import Tensor, nn

from mega_scale.model.activation import MegaActivation
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.dropout import MegaDropout
from mega_scale.model.linear import apply_linear
from mega_scale.model.norm import MegaSequenceNorm
from mega_scale.ops.remake import remade


class MegaNormalizedFeedForwardNetwork(nn.Module):
    """`x + dropout(fc2(dropout(act(fc1(norm x)))))`, the norm after the sum when not pre-norm."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.prenorm = config.normalize_before_ffn
        self.activation = MegaActivation(config.activation)
        self.norm = MegaSequenceNorm(config.normalization_type, config.hidden_size, config.norm_affine)
        self.fc1 = nn.Linear(config.hidden_size, config.nffn_hidden_size)
        self.fc2 = nn.Linear(config.nffn_hidden_size, config.hidden_size)
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.nffn_activation_dropout_prob, config.use_feature_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, recomputed: bool = False) -> Tensor:
        """Update the residual stream.

        Args:
            x: (B, L, D).
            mask: (B, L) bool, true for valid positions, for batch norms.
            recomputed: whether activation checkpointing will compute all of this again.
        """
        normed = self.norm(x, mask) if self.prenorm else x
        # Statistics of a batch are counted once.
        keeps = recomputed or not self.prenorm or self.norm.over_batch
        with nullcontext() if keeps else remade(normed, lambda: self.norm(x, mask)):
            pre = apply_linear(self.fc1, normed)
        active = self.activation(pre)
        hidden = self.hidden_dropout(active)
        with nullcontext() if recomputed else remade(active, lambda: self.activation(pre)):
            out = x + self.dropout(apply_linear(self.fc2, hidden))
        return out if self.prenorm else self.norm(out, mask)
