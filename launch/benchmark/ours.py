"""Our models of the benchmarks' sizes: a Mega, and a Megalodon of as many parameters."""

from typing import Any

import torch

from mega_scale import MegaConfig, MegaForCausalLM, MegalodonConfig, MegalodonForCausalLM

from .peers import mega_arguments

_GROUP = 16  # channels of a group of the timestep norms
_STEP = 16  # channels by which the feed-forward network's width is chosen


def count_parameters(config: MegaConfig | MegalodonConfig) -> int:
    """Parameters of a configuration's model, each of tied ones once."""
    with torch.device("meta"):
        kind: Any = MegaForCausalLM if isinstance(config, MegaConfig) else MegalodonForCausalLM
        total: int = kind(config).num_parameters()
    return total


def megalodon_config(sizes: dict[str, Any]) -> MegalodonConfig:
    """A Megalodon without dropout of the sizes of `peers.mega_arguments`, with tied embeddings and one head; its
    feed-forward network is as wide as gives it the parameters of our Mega. Raises ValueError for `chunk` 0."""

    def of_width(width: int) -> MegalodonConfig:
        return MegalodonConfig(
            vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"],
            shared_representation_size=sizes["shared"], intermediate_size=sizes["values"], nffn_hidden_size=width,
            ema_projection_size=sizes["states"], chunk_size=sizes["chunk"], tie_word_embeddings=True,
            timestep_norm_groups=max(sizes["hidden"] // _GROUP, 1),
        )  # fmt: skip

    least = count_parameters(of_width(_STEP))
    left = count_parameters(MegaConfig(**mega_arguments(sizes))) - least
    return of_width(_STEP + _STEP * max(round(left / (2 * sizes["layers"] * sizes["hidden"] * _STEP)), 0))
