"""A Mega block: gated attention with its moving average, then the feed-forward network.

Legend: B batch, L length, D channels.
"""

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from mega_scale.model.attention import MegaMovingAverageGatedAttention
from mega_scale.model.cache import LayerState
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.feed_forward import MegaNormalizedFeedForwardNetwork


class MegaBlock(GradientCheckpointingLayer):
    """One layer of a Mega model: the unit of activation checkpointing and of sharding."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.mega_layer = MegaMovingAverageGatedAttention(config)
        self.nffn = MegaNormalizedFeedForwardNetwork(config) if config.use_normalized_ffn else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """Update the residual stream x (B, L, D); arguments and results as in `MegaMovingAverageGatedAttention`."""
        x, weights, state = self.mega_layer(x, mask, state, return_state, return_weights)
        if self.nffn is not None:
            x = self.nffn(x, None if mask is None else mask[:, -x.shape[1] :])
        return x, weights, state
