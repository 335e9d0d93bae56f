"""Steps that must not change the model: a loss or gradient that is NaN or infinite, or a loss that jumps.

No rank takes such a step. They are counted; too many in a row end the run, or take it back to its last checkpoint, from
where it goes on without the data that did it.
"""

import math
import statistics
from collections import deque
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
        if self.in_a_row < 1:
            raise ValueError(f"bad_steps.in_a_row={self.in_a_row} is not possible: it must be at least 1")
        if self.rollbacks < 0:
            raise ValueError(f"bad_steps.rollbacks={self.rollbacks} is not possible: it must be 0 or above")
        if self.rollbacks and not checkpoint_every:
            raise ValueError(
                f"bad_steps.rollbacks={self.rollbacks} goes back to checkpoints, but checkpoint.every=0 writes none "
                "before the end: set checkpoint.every, or rollbacks=0"
            )
        if not 0 <= self.spike_deviations < math.inf:
            raise ValueError(
                f"bad_steps.spike_deviations={self.spike_deviations} is not possible: it must be 0, for none, or above"
            )
        if self.spike_window < 2:
            raise ValueError(f"bad_steps.spike_window={self.spike_window} is not possible: it must be at least 2")


class BadStepsError(FloatingPointError):
    """Too many bad steps in a row; says what to do. Raised on all ranks alike."""


@dataclass
class BadSteps:
    """What a run remembers of its bad steps; the same on all ranks.

    Args:
        config: what counts as bad.
        total: bad steps so far.
        row: bad steps since the last good one.
        rollbacks: how often the run went back.
        losses: of the last good steps, nats per token.
        skipped: data steps to skip, in order, [first, end) each. Without any, optimizer step s takes data step s - 1.
    """

    config: BadStepsConfig
    total: int = 0
    row: int = 0
    rollbacks: int = 0
    losses: deque[float] = field(default_factory=deque)
    skipped: list[list[int]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON, of which `load` makes the same again, to the bit."""
        return {
            "total": self.total,
            "in_a_row": self.row,
            "rollbacks": self.rollbacks,
            "losses": list(self.losses),
            "skipped": [list(part) for part in self.skipped],
        }

    @classmethod
    def load(cls, config: BadStepsConfig, state: dict[str, Any] | None) -> "BadSteps":
        """Go on from what `state_dict` gave; None at the start of a run, or where a checkpoint has none."""
        if state is None:
            return cls(config)
        losses = deque(state["losses"][-config.spike_window :] if config.spike_deviations else [])
        skipped = [list(part) for part in state["skipped"]]
        return cls(config, state["total"], state["in_a_row"], state["rollbacks"], losses, skipped)

    def data_step(self, step: int) -> int:
        """Data step of an optimizer step (1 for the first): data steps before it, skipped ones included."""
        position = step - 1
        for first, end in self.skipped:
            if position >= first:
                position += end - first
        return position

    def problem(self, loss: float) -> str | None:
        """What is wrong with a loss (nats per token), in words; None for a good one. Changes nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not self.config.spike_deviations or len(self.losses) < self.config.spike_window:
            return None
        mean = statistics.fmean(self.losses)
        limit = mean + self.config.spike_deviations * statistics.pstdev(self.losses, mean)
        return f"the loss {loss:.4f} is above {limit:.4f}, the limit for spikes" if loss > limit else None

    def good(self, loss: float) -> None:
        """Count a step that was taken, by the loss of its global batch (nats per token)."""
        self.row = 0
        if self.config.spike_deviations:
            self.losses.append(loss)
            while len(self.losses) > self.config.spike_window:
                self.losses.popleft()

    def bad(self) -> None:
        """Count a step that was not taken."""
        self.row += 1
        self.total += 1

    @property
    def too_many(self) -> bool:
        """Whether so many came in a row that the run cannot go on as it is."""
        return self.row >= self.config.in_a_row

    def after_rollback(self, back: "BadSteps", step: int, back_to: int) -> list[int]:
        """Take over what was learnt since a checkpoint, when a run has gone back to it.

        Args:
            back: as the checkpoint has it; becomes what to go on with.
            step: the last bad step.
            back_to: step of the checkpoint.

        Returns:
            Data steps to skip, as [first, end): the bad steps after the restored checkpoint.
        """
        first = max(step - self.row, back_to) + 1
        skipped = [self.data_step(first), self.data_step(step) + 1]
        inside = [part for part in back.skipped if skipped[0] <= part[0] and part[1] <= skipped[1]]
        back.skipped = sorted([*(part for part in back.skipped if part not in inside), skipped])
        back.rollbacks, back.total, back.row = self.rollbacks + 1, self.total, 0
        return skipped


def rows_of(position: int, shares: "Tensor", ranks: "MeshShape", rows: int) -> tuple[list[int], list[str]]:
    """Say where in the data a bad step was.

    Args:
        position: data steps before it.
        shares: (ranks, micro-batches) losses of each rank's micro-batches.
        ranks: the device mesh.
        rows: in a micro-batch.

    Returns:
        Rows of the run's data that the step took, [first, end), and for each micro-batch whose loss is not finite, its
        rank and rows in words.
    """
    micro_batches = shares.shape[1]
    first = position * micro_batches * ranks.dp * rows
    found = []
    for rank, i in (~shares.isfinite()).nonzero().tolist():
        begin = first + (i * ranks.dp + ranks.dp_rank(rank)) * rows
        found.append(f"rank {rank}, rows {begin} to {begin + rows - 1}")
    return [first, first + micro_batches * ranks.dp * rows], found


@dataclass
class Progress:
    """How far a run is; the same on all ranks.

    Args:
        step: optimizer steps done, bad ones included.
        tokens: seen in them.
        bad: its bad steps.
        evaluation: figures of the model as it is; none where it was not evaluated.
        saved: optimizer steps in the newest checkpoint, None where there is none.
        folder: of that checkpoint.
    """

    step: int
    tokens: int
    bad: BadSteps
    evaluation: dict[str, Any] | None = None
    saved: int | None = None
    folder: Path | None = None

    @classmethod
    def begin(cls, config: BadStepsConfig) -> "Progress":
        """A run that has done nothing."""
        return cls(0, 0, BadSteps(config))

    @classmethod
    def resume(cls, folder: Path, state: dict[str, Any], config: BadStepsConfig) -> "Progress":
        """A run as `trainer.json` of a checkpoint's folder has it."""
        bad = BadSteps.load(config, state.get("bad_steps"))
        return cls(state["step"], state["tokens"], bad, state.get("validation"), state["step"], folder)

    @property
    def position(self) -> int:
        """Data steps before the next optimizer step, skipped ones included."""
        return self.bad.data_step(self.step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON, of which `resume` makes the same again."""
        found = {"step": self.step, "tokens": self.tokens, "bad_steps": self.bad.state_dict()}
        return found if self.evaluation is None else found | {"validation": self.evaluation}

    def go_back(self, folder: Path, state: dict[str, Any]) -> list[int]:
        """Become what a checkpoint has, and return the data steps to skip from now on, [first, end)."""
        then = Progress.resume(folder, state, self.bad.config)
        skipped = self.bad.after_rollback(then.bad, self.step, then.step)
        self.step, self.tokens, self.bad, self.evaluation = then.step, then.tokens, then.bad, then.evaluation
        self.saved, self.folder = then.saved, folder
        return skipped
