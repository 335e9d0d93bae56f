"""How far a run is, and its steps that must not change the model: a loss or gradient that is not finite, or jumps.

No rank takes such a step. They are counted; too many in a row end the run, or take it back to its last checkpoint, from
where it goes on without the data that did it.
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mega_scale.parallel.mesh import MeshShape

DIVERGED = 65
"""Exit code of a run that ends because of bad steps in a row (EX_DATAERR: starting it again as it is does not help)."""


@dataclass
class BadStepsConfig:
    """What happens to steps whose loss or gradient is not finite, or whose loss jumps."""

    in_a_row: int = 5
    """Bad steps, one after the other, after which the run ends, or goes back to its last checkpoint (steps)."""

    rollbacks: int = 0
    """How often the run goes back and leaves out the data of those steps, before it ends; 0 never (times)."""

    spike_deviations: float = 0.0
    """A loss this many standard deviations above the mean of recent ones makes a bad step; 0 for no limit (no unit)."""

    spike_window: int = 100
    """Recent good steps from which that mean and deviation are taken; before as many, none is a spike (steps)."""

    def validate(self, checkpoint_every: int) -> None:
        """Refuse values that cannot be meant; `checkpoint_every` is 0 where no checkpoint is written before the end."""
        for key, valid, remedy in (
            ("in_a_row", self.in_a_row >= 1, "at least 1"),
            ("rollbacks", self.rollbacks >= 0, "0 or above"),
            ("spike_deviations", 0 <= self.spike_deviations < math.inf, "0, for none, or above"),
            ("spike_window", self.spike_window >= 2, "at least 2"),
        ):
            if not valid:
                raise ValueError(f"bad_steps.{key}={getattr(self, key)} is not possible: it must be {remedy}")
        if self.rollbacks and not checkpoint_every:
            raise ValueError(
                f"bad_steps.rollbacks={self.rollbacks} goes back to checkpoints, but checkpoint.every=0 writes none "
                "before the end: set checkpoint.every, or rollbacks=0"
            )


class BadStepsError(FloatingPointError):
    """Too many bad steps in a row; says what to do. Raised on all ranks alike."""


@dataclass
class BadSteps:
    """What a run remembers of its bad steps, and what `trainer.json` has of it."""

    total: int = 0
    in_a_row: int = 0  # since the last good one
    rollbacks: int = 0  # how often the run went back
    losses: list[float] = field(default_factory=list)  # of the last good steps, nats per token
    # Data steps to skip, in order, [first, end) each. Without any, optimizer step s takes data step s - 1.
    skipped: list[list[int]] = field(default_factory=list)


@dataclass
class Progress:
    """How far a run is; the same on all ranks."""

    config: BadStepsConfig
    step: int = 0  # optimizer steps done, bad ones included
    tokens: int = 0  # seen in them
    bad: BadSteps = field(default_factory=BadSteps)
    evaluation: dict[str, Any] | None = None  # figures of the model as it is; None where it was not evaluated
    saved: int | None = None  # optimizer steps in the newest checkpoint, None where there is none
    folder: Path | None = None  # of that checkpoint

    @classmethod
    def resume(cls, config: BadStepsConfig, folder: Path, state: dict[str, Any]) -> "Progress":
        """A run as `trainer.json` of a checkpoint's folder has it; the oldest ones know of no bad steps."""
        bad = BadSteps(**state.get("bad_steps", {}))
        bad.losses = bad.losses[-config.spike_window :] if config.spike_deviations else []
        return cls(config, state["step"], state["tokens"], bad, state.get("validation"), state["step"], folder)

    def data_step(self, step: int) -> int:
        """Data step of an optimizer step (1 for the first): data steps before it, skipped ones included."""
        position = step - 1
        for first, end in self.bad.skipped:
            if position >= first:
                position += end - first
        return position

    def problem(self, loss: float) -> str | None:
        """What is wrong with a loss (nats per token), in words; None for a good one. Changes nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        losses = self.bad.losses
        if not self.config.spike_deviations or len(losses) < self.config.spike_window:
            return None
        mean = statistics.fmean(losses)
        limit = mean + self.config.spike_deviations * statistics.pstdev(losses, mean)
        return f"the loss {loss:.4f} is above {limit:.4f}, the limit for spikes" if loss > limit else None

    def count(self, tokens: int, loss: float, taken: bool) -> None:
        """Count a step by the tokens and the loss of its global batch (nats per token), taken or bad."""
        self.step, self.tokens, self.evaluation = self.step + 1, self.tokens + tokens, None
        if not taken:
            self.bad.in_a_row += 1
            self.bad.total += 1
            return
        self.bad.in_a_row = 0
        if self.config.spike_deviations:
            self.bad.losses = [*self.bad.losses, loss][-self.config.spike_window :]

    def go_back(self, folder: Path, state: dict[str, Any]) -> list[int]:
        """Become what a checkpoint has, and return the data steps to skip from now on, [first, end).

        Those are the bad steps after that checkpoint.
        """
        then = Progress.resume(self.config, folder, state)
        first = max(self.step - self.bad.in_a_row, then.step) + 1
        skipped = [self.data_step(first), self.data_step(self.step) + 1]
        outside = [part for part in then.bad.skipped if part[0] < skipped[0] or part[1] > skipped[1]]
        then.bad.skipped = sorted([*outside, skipped])
        then.bad.rollbacks, then.bad.total, then.bad.in_a_row = self.bad.rollbacks + 1, self.bad.total, 0
        vars(self).update(vars(then))
        return skipped


def rows_of(position: int, shares: "Tensor", ranks: "MeshShape", rows: int) -> tuple[list[int], list[str]]:
    """Say where in the data a bad step was.

    Args:
        position: data steps before it.
        shares: (ranks, micro-batches) losses of each rank's micro-batches.
        ranks: the device mesh.
        rows: in a micro-batch.

    Returns rows of the run's data that the step took, [first, end), and for each micro-batch whose loss is not finite,
    its rank and rows in words.
    """
    micro_batches = shares.shape[1]
    first = position * micro_batches * ranks.dp * rows
    found = []
    for rank, i in (~shares.isfinite()).nonzero().tolist():
        begin = first + (i * ranks.dp + ranks.dp_rank(rank)) * rows
        found.append(f"rank {rank}, rows {begin} to {begin + rows - 1}")
    return [first, first + micro_batches * ranks.dp * rows], found
