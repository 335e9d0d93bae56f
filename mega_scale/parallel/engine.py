"""What the training loop asks of an engine, whichever shards the model."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from mega_scale.parallel.state import EngineState
from mega_scale.parallel.window import START, Place

BuildOptimizer = Callable[[nn.Module], Optimizer]
"""Makes AdamW over the parameters of a model that an engine has sharded."""


class Engine(Protocol):
    """A sharded model with its optimizer; every method is collective unless it says otherwise."""

    module: nn.Module
    """The model; call it on all ranks alike for evaluation and generation, under `no_grad`."""

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        num_items: int,
        place: Place = START,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Loss of one micro-batch of this rank: the sum over its tokens divided by `num_items`.

        Args:
            input_ids: (B, L) int64, whole rows; ranks that share them are given the same.
            shift_labels: (B, L) int64, the next tokens, -100 where there is none.
            num_items: labelled tokens of the global batch, over all ranks and micro-batches.
            place: of the micro-batch in the run, on which dropout depends.
            document_starts: (B, L) bool, true at the first token of every document that shares a row with others;
                given to all ranks or to none.

        Returns:
            Scalar fp32, nats. The loss of the global batch is the sum over micro-batches and over ranks, of which those
            along `tp` hold the same.
        """
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of the loss of all ranks.

        Args:
            loss: what `forward` returned.
            last: whether this is the last micro-batch of the step.
        """
        ...

    def step(self, lr: float, skip: bool = False) -> float:
        """Clip the gradients, take one AdamW step, and forget the gradients.

        Where the norm is not finite, on all ranks alike, none of them takes the step: the gradients are forgotten, and
        weights, moments and counts of steps stay as they are, to the bit.

        Args:
            lr: learning rate of this step, absolute.
            skip: do not take the step, whatever the norm; the same on all ranks.

        Returns:
            L2 norm of the whole gradient before clipping; inf or NaN where it is not finite.
        """
        ...

    def state(self) -> EngineState:
        """Model and optimizer as this rank holds them, between two steps; not collective.

        Returns:
            Views of the engine's memory: read them to save, write into them to load, and then call `loaded`.
        """
        ...

    def loaded(self, step: int) -> None:
        """Have whatever depends on the state follow after it was written; settings stay this run's.

        Args:
            step: optimizer steps of the run before.
        """
        ...

    def held(self, name: str) -> Tensor:
        """What this rank holds of a parameter, flat; not collective.

        Args:
            name: of the parameter in `module`.
        """
        ...

    def part(self, name: str, value: Tensor) -> Tensor:
        """What this rank would hold of a value in a parameter's place, in the form of `held`; not collective.

        Args:
            name: of the parameter in `module`.
            value: whole, or this rank's part along `tp`.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; needs no other rank, and may be called after an error or twice."""
        ...
