"""Dropout of elements, of whole features of a sequence, and of attention weights."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class MegaDropout(nn.Module):
    """Zeroes elements with probability p while training; featurewise: one draw for a feature of a sequence."""

    def __init__(self, p: float, featurewise: bool = False) -> None:
        super().__init__()
        self.p = float(p)
        self.featurewise = featurewise

    @property
    def drops(self) -> bool:
        """Whether it does anything now."""
        return self.training and self.p > 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D)."""
        if not self.drops:
            return x
        if self.featurewise:
            return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)
        return F.dropout(x, self.p)


class MegaAttentionDropout(nn.Module):
    """Says how attention weights are dropped while training; a fused attention drops them itself.

    A module only to know whether it is training: what `rule` returns is no tensor, so it cannot be a forward.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = float(p)

    def rule(self) -> float | Callable[[Tensor], Tensor]:
        """A probability, or a function of weights (B, K, I, J)."""
        return self.p if self.training else 0.0
