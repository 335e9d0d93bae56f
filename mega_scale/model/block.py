"""A Mega block: gated attention with its moving average, cross-attention in some decoders, feed-forward network.

Legend: B batch, L length, S encoder length, D channels.
"""

from typing import NamedTuple

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from mega_scale.model.attention import MegaMovingAverageGatedAttention
from mega_scale.model.cache import EncoderState, LayerState
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.cross_attention import MegaGatedCrossAttention
from mega_scale.model.documents import DocumentBorders
from mega_scale.model.feed_forward import MegaNormalizedFeedForwardNetwork


class BlockOutput(NamedTuple):
    """What a block returns.

    Args:
        x: the residual stream, (B, L, D).
        weights: of self-attention, or none.
        cross_weights: of cross-attention (B, L, S), or none.
        state: of self-attention after x, or none.
        encoder: keys and values of the encoder's output, or none.
    """

    x: Tensor
    weights: Tensor | None
    cross_weights: Tensor | None
    state: LayerState | None
    encoder: EncoderState | None


class MegaBlock(GradientCheckpointingLayer):
    """One layer of a Mega model: the unit of activation checkpointing and of sharding."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.mega_layer = MegaMovingAverageGatedAttention(config)
        self.cross_attn = MegaGatedCrossAttention(config) if config.add_cross_attention else None
        self.nffn = MegaNormalizedFeedForwardNetwork(config) if config.use_normalized_ffn else None

    @property
    def recomputed(self) -> bool:
        """Whether activation checkpointing computes this block again in the backward pass."""
        return self.training and bool(self.gradient_checkpointing)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        pads: Tensor | None = None,
        encoder_output: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        state: LayerState | None = None,
        encoder: EncoderState | None = None,
        return_state: bool = False,
        return_weights: bool = False,
        borders: DocumentBorders | None = None,
    ) -> BlockOutput:
        """Update the residual stream.

        Args:
            x: (B, L, D).
            mask: see `MegaMovingAverageGatedAttention`; so are `pads`, `state`, `return_state`, `return_weights`.
            pads: padding before each row's first token.
            encoder_output: (B, S, D); cross-attention only, and not needed with `encoder`.
            encoder_mask: (B, S) bool, true for valid positions.
            state: of the tokens before x.
            encoder: keys and values of the encoder's output, from an earlier call.
            return_state: whether to return states.
            return_weights: whether to return attention weights.
            borders: of the documents that share a row; without cross-attention only.
        """
        seen = 0 if state is None else state.position
        x, weights, state = self.mega_layer(
            x, mask, pads, state, return_state, return_weights, borders, self.recomputed
        )
        new_mask = None if mask is None else mask[:, -x.shape[1] :]
        cross_weights = None
        if self.cross_attn is not None:
            if encoder is None:
                assert encoder_output is not None, "MegaModel refuses cross-attention without an encoder's output"
                encoder = EncoderState(*self.cross_attn.project(encoder_output))
            offset = seen if pads is None else seen - pads
            x, cross_weights = self.cross_attn(
                x, encoder.keys, encoder.values, encoder_mask, offset, return_weights, new_mask
            )
        if self.nffn is not None:
            x = self.nffn(x, new_mask, self.recomputed)
        return BlockOutput(x, weights, cross_weights, state, encoder if return_state else None)
