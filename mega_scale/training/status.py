"""`status.json` in the run folder: how a run ended, whatever a launcher makes of its exit code."""

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Literal

State = Literal["running", "stopped", "finished", "failed"]


class RunStatus:
    """Writes the state of a run; on ranks other than the first, every call does nothing.

    Args:
        run_dir: the file lies here.
        rank: of this process.
    """

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
            last: whether later calls do nothing. The verdict on a lost rank stands, and not the errors that follow
                from it here.
        """
        with self._lock:
            if not self._active:
                return
            beside = self._path.with_name(f"status-{os.getpid()}.unfinished")
            content = {"state": state, "step": step, "reason": " ".join(reason.split())}
            try:
                beside.write_text(json.dumps(content) + "\n")
                os.replace(beside, self._path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    beside.unlink(missing_ok=True)
                print(f"mega_scale | {self._path} is not written: {error.strerror}", file=sys.stderr, flush=True)
            self._active = not last
