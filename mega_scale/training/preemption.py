"""A stop that was asked for from outside, by a signal or by the clock: all ranks agree on it, save, and end."""

import signal
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from mega_scale.parallel import World

STOPPED = 85
"""Exit code of a run that saved and stopped because it was asked to: start it again, and it goes on."""

# Signals with which a process may be asked to end; others stand for faults, or for what Python itself needs.
SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")

_MARGIN = 1.2  # steps and saves are not all alike
_TO_LEAVE_S = 2.0  # for leaving the process group, and for Python's end
_UNKNOWN_SAVE_S = 60.0
_UNKNOWN_SAVE_SHARE = 0.1


class StopRun(Exception):
    """All ranks agreed to stop; raised on all of them at the same place."""


def check_signals(names: Sequence[str]) -> None:
    """Refuse signals that cannot ask a run to stop.

    Raises:
        ValueError: names the signal and those that can.
    """
    for name in names:
        if name not in SIGNALS:
            raise ValueError(
                f"train.stop_signals={list(names)!r} has {name!r}, which cannot ask a run to stop: choose among "
                f"{', '.join(SIGNALS)}"
            )


def seconds_of(duration: str | int) -> float:
    """Read a duration.

    Args:
        duration: seconds, or text: "13800", "50:00" (minutes), "3:50:00" (hours), "1-03:50:00" (days, as Slurm has it).

    Returns:
        Seconds, above 0.

    Raises:
        ValueError: it is no duration above 0.
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


class TimeLimit:
    """Says when to stop, so that a save still fits before a limit counted from this process's start.

    It is time when what has passed, the longest step and the longest save so far, with a fifth more of both, would pass
    the limit. Before the first save, one is taken to last a minute, or a tenth of the limit if that is less.

    Args:
        limit_s: seconds from the start of this process to its end.
        since: when it started, seconds since the epoch; asked of the system where it is not given.
    """

    def __init__(self, limit_s: float, since: float | None = None) -> None:
        self._since = psutil.Process().create_time() if since is None else since
        self._limit_s = limit_s
        self._step_s = self._save_s = 0.0

    def step(self, seconds: float) -> None:
        """Count a step, from one look at the clock to the next."""
        self._step_s = max(self._step_s, seconds)

    def save(self, seconds: float) -> None:
        """Count a save."""
        self._save_s = max(self._save_s, seconds)

    def reached(self) -> bool:
        """Whether it is time to stop."""
        save = self._save_s or min(_UNKNOWN_SAVE_S, _UNKNOWN_SAVE_SHARE * self._limit_s)
        return time.time() - self._since + _MARGIN * (self._step_s + save) + _TO_LEAVE_S > self._limit_s


class Vote(NamedTuple):
    """What one rank says about stopping: the number of the signal that it got, 0 for none; whether its time is over."""

    signal: int
    time_over: bool

    def __bool__(self) -> bool:
        return self.signal > 0 or self.time_over


class Stopping:
    """Whether the run is to stop, as all ranks see it.

    Args:
        world: all ranks.
        asked: name of the signal that this rank got, None for none.
        limit: of time; none where there is none.
    """

    def __init__(self, world: World, asked: Callable[[], str | None], limit: TimeLimit | None = None) -> None:
        self._world, self._asked, self._limit = world, asked, limit
        self._agreed = False

    def wanted(self) -> bool:
        """Whether this rank wants to stop; not collective. Give it to `decide` as one number of a sum."""
        return bool(self._vote())

    def step(self, seconds: float) -> None:
        """Tell the clock how long this rank took for a step (seconds)."""
        if self._limit is not None:
            self._limit.step(seconds)

    def save(self, seconds: float) -> None:
        """Tell the clock how long this rank took for a save (seconds)."""
        if self._limit is not None:
            self._limit.save(seconds)

    def decide(self, wanting: int) -> None:
        """Stop if any rank wants to; called on all ranks alike.

        Args:
            wanting: ranks that want to stop, the same number on all ranks.

        Raises:
            StopRun: there is one.
        """
        self._agreed = self._agreed or wanting > 0
        if self._agreed:
            raise StopRun

    def check(self) -> None:
        """Ask all ranks, and stop if any of them wants to; collective.

        Raises:
            StopRun: one does.
        """
        self.decide(0 if self._agreed else int(self._world.sum(torch.tensor(int(self.wanted())))))

    def reason(self) -> str:
        """Say why the run stops; collective, the same on all ranks."""
        own = self._vote()
        votes = self._world.all_gather(torch.tensor([own.signal, int(own.time_over)]))
        causes = [
            f"{signal.Signals(number).name} on {_ranks(votes[:, 0] == number)}"
            for number in sorted({int(number) for number in votes[:, 0]} - {0})
        ]
        return " and ".join(causes) if causes else "train.max_time is nearly over"

    def _vote(self) -> Vote:
        name = self._asked()
        return Vote(signal.Signals[name].value if name else 0, self._limit is not None and self._limit.reached())


def _ranks(which: Tensor) -> str:
    numbers = which.nonzero().flatten().tolist()
    if len(numbers) == len(which) > 1:
        return "all ranks"
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
