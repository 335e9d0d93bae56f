"""A command as a process: streams that end no program, signals that ask it to stop, and errors in one line.

Importing anything of this package takes seconds, in which nobody listens: scripts block their signals before they do,
and `StopSignals.listen` and `run_command` unblock them. A signal that came meanwhile comes then.
"""

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn

# Exit codes of a command that is refused, of one whose output, or a run whose last checkpoint, could not be written
# (EX_IOERR), of a rank that ends because of another one (EX_TEMPFAIL: nothing is wrong with the run, start it again),
# and of a command that got SIGINT, or a run that got it again.
REFUSED, NOT_WRITTEN, PEER_LOST, INTERRUPTED = 2, 74, 75, 128 + signal.SIGINT
# Of a run that ends because of bad steps in a row (EX_DATAERR: starting it again as it is does not help), and of one
# that saved and stopped because it was asked to, and goes on when it is started again.
DIVERGED, STOPPED = 65, 85

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
"""Signals that ask a run to stop, where its settings name no others."""

# Ctrl-C reaches every process of a terminal, and launchers pass it on to the same ones: within a moment it is one.
_AGAIN_S = 2.0
_WHOLE_WRITE = 4096  # bytes that a pipe takes without another writer's between them (PIPE_BUF of Linux)
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def refuse(message: object, *, quiet: bool = False) -> NoReturn:
    """End the program with exit code 2 and one line, `error: ...`, on standard error; `quiet` leaves the line out."""
    if not quiet:
        _print_error(message)
    raise SystemExit(REFUSED)


def _print_error(message: object) -> None:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def log_to_stderr(line: str) -> None:
    """Print a line beside what a command prints."""
    print(f"mega_scale | {line}", file=sys.stderr, flush=True)


def run_command(main: Callable[[], Any]) -> None:
    """Run a command; a refusal (ValueError, OSError), output that cannot be written, and Ctrl-C end it in one line."""
    output, code = keep_streams(), None
    gc.freeze()  # what imports made stays: looking through it at the end takes 0.4 s
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        main()
    except SystemExit as end:
        code = end.code
    except (ValueError, OSError) as error:
        code = REFUSED
        _print_error(error)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends what is being tidied up
        code = INTERRUPTED
        _print_error("interrupted")
    output.flush()
    if not code and output.problem is not None:
        code = NOT_WRITTEN
    raise SystemExit(code)


class Stream:
    """A text stream for `print`, whose failures are noted and raised nowhere; `tell` gets one line when they begin.

    What its encoding lacks is written as an escape (`\\u1234`). What could not be written is tried again with the next
    text, as far as the stream's own buffer holds it.
    """

    def __init__(self, stream: Any, tell: Callable[[str], object] = lambda _: None) -> None:
        self._stream, self._tell = stream, tell
        self.problem: str | None = None
        self._written = False
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._written = self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        if self._try(self._stream.flush) and self._written:
            self.problem = None
        self._written = False

    def end(self) -> None:
        """Flush; what cannot be written is dropped, or Python would end with exit code 120 for it."""
        self.flush()
        if self.problem is not None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                self._stream.flush()

    def _try(self, act: Callable[[], Any]) -> bool:
        try:
            act()
        except (OSError, ValueError) as error:  # ValueError: it was closed
            first, self.problem = self.problem is None, getattr(error, "strerror", None) or str(error)
            if first:
                self._tell(f"mega_scale | standard output is not written: {self.problem}\n")
            return False
        return True


def keep_streams() -> Stream:
    """Have this process print through such streams, or to nowhere where it has none; returns standard output."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for the process's whole life
    errors = Stream(sys.stderr)
    output = Stream(sys.stdout, errors.write)
    sys.stdout, sys.stderr = output, errors
    for stream in (output, errors):
        atexit.register(stream.end)
    return output


class StopSignals:
    """Which stop signal this process got first, if any; others after it change nothing, but for SIGINT.

    A handler only notes the signal's name, in `asked`, so nothing that runs is disturbed: a save goes on, and a system
    call is begun again. In a process that was forked from this one, a signal does what it does by default.

    A second SIGINT ends the process at once, in a thread, since the main thread may be in a computation or wait for
    other ranks. For `again_s` seconds from the first on, others are taken for the same one.
    """

    def __init__(self, again_s: float = _AGAIN_S) -> None:
        self._pid, self._again_s, self._watching = os.getpid(), again_s, False
        self._listening: set[signal.Signals] = set()
        self.asked: str | None = None

    def listen(self, names: Sequence[str] = STOP_SIGNALS) -> None:
        """Take note of these signals from now on; those of an earlier call that are not among them get their default.

        One that came already and is not among them takes effect now. Raises ValueError outside the main thread.
        """
        wanted = {signal.Signals[name] for name in names}
        for number in wanted:
            signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # C code below us may not expect to be interrupted
        if signal.SIGINT in wanted and not self._watching:
            ours, pythons = os.pipe()
            os.set_blocking(pythons, False)
            # Python writes a signal's number there as it comes, whatever the main thread does.
            signal.set_wakeup_fd(pythons, warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
            threading.Thread(target=self._end_at_the_second, args=(ours,), daemon=True).start()
            self._watching = True
        dropped, self._listening = self._listening - wanted, wanted
        for number in dropped:
            signal.signal(number, signal.SIG_DFL)
        if self.asked is not None and (first := signal.Signals[self.asked]) in dropped:
            os.kill(self._pid, first)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*wanted, *dropped})

    def ignore(self) -> None:
        """Be deaf to them: for the end, while a launcher that saw another rank end sends signals to all."""
        for number in self._listening:
            signal.signal(number, signal.SIG_IGN)

    def _end_at_the_second(self, numbers: int) -> None:
        # torchrun passes Ctrl-C on to ranks that the terminal does not reach: the first as SIGINT, the next as SIGTERM.
        again = {signal.SIGINT, *([signal.SIGTERM] if "TORCHELASTIC_RUN_ID" in os.environ else [])}
        while signal.SIGINT not in os.read(numbers, 64):
            pass
        first = time.monotonic()
        _say("SIGINT: the run saves after what is under way, and ends; the next one ends it at once")
        while again.isdisjoint(os.read(numbers, 64)) or time.monotonic() - first <= self._again_s:
            pass
        _say("SIGINT again: the run ends at once, without a save")
        os._exit(INTERRUPTED)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.asked is None:
            self.asked = signal.Signals(number).name


def _say(line: str) -> None:
    """Print a line on the first rank."""
    if next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0":
        write_stderr(f"mega_scale | {line}")


def write_stderr(line: str) -> None:
    """Write a line to standard error past Python's buffer, whose lock the main thread may hold.

    It is cut where it is too long to be whole among others' lines, and lost where it cannot be written.
    """
    with contextlib.suppress(OSError):
        os.write(2, line.encode(errors="replace")[: _WHOLE_WRITE - 1] + b"\n")


class Standing(NamedTuple):
    """Where a rank stands, to be compared with others: all ranks do the same things in the same order."""

    beats: int  # things done since the start
    step: int  # optimizer step under way
    phase: str
    idle_s: float  # time since the last beat (seconds)
