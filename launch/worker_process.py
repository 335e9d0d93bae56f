"""Another process that answers a line of JSON to every line it is sent."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TextIO


class WorkerProcess:
    """Starts it, and waits until it says that it is ready.

    Args:
        command: program and arguments.
        threads: CPU threads that it may use.
        errors: file for what it says on standard error.
        more: environment variables for it.

    Attributes:
        ready: its first answer.

    Raises:
        OSError: it cannot be started.
        ValueError: it ended without an answer; with the end of what it said.
    """

    def __init__(
        self, command: Sequence[str], threads: int, errors: TextIO, more: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._errors = errors
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **more},
        )
        self.ready: dict[str, Any] = self._answer()

    def ask(self, request: str) -> dict[str, Any]:
        """Send a line, and wait for the answer. Raises ValueError when the process ends without one."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It has ended; reading its answer says why.
        return self._answer()

    def close(self) -> None:
        """End it."""
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        last_words = (self._errors.read().strip() or "no message").splitlines()[-1]
        self._errors.close()
        if self._process.returncode == -signal.SIGKILL:
            last_words = "killed, as a system does that is short of memory"
        raise ValueError(f"the peer ended with exit status {self._process.returncode}: {last_words}")
