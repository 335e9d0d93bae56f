"""Positional biases of attention scores, with the parameters of transformers 4.37.2.

Legend: Z width of queries and keys, I queries, J keys.
"""

import torch
from torch import Tensor, nn

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.ops.attention import key_minus_query, rotary_bias, simple_bias


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

    def forward(self, queries: int, keys: int, offset: int | Tensor) -> Tensor:
        """The bias of I queries from position `offset` on against J keys, (I + J - 1,), or (B, I + J - 1) for (B,)."""
        return rotary_bias(self.alpha, self.b_param, key_minus_query(queries, keys, offset, self.alpha.device))


def positional_bias(config: MegaConfig) -> nn.Module:
    """The bias module that `relative_positional_bias` names."""
    if config.relative_positional_bias == "simple":
        return MegaSimpleRelativePositionalBias(config)
    return MegaRotaryRelativePositionalBias(config)
