"""The normalised feed-forward network that ends a Mega block.

Legend: B batch, L length, D channels.
"""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.dropout import MegaDropout
from mega_scale.model.norm import MegaSequenceNorm


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
        """x (B, L, D); mask (B, L) bool marks valid positions, for batch norms."""
        hidden = self.norm(x, mask) if self.prenorm else x
        hidden = self.hidden_dropout(self.activation(self.fc1(hidden)))
        out = x + self.dropout(self.fc2(hidden))
        return out if self.prenorm else self.norm(out, mask)
