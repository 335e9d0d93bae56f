"""Remembers the signals that ask a run to stop; imports nothing that takes time, so it listens from the start."""

import os
import signal
from collections.abc import Sequence
from types import FrameType

DEFAULT = ("SIGTERM", "SIGUSR1")


class StopSignals:
    """Which stop signal this process got first, if any; others after it change nothing.

    A handler only takes a note, so nothing that runs is disturbed: a save goes on, and a system call is begun again. In
    a process that was forked from this one, a signal does what it does by default.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._first is None:
            self._first = signal.Signals(number)
