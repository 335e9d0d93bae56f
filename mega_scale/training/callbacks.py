"""Classes of your own in a run, named in its settings: `Callback`, and what loads it by name."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mega_scale.settings import load_object

if TYPE_CHECKING:
    from mega_scale.checkpoint.saver import Saved
    from mega_scale.training.trainer import StepResult, Trainer


class Callback:
    """What a run calls on every rank, in the same order on all of them; override what you need.

    A method may use `trainer.world`, whose methods are collective, and report figures of its own by
    `trainer.reporter.values(step, name, figures)`. What it raises ends the run.
    """

    def on_start(self, trainer: "Trainer") -> None:
        """The engine is built and its state loaded; the first step comes next."""

    def on_step(self, trainer: "Trainer", step: int, result: "StepResult") -> None:
        """An optimizer step was done, or was bad and not taken (`result.problem`)."""

    def on_evaluation(self, trainer: "Trainer", step: int, values: Mapping[str, Any]) -> None:
        """The model was evaluated: loss (nats per token), perplexity, bits_per_byte, tokens."""

    def on_save(self, trainer: "Trainer", saved: "Saved") -> None:
        """A checkpoint was written and read back, or could not be (`saved.problem`)."""

    def on_end(self, trainer: "Trainer", stopped: str | None) -> None:
        """The run ends with its last checkpoint written; `stopped` says why before its last step, if so."""


def load_callbacks(names: Sequence[str]) -> list[Callback]:
    """One of each class that `train.callbacks` names. Raises ValueError where there is none."""
    made = []
    for name in names:
        kind = load_object(name, "train.callbacks", "name a class as MODULE:CLASS or FILE.py:CLASS")
        if not (isinstance(kind, type) and issubclass(kind, Callback)):
            raise ValueError(f"train.callbacks={name!r}: it is no subclass of mega_scale.training.callbacks.Callback")
        made.append(kind())
    return made
