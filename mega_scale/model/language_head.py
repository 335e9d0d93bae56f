"""The loss of the layer over the vocabulary, without its logits where that can be.

Legend: B batch, L length, D channels, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mega_scale.model.linear import plain_linear
from mega_scale.ops.cross_entropy import linear_cross_entropy


class LanguageModelHead(nn.Linear):
    """A linear layer that can also take targets, whatever hooks it has: what trainers make of it."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or a loss.

        Args:
            input: (B, L, D).
            targets: (B, L) int64, -100 where there is none.

        Returns:
            (B, L, V) without targets; with them a scalar in fp32, nats, summed over targets.
        """
        if targets is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, self.bias, targets.to(input.device))


def summed_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a head's logits, summed over targets, in fp32 and nats.

    A few tokens at a time, except where the head is not linear itself (quantised, adapted, watched): then of whole
    logits.

    Args:
        head: makes logits (B, L, V) of x.
        x: (B, L, D).
        targets: (B, L) int64, -100 where there is none.
    """
    targets = targets.to(x.device)
    if isinstance(head, LanguageModelHead):
        loss: Tensor = head(x, targets)
        return loss
    plain = plain_linear(head)
    if plain is not None:
        return linear_cross_entropy(x, plain.weight, plain.bias, targets)
    logits = head(x).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.to(logits.device).flatten(), ignore_index=-100, reduction="sum")
