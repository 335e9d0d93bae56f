"""An exponential average of a model's weights, divided over ranks as the weights are: each averages what it steps."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class WeightAverage:
    """The average of trained weights after each step taken, a step's weight being `decay` times that of the next.

    The weights before the first step have no part in it: after n steps, those of step i count in proportion to
    decay^(n - i), and the shares add up to 1. So it is of use from the first step on, as Adam's moments are after their
    correction. `tensors` are fp32 and lie where the weights lie; `steps` is how many are averaged, a scalar int64
    tensor that checkpoints hold, and that `number` reads.
    """

    def __init__(self, decay: float, weights: Mapping[str, Tensor], number: Callable[[Tensor], float] = float) -> None:
        self._decay, self._weights, self._number = decay, list(weights.values()), number
        self.tensors = {name: weight.detach().clone() for name, weight in weights.items()}
        self.steps = torch.zeros((), dtype=torch.int64, device="cpu")

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after a step."""
        self.steps += 1
        share = (1 - self._decay) / (1 - self._decay ** self._number(self.steps))
        torch._foreach_lerp_(list(self.tensors.values()), self._weights, share)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average where the weights are, and the weights where it is; a second call undoes it, to the bit."""
        for average, weight in zip(self.tensors.values(), self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
