"""What ends a run before its end: a signal or the clock asks, or a rank hangs; `status.json` says how it ended."""

import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal

import psutil
import torch
from torch import Tensor

from mega_scale.files import replace_text
from mega_scale.parallel import Standing, World
from mega_scale.parallel.monitor import PEER_LOST, write_stderr
from mega_scale.process import StopSignals

STOPPED = 85
"""Exit code of a run that saved and stopped because it was asked to: start it again, and it goes on."""

_MARGIN = 1.2  # steps and saves are not all alike
_TO_LEAVE_S = 2.0  # for leaving the process group, and for Python's end
_UNKNOWN_SAVE_S = 60.0
_UNKNOWN_SAVE_SHARE = 0.1

_LOOKS = 10  # of the watchdog in a timeout
_LONGEST_PAUSE_S = 5.0
_EARLY = 0.9


class StopRun(Exception):
    """All ranks agreed to stop; raised on all of them at the same place."""


class Stopping:
    """Whether the run is to stop, as all ranks see it: a signal asks, or time runs out.

    It is time when what has passed since `since`, the start of this process (seconds since the epoch), with the longest
    step and the longest save so far and a fifth more of both, would pass `limit_s`. Before the first save, one is taken
    to last a minute, or a tenth of the limit if that is less. The trainer notes both, `step_s` and `save_s`.
    """

    def __init__(
        self, world: World, signals: StopSignals, limit_s: float | None = None, since: float | None = None
    ) -> None:
        self._world, self._signals, self._limit_s = world, signals, limit_s
        self._since = psutil.Process().create_time() if since is None else since
        self._agreed = False
        self.step_s = self.save_s = 0.0

    def wanted(self) -> bool:
        """Whether this rank wants to stop; not collective. Give it to `decide` as one number of a sum."""
        return self._signals.asked is not None or (self._limit_s is not None and self.time_over())

    def time_over(self) -> bool:
        """Whether the clock says so."""
        if self._limit_s is None:
            return False
        save_s = self.save_s or min(_UNKNOWN_SAVE_S, _UNKNOWN_SAVE_SHARE * self._limit_s)
        return time.time() - self._since + _MARGIN * (self.step_s + save_s) + _TO_LEAVE_S > self._limit_s

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
        own = signal.Signals[self._signals.asked].value if self._signals.asked else 0
        votes = self._world.all_gather(torch.tensor([own, int(self.time_over())]))[:, 0]
        numbers = sorted({int(number) for number in votes} - {0})
        causes = [f"{signal.Signals(number).name} on {_ranks(votes == number)}" for number in numbers]
        return " and ".join(causes) or "train.max_time is nearly over"


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

        Where it cannot be written, that is said: no run ends for it, and the reason why it ends is not hidden. A run
        that is "stopped" saved: start it again to go on. After the `last` one, calls do nothing: the verdict on a lost
        rank stands, and not the errors that follow from it here.
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


class Watchdog:
    """Watches the main thread of this rank; use it in a `with` statement.

    A rank that hangs ends the run, after every rank has printed where it stands, with all stacks. The loop beats
    whenever something is done: a step's data, the step, a batch of an evaluation, a token, a save. All ranks do the
    same in the same order and wait for each other, so one that hangs stops all; it is the one that is behind.

    A main thread that holds the interpreter's lock keeps this watchdog from looking. Then a timer that needs no lock
    prints the stacks, and ends the process with exit code 1 if it is the only one; the other ranks notice that this one
    gives no answer.

    `timeout_s` is the longest time without a beat, 0 for no watch. `at_end` is called with one line that says why, in
    another thread, before this process ends because of a hang or of another rank.
    """

    def __init__(self, world: World, timeout_s: float, at_end: Callable[[str], None]) -> None:
        self._world, self._timeout_s, self._at_end = world, timeout_s, at_end
        self._beats, self.step, self._phase, self._since = 0, 0, "start-up", time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self, phase: str, step: int | None = None) -> None:
        """Note progress, on all ranks alike, and what is done from now on, in which optimizer step."""
        self._beats, self._phase, self._since = self._beats + 1, phase, time.monotonic()
        if step is not None:
            self.step = step

    def __enter__(self) -> "Watchdog":
        if self._world.monitor is not None:
            self._world.monitor.watch(self._stand, self._at_end)
        self.beat("start-up")
        if self._timeout_s:
            self._arm()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # How the run ended is known by now, unless it is an error: the monitor may find that another rank is its cause.
        if self._world.monitor is not None and error is None:
            self._world.monitor.watch(self._stand, None)
        self._stopped.set()
        if self._timeout_s:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._timeout_s / _LOOKS, _LONGEST_PAUSE_S)):
            self._arm()
            if time.monotonic() - self._since <= self._timeout_s:
                continue
            if self._world.monitor is not None:
                self._world.monitor.declare_hang()
                continue
            found = self._stand()
            reason = f"the run hangs: no progress for {found.idle_s:.0f} s in step {found.step}, {found.phase}"
            write_stderr(f"error: {reason}; start it again with --resume\n")
            writer = threading.Thread(target=self._at_end, args=(reason,), daemon=True)
            writer.start()
            writer.join(_LONGEST_PAUSE_S)
            os._exit(PEER_LOST)

    def _arm(self) -> None:
        """Set the timer that needs no lock; set anew at every look, it goes off when there are no more looks."""
        alone = self._world.monitor is None
        # Among others, a bit early: the launcher may end this rank as soon as they have ended.
        longest = self._timeout_s if alone else _EARLY * self._timeout_s
        faulthandler.dump_traceback_later(longest, exit=alone, file=2)

    def _stand(self) -> Standing:
        """Print this rank's stacks, and say where it stands.

        Each line whole, as several ranks do so at once, into one pipe; past Python's buffers, whose locks the main
        thread may hold.
        """
        found = Standing(self._beats, self.step, self._phase, time.monotonic() - self._since)
        late = bool(self._timeout_s) and found.idle_s > self._timeout_s
        rank = f"rank {self._world.rank}"
        write_stderr(
            f"mega_scale | {rank} {'makes no progress' if late else 'is stopped'}: step {found.step}, {found.phase}, "
            f"for {found.idle_s:.0f} s; stacks of all threads:\n"
        )
        try:
            with tempfile.TemporaryFile() as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
                file.seek(0)
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:  # a full disk: better torn than none
            faulthandler.dump_traceback(file=2, all_threads=True)
            lines = []
        for line in lines:
            write_stderr(f"{rank} | {line}\n")
        return found
