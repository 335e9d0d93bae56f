"""Loss on held-out text: nats per token, perplexity, bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mega_scale.parallel import World


class ShareOfLoss(Protocol):
    """Computes this rank's part of a loss."""

    def __call__(
        self, input_ids: Tensor, shift_labels: Tensor, num_items: int, *, document_starts: Tensor | None = None
    ) -> Tensor:
        """Sum of this rank's token losses over `num_items`, nats; arguments as in `Engine.forward`."""
        ...


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
    share: ShareOfLoss,
    batches: Iterable[dict[str, Tensor]],
    tokens_per_byte: float,
    world: World,
    every_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model; collective, every rank has the same number of batches.

    Args:
        module: the model.
        share: computes this rank's share of the loss with it, such as `Engine.forward`, or `loss_of(module)`.
        batches: this rank's, `input_ids` and `shift_labels` (B, L) int64 each; -100 is not counted; and perhaps
            `document_starts` (B, L) bool.
        tokens_per_byte: tokens of the text that the batches hold, divided by its UTF-8 bytes.
        world: all ranks.
        every_batch: called after each batch, to show progress; what it raises, on all ranks alike, ends the evaluation.

    Returns:
        The same figures on all ranks.

    Raises:
        ValueError: the text has no token to predict.
    """
    was_training = module.training
    module.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    counted = torch.zeros((), dtype=torch.int64, device=world.device)
    try:
        for batch in batches:
            given = {name: tensor.to(world.device) for name, tensor in batch.items()}
            labels = given["shift_labels"]
            total += share(given["input_ids"], labels, 1, document_starts=given.get("document_starts")).double()
            counted += (labels != -100).sum()
            every_batch()
    finally:
        module.train(was_training)
    nats, tokens = float(world.sum(total, alike=("tp",))), int(world.sum(counted, alike=("sp", "tp")))
    if tokens == 0:
        raise ValueError("the text has no token to predict: give a longer one, or a shorter data.sequence_length")
    loss = nats / tokens
    return Evaluation(loss, math.exp(min(loss, 700.0)), loss * tokens_per_byte / math.log(2), tokens)


def loss_of(module: nn.Module) -> ShareOfLoss:
    """Compute losses with a model that is whole on this rank."""

    def share(
        input_ids: Tensor, shift_labels: Tensor, num_items: int, *, document_starts: Tensor | None = None
    ) -> Tensor:
        return module(
            input_ids=input_ids,
            shift_labels=shift_labels,
            num_items_in_batch=num_items,
            document_starts=document_starts,
            use_cache=False,
            skip_logits=True,
        ).loss

    return share
