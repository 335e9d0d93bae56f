"""Ranks that hang end the run, after every rank has printed where it stands, with all stacks; slow ones are named.

The loop beats whenever something is done: a step's data, the step, a batch of an evaluation, a token, a save. All ranks
do the same in the same order and wait for each other, so one that hangs stops all; it is the one that is behind.
"""

import faulthandler
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch

from mega_scale.parallel import Standing, World
from mega_scale.parallel.monitor import PEER_LOST, write_stderr

_PROBE_SIZE = {"cpu": 192, "cuda": 2048}
_PROBES = 5
_WORTH_SAYING = 0.1  # of a step: less than that, a wait for data holds nobody up
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
        """Note progress, on all ranks alike, and what is done from now on, in which optimizer step."""
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


# Slow ranks
#
# In a step with collectives all ranks take equally long, so a rank's step time says nothing of it. What is its own: the
# time for which it waited for its data, and how fast its device computes when it needs nobody, in a short probe.


def probe(device: torch.device) -> float:
    """Seconds of a product of two square matrices; the least of five, as other work only adds to it."""
    size = _PROBE_SIZE.get(device.type, _PROBE_SIZE["cpu"])
    matrix = torch.ones(size, size, device=device)
    least = float("inf")
    for _ in range(_PROBES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        _ = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - began)
    return least


def slower(seconds: list[float], factor: float, at_least: float = 0.0) -> list[int]:
    """Ranks that take longer than `factor` times the median, and than `at_least` seconds.

    Of an even number of ranks the lower median counts: of two, one may be slow.
    """
    median = statistics.median_low(seconds)
    return [rank for rank, own in enumerate(seconds) if own > max(factor * median, at_least)]


class SlowRanks:
    """Compares ranks at every report, and names those that were slow at this one and at the one before.

    Args:
        world: all ranks.
        factor: how many times the median is slow; 0 compares nothing.
    """

    def __init__(self, world: World, factor: float) -> None:
        self._world, self._factor = world, factor
        self._before: set[tuple[int, str]] = set()

    def report(self, waited_s: float, step_s: float) -> list[str]:
        """Compare the ranks; collective. Returns a line for each slow rank, the same on all ranks.

        Args:
            waited_s: for which this rank waited for data in a step, in the mean (seconds).
            step_s: that a step took, in the mean (seconds).
        """
        if not self._factor:
            return []
        own = torch.tensor([waited_s, probe(self._world.device), step_s])
        waits, probes, steps = self._world.all_gather(own).T.tolist()
        found = {(rank, "waits for data") for rank in slower(waits, self._factor, _WORTH_SAYING * min(steps))}
        found |= {(rank, "computes") for rank in slower(probes, self._factor)}
        lines = []
        for rank, what in sorted(found & self._before):
            figures = waits if what == "waits for data" else probes
            lines.append(
                f"rank {rank} is slow: it {what} for {figures[rank] * 1e3:.3g} ms, the median is "
                f"{statistics.median_low(figures) * 1e3:.3g} ms ({'a step' if figures is waits else 'a fixed product'})"
            )
        self._before = found
        return lines
