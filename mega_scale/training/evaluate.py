"""Loss on held-out text: nats per token, perplexity, bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mega_scale.parallel import World


class Evaluation(NamedTuple):
    """How well a model predicts a text.

    Args:
        loss: nats per token.
        perplexity: exp of the loss.
        bits_per_byte: bits per byte of the text.
        tokens: predicted tokens.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    module: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    tokens_per_byte: float,
    world: World,
    every_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model; collective, every rank has the same number of batches.

    Args:
        module: the model.
        batches: this rank's, `input_ids` and `shift_labels` (B, L) int64 each; -100 is not counted.
        tokens_per_byte: tokens of the text divided by its UTF-8 bytes.
        world: all ranks.
        every_batch: called after each batch, to show progress.

    Returns:
        The same figures on all ranks.

    Raises:
        ValueError: the text has no token to predict.
    """
    was_training = module.training
    module.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        labels = batch["shift_labels"].to(world.device)
        loss = module(
            input_ids=batch["input_ids"].to(world.device), shift_labels=labels, num_items_in_batch=1, use_cache=False
        ).loss
        totals += torch.stack([loss.double(), (labels != -100).sum().double()])
        every_batch()
    module.train(was_training)
    nats, tokens = world.sum(totals).tolist()
    if tokens == 0:
        raise ValueError("the text has no token to predict: give a longer one, or a shorter data.sequence_length")
    loss = nats / tokens
    return Evaluation(loss, math.exp(min(loss, 700.0)), loss * tokens_per_byte / math.log(2), int(tokens))
