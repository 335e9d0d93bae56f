"""Where the parts of a Mega language model are that sharding treats apart."""

from typing import cast

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """List the Mega blocks, first to last.

    Args:
        model: a `MegaForCausalLM`.

    Returns:
        Its blocks.
    """
    return [cast(GradientCheckpointingLayer, block) for block in model.get_submodule("mega.layers").children()]


def ema_of(block: nn.Module) -> nn.Module:
    """Find the moving average of a block, whose parameters stay fp32 in compute.

    Args:
        block: one of `blocks(model)`.

    Returns:
        The module that holds the EMA's parameters.
    """
    return block.get_submodule("mega_layer.ema_gate")
