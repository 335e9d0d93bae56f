"""Activation checkpointing: which blocks drop their activations and recompute them in the backward pass."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from mega_scale.parallel.sequence import Kept
from mega_scale.parallel.structure import blocks


def checkpoint_activations(model: nn.Module, every: int, kept: Kept) -> None:
    """Turn checkpointing on for every n-th block; names of parameters stay as they are.

    Blocks are transformers' GradientCheckpointingLayer, which checkpoints its `forward` when training, with the
    function set here. Dropout depends on places, so no random numbers have to be replayed.

    Args:
        model: a `MegaForCausalLM`, changed in place.
        every: 0 for no block, 1 for every block, n for the n-th, the 2n-th, ... block.
        kept: what blocks receive from other ranks of `sp`, so that recomputing them needs no communication.
    """
    for number, block in enumerate(blocks(model), start=1):
        block.gradient_checkpointing = every > 0 and number % every == 0
        vars(block)["_gradient_checkpointing_func"] = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=kept.contexts
        )
