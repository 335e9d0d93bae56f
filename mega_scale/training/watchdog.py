"""Ends a run in which a rank makes no progress, after every rank has printed where it stands, with all stacks.

The loop beats whenever something is done: a step's data, the step, a batch of an evaluation, a token, a save. All ranks
do the same in the same order and wait for each other, so one that hangs stops all; it is the one that is behind.
"""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType

from mega_scale.parallel import Standing, World
from mega_scale.parallel.monitor import PEER_LOST, write_stderr

_LOOKS = 10  # in a timeout
_LONGEST_PAUSE_S = 5.0
_EARLY = 0.9


class Watchdog:
    """Watches the main thread of this rank; use it in a `with` statement.

    A main thread that holds the interpreter's lock keeps this watchdog from looking. Then a timer that needs no lock
    prints the stacks, and ends the process with exit code 1 if it is the only one; the other ranks notice that this one
    gives no answer.

    Args:
        world: all ranks.
        timeout_s: longest time without a beat (seconds); 0 for no watch.
        at_end: called with one line that says why, in another thread, before this process ends because of a hang or of
            another rank.
    """

    def __init__(self, world: World, timeout_s: float, at_end: Callable[[str], None]) -> None:
        self._world, self._timeout_s, self._at_end = world, timeout_s, at_end
        self._beats, self._step, self._phase, self._since = 0, 0, "start-up", time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self, phase: str, step: int | None = None) -> None:
        """Something was done; on all ranks alike.

        Args:
            phase: what is done from now on, in a few words.
            step: optimizer step under way, where it changes.
        """
        self._beats, self._phase, self._since = self._beats + 1, phase, time.monotonic()
        if step is not None:
            self._step = step

    @property
    def step(self) -> int:
        """Optimizer step under way."""
        return self._step

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
        pause = min(self._timeout_s / _LOOKS, _LONGEST_PAUSE_S)
        while not self._stopped.wait(pause):
            self._arm()
            if time.monotonic() - self._since > self._timeout_s:
                if self._world.monitor is not None:
                    self._world.monitor.declare_hang()
                else:
                    self._end()

    def _arm(self) -> None:
        """Set the timer that needs no lock; set anew at every look, it goes off when there are no more looks."""
        alone = self._world.monitor is None
        # Among others, a bit early: the launcher may end this rank as soon as they have ended.
        longest = self._timeout_s if alone else _EARLY * self._timeout_s
        faulthandler.dump_traceback_later(longest, exit=alone, file=2)

    def _stand(self) -> Standing:
        """Print this rank's stacks, and say where it stands."""
        found = Standing(self._beats, self._step, self._phase, time.monotonic() - self._since)
        head = (
            f"rank {self._world.rank} makes no progress" if self._late(found) else f"rank {self._world.rank} is stopped"
        )
        text = (
            f"mega_scale | {head}: step {found.step}, {found.phase}, for {found.idle_s:.0f} s; stacks of all threads:\n"
        )
        _print_stacks(text, f"rank {self._world.rank} | ")
        return found

    def _late(self, standing: Standing) -> bool:
        return bool(self._timeout_s) and standing.idle_s > self._timeout_s

    def _end(self) -> None:
        found = self._stand()
        reason = f"the run hangs: no progress for {found.idle_s:.0f} s in step {found.step}, {found.phase}"
        write_stderr(f"error: {reason}; start it again with --resume\n")
        writer = threading.Thread(target=self._at_end, args=(reason,), daemon=True)
        writer.start()
        writer.join(_LONGEST_PAUSE_S)
        os._exit(PEER_LOST)


def _print_stacks(head: str, prefix: str) -> None:
    """Print the stacks of all threads on stderr, each line whole: several ranks do so at once, into one pipe.

    Past Python's buffers, whose locks the main thread may hold.
    """
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:  # a full disk: better torn than none
        write_stderr(head)
        faulthandler.dump_traceback(file=2, all_threads=True)
        return
    for line in (head.rstrip(), *(prefix + line for line in lines)):
        write_stderr(f"{line}\n")
