"""`status.json` in the run folder: how a run ended, whatever a launcher makes of its exit code."""

import json
import os
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

    def write(self, state: State, step: int, reason: str = "") -> None:
        """Replace the file as a whole: a reader finds the old one or the new one.

        Args:
            state: running; stopped: saved, start it again to go on; finished; failed.
            step: optimizer steps done, as far as is known.
            reason: why, one line.

        Raises:
            OSError: it cannot be written.
        """
        if not self._active:
            return
        beside = self._path.with_name(f"status-{os.getpid()}.unfinished")
        beside.write_text(json.dumps({"state": state, "step": step, "reason": " ".join(reason.split())}) + "\n")
        os.replace(beside, self._path)
