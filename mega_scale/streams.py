"""Standard output and error that end no program: on a full disk, after their reader has left, and in any encoding."""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

NOT_WRITTEN = 74
"""Exit code of a command whose output could not be written (EX_IOERR)."""


class Stream:
    """A text stream whose failures are noted, and raised nowhere.

    What its encoding lacks is written as an escape (`\\u1234`). What could not be written is tried again with the next
    text, as far as the stream's own buffer holds it.

    Args:
        stream: where it writes.
        tell: is given one line when writing begins to fail.
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
        """As `print` needs it."""
        self._written = self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As `print` needs it."""
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
    """Have this process print through such streams; where it was started without one, to nowhere.

    Returns:
        Standard output.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for the process's whole life
    errors = Stream(sys.stderr)
    output = Stream(sys.stdout, errors.write)
    sys.stdout, sys.stderr = output, errors
    for stream in (output, errors):
        atexit.register(stream.end)
    return output


def run_command(main: Callable[[], Any]) -> None:
    """Run a command whose output is what it is for: one that could not be written is an error, in one line.

    Ctrl-C ends it in one line too, with exit code 130.

    Args:
        main: the command.
    """
    output, code = keep_streams(), None
    try:
        main()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends what is being tidied up
        code = 128 + signal.SIGINT
        print("error: interrupted", file=sys.stderr, flush=True)
    output.flush()
    if not code and output.problem is not None:
        code = NOT_WRITTEN
    raise SystemExit(code)
