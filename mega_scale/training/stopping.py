"""Ending a run before its end: a signal or the clock asks, all ranks agree, and `status.json` says how it ended."""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from torch import Tensor

from mega_scale.files import replace_text
from mega_scale.parallel import World

STOPPED = 85
"""Exit code of a run that saved and stopped because it was asked to: start it again, and it goes on."""

_MARGIN = 1.2  # steps and saves are not all alike
_TO_LEAVE_S = 2.0  # for leaving the process group, and for Python's end
_UNKNOWN_SAVE_S = 60.0
_UNKNOWN_SAVE_SHARE = 0.1


class StopRun(Exception):
    """All ranks agreed to stop; raised on all of them at the same place."""


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
        """Raise StopRun on all ranks alike if any of them wants to stop, of which `wanting` is the number."""
        self._agreed = self._agreed or wanting > 0
        if self._agreed:
            raise StopRun

    def check(self) -> None:
        """Ask all ranks, and raise StopRun if any of them wants to stop; collective."""
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


State = Literal["running", "stopped", "finished", "failed"]


class RunStatus:
    """Writes the state of a run into its folder; on ranks other than the first, every call does nothing."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / "status.json"
        self._active = rank == 0
        self._lock = threading.Lock()

    def write(self, state: State, step: int, reason: str = "", last: bool = False) -> None:
        """Replace the file as a whole: a reader finds the old one or the new one; from any thread.

        Where it cannot be written, that is said: no run ends for it, and the reason why it ends is not hidden.

        Args:
            state: running; stopped: saved, start it again to go on; finished; failed.
            step: optimizer steps done, as far as is known.
            reason: why, one line.
            last: later calls do nothing: the verdict on a lost rank stands, and not the errors that follow from it
                here.
        """
        with self._lock:
            if not self._active:
                return
            content = {"state": state, "step": step, "reason": " ".join(reason.split())}
            try:
                replace_text(self._path, json.dumps(content) + "\n")
            except OSError as error:
                print(f"mega_scale | {self._path} is not written: {error.strerror}", file=sys.stderr, flush=True)
            self._active = not last
