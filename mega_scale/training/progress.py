"""How far a run is, and what of it stands in a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mega_scale.training.bad_steps import BadSteps, BadStepsConfig


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
        """A run that has done nothing.

        Args:
            config: what counts as a bad step.
        """
        return cls(0, 0, BadSteps(config))

    @classmethod
    def resume(cls, folder: Path, state: dict[str, Any], config: BadStepsConfig) -> "Progress":
        """A run as a checkpoint has it.

        Args:
            folder: of the checkpoint.
            state: what its `trainer.json` holds.
            config: what counts as a bad step from now on.
        """
        bad = BadSteps.load(config, state.get("bad_steps"))
        return cls(state["step"], state["tokens"], bad, state.get("validation"), state["step"], folder)

    @property
    def position(self) -> int:
        """Steps of data before the next optimizer step, those left out included."""
        return self.bad.data_step(self.step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON, of which `resume` makes the same again."""
        found = {"step": self.step, "tokens": self.tokens, "bad_steps": self.bad.state_dict()}
        return found if self.evaluation is None else found | {"validation": self.evaluation}

    def go_back(self, folder: Path, state: dict[str, Any]) -> list[int]:
        """Become what a checkpoint has, and leave out the data of the bad steps that led back to it.

        Args:
            folder: of the checkpoint.
            state: what its `trainer.json` holds.

        Returns:
            What is left out, [first, end) in steps of data.
        """
        then = Progress.resume(folder, state, self.bad.config)
        skipped = self.bad.after_rollback(then.bad, self.step, then.step)
        self.step, self.tokens, self.bad, self.evaluation = then.step, then.tokens, then.bad, then.evaluation
        self.saved, self.folder = then.saved, folder
        return skipped
