"""Remembers the signals that ask a run to stop; imports nothing that takes time, so it listens from the start."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

DEFAULT = ("SIGTERM", "SIGUSR1", "SIGINT")

ENDED_AT_ONCE = 128 + signal.SIGINT
"""Exit code of a run that got SIGINT again."""

# Ctrl-C reaches every process of a terminal, and launchers pass it on to the same ones: within a moment it is one.
_AGAIN_S = 2.0
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class StopSignals:
    """Which stop signal this process got first, if any; others after it change nothing, but for SIGINT.

    A handler only takes a note, so nothing that runs is disturbed: a save goes on, and a system call is begun again. In
    a process that was forked from this one, a signal does what it does by default.

    A second SIGINT ends the process at once, in a thread, since the main thread may be in a computation or wait for
    other ranks.

    Args:
        again_s: from the first SIGINT on, others are taken for the same one for so long (seconds).
    """

    def __init__(self, again_s: float = _AGAIN_S) -> None:
        self._pid = os.getpid()
        self._again_s = again_s
        self._watching = False
        self._listening: set[signal.Signals] = set()
        self._first: signal.Signals | None = None

    def listen(self, names: Sequence[str] = DEFAULT) -> None:
        """Take note of these signals from now on; those of an earlier call that are not among them get their default.

        Args:
            names: of signals, SIGTERM and the like. One that came already and is not among them takes effect now.

        Raises:
            ValueError: not in the main thread.
        """
        wanted = {signal.Signals[name] for name in names}
        for number in wanted:
            signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # C code below us may not expect to be interrupted
        if signal.SIGINT in wanted and not self._watching:
            self._watch_interrupts()
        dropped, self._listening = self._listening - wanted, wanted
        for number in dropped:
            signal.signal(number, signal.SIG_DFL)
        if self._first in dropped:
            os.kill(self._pid, self._first)

    def asked(self) -> str | None:
        """Name of the first signal; None before any came."""
        return None if self._first is None else self._first.name

    def ignore(self) -> None:
        """Be deaf to them: for the end, while a launcher that saw another rank end sends signals to all."""
        for number in self._listening:
            signal.signal(number, signal.SIG_IGN)

    def _watch_interrupts(self) -> None:
        ours, pythons = os.pipe()
        os.set_blocking(pythons, False)
        # Python writes a signal's number there as it comes, whatever the main thread does.
        signal.set_wakeup_fd(pythons, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._end_at_the_second, args=(ours,), daemon=True).start()
        self._watching = True

    def _end_at_the_second(self, numbers: int) -> None:
        first: float | None = None
        # torchrun passes Ctrl-C on to ranks that the terminal does not reach: the first as SIGINT, the next as SIGTERM.
        again = {signal.SIGINT, *([signal.SIGTERM] if "TORCHELASTIC_RUN_ID" in os.environ else [])}
        while True:
            came = set(os.read(numbers, 64))
            if not came & ({signal.SIGINT} if first is None else again):
                continue
            if first is None:
                first = time.monotonic()
                _say("SIGINT: the run saves after what is under way, and ends; the next one ends it at once")
            elif time.monotonic() - first > self._again_s:
                _say("SIGINT again: the run ends at once, without a save")
                os._exit(ENDED_AT_ONCE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._first is None:
            self._first = signal.Signals(number)


def _say(line: str) -> None:
    """Print a line on the first rank, past Python's buffers, whose locks the main thread may hold."""
    if next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0":
        try:
            os.write(2, f"mega_scale | {line}\n".encode())
        except OSError:
            return  # nobody reads it
