"""Settings of the training loop: how long, how much a step, how often it reports, and what ends it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mega_scale.process import STOP_SIGNALS
from mega_scale.settings import require, require_ranges

# Signals with which a process may be asked to end; others stand for faults, or for what Python itself needs.
SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")

# Below three quarters of parallel.timeout_s, ranks can still tell each other where they stand before collectives fail.
_LARGEST_SHARE = 0.75
_DEFAULT_SHARE = 0.5


@dataclass
class TrainConfig:
    """How long to train, how much text a step takes, and how often the run reports."""

    steps: int = 1000
    """Optimizer steps of the whole run, those before a resume included (steps)."""

    global_batch_size: int = 32
    """Sequences in one optimizer step, over all ranks and micro-batches (sequences)."""

    micro_batch_size: int = 8
    """Sequences in one forward pass of one rank (sequences)."""

    seed: int = 0
    """Seed of the initial weights, of dropout and of generated samples (no unit)."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of forward and backward; master weights and EMA parameters are fp32 in either (no unit)."""

    compile: bool = False
    """Whether torch.compile fuses the arithmetic between matrix products, a minute once (no unit)."""

    log_every: int = 10
    """Steps between two console lines and TensorBoard points (steps)."""

    eval_every: int = 0
    """Steps between two evaluations on the validation text; 0 evaluates only at the end (steps)."""

    eval_batches: int = 0
    """Global batches in one evaluation; 0 takes the whole validation text (batches)."""

    sample_every: int = 0
    """Steps between two generated samples; 0 generates none (steps)."""

    sample_tokens: int = 200
    """Length of a generated sample, without its prompt (tokens)."""

    sample_prompt: str = "def "
    """Text that a generated sample continues (text)."""

    tensorboard: bool = True
    """Whether to write TensorBoard events to the tensorboard folder in run_dir (no unit)."""

    stop_signals: list[str] = field(default_factory=lambda: list(STOP_SIGNALS))
    """Signals, on any one rank, after which the run finishes its step, saves and ends with exit code 85; after Ctrl-C
    (SIGINT), a second one ends it at once (names)."""

    max_time: int | str | None = None
    """Save and end with exit code 85 before this much has passed since the start: 13800, or "3:50:00" (seconds)."""

    hang_timeout_s: float = -1.0
    """Without progress for so long, ranks print their stacks and end; 0 never, -1 parallel.timeout_s / 2 (seconds)."""

    slow_rank_factor: float = 2.0
    """Name ranks that wait for data or compute longer than this many times the median rank; 0 for not (no unit)."""

    def hang_timeout(self, timeout_s: float) -> float:
        """Seconds without progress after which the run ends, 0 for never; `timeout_s` is `parallel.timeout_s`."""
        return _DEFAULT_SHARE * timeout_s if self.hang_timeout_s == -1 else self.hang_timeout_s

    def validate(self, timeout_s: float) -> None:
        """Refuse values that cannot be meant; `timeout_s` is `parallel.timeout_s`. Raises ValueError."""
        require(self.dtype in ("fp32", "bf16"), "train.dtype", self.dtype, "choose fp32 or bf16")
        require_ranges(
            "train",
            self,
            positive=("steps", "global_batch_size", "micro_batch_size", "log_every", "sample_tokens"),
            not_negative=("seed", "eval_every", "eval_batches", "sample_every"),
        )
        check_signals(self.stop_signals)
        if self.max_time is not None:
            seconds_of(self.max_time)
        if self.hang_timeout_s != -1 and not 0 <= self.hang_timeout_s <= _LARGEST_SHARE * timeout_s:
            raise ValueError(
                f"train.hang_timeout_s={self.hang_timeout_s:g} with parallel.timeout_s={timeout_s:g} is not possible: "
                f"give at most {_LARGEST_SHARE * timeout_s:g}, so that ranks can say where they stand before the others"
                " give up waiting, -1 for half of it, 0 for never, or raise parallel.timeout_s"
            )
        if not (self.slow_rank_factor == 0 or 1 < self.slow_rank_factor < math.inf):
            raise ValueError(
                f"train.slow_rank_factor={self.slow_rank_factor} is not possible: give more than 1, or 0 for no reports"
            )


def check_signals(names: Sequence[str]) -> None:
    """Refuse signals that cannot ask a run to stop. Raises ValueError, which names the signal and those that can."""
    for name in names:
        if name not in SIGNALS:
            raise ValueError(
                f"train.stop_signals={list(names)!r} has {name!r}, which cannot ask a run to stop: choose among "
                f"{', '.join(SIGNALS)}"
            )


def seconds_of(duration: str | int) -> float:
    """Seconds of a duration: a number, or "50:00" (minutes), "3:50:00" (hours), "1-03:50:00" (days, as Slurm has it).

    Raises ValueError where it is no duration above 0.
    """
    days, dash, rest = str(duration).rpartition("-")
    parts = rest.split(":")
    good = 1 <= len(parts) <= 3 and all(
        part.isascii() and part.isdigit() for part in [*parts, *([days] if dash else [])]
    )
    # Behind the first, minutes and seconds stay below 60; days are followed by hours.
    good = good and all(int(part) < 60 for part in parts[1:]) and (not dash or len(parts) == 3)
    seconds = sum(int(part) * 60**i for i, part in enumerate(reversed(parts))) if good else 0
    if good and dash:
        seconds += int(days) * 86400
    if seconds <= 0:
        raise ValueError(
            f'train.max_time={duration!r} is no duration: give seconds, or hours as "3:50:00", days as "1-03:50:00"'
        )
    return float(seconds)
