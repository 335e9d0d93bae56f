"""A run folder as one job has it: held by a lock, and what lies there is gone on with, or replaced, or left alone."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mega_scale.checkpoint.folder import LATEST, checkpoints, next_serial, read_manifest, run_lock, write_manifest
from mega_scale.files import STALE_S, replace_text
from mega_scale.settings import require

if TYPE_CHECKING:
    from mega_scale.parallel import World

# What a run writes, beside its status and its lock; whatever else lies in its folder is its user's.
_WRITTEN = ("checkpoints/step-*", "checkpoints/latest*", "tensorboard/events.out.tfevents.*", "metrics.jsonl*")
_OVERWRITING = "overwriting"
_NOTE = (
    "A run that was started with --overwrite has yet to begin here. Delete this file to keep the run that lies here.\n"
)


def resume_path(run_dir: Path, resume: str | None) -> Path | None:
    """Run or checkpoint folder that a run goes on from (`resume`: latest, auto, a folder, or None); None: afresh."""
    if resume is None or (resume == "auto" and (_is_overwritten(run_dir) or not checkpoints(run_dir))):
        return None
    return run_dir if resume in ("latest", "auto") else Path(resume)


def create_run_folder(run_dir: Path) -> None:
    """Make the folder of a run, if it is not there. Raises ValueError where it cannot be made or written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run_dir={str(run_dir)!r} cannot be created ({error.strerror}): choose a folder that can be written"
        ) from None
    writable = os.access(run_dir, os.W_OK | os.X_OK)
    require(writable, "run_dir", str(run_dir), "choose a folder that can be written")
    saved = run_dir / "checkpoints"
    there = saved.is_dir() or not os.path.lexists(saved)
    require(there, "run_dir", str(run_dir), f"{saved} is no folder, move it away")


def check_run_folder(run_dir: Path, resume: str | None, overwrite: bool) -> None:
    """Refuse a run in a folder that holds one, which it neither goes on with nor may replace (`overwrite`)."""
    own = resume in ("latest", "auto") or (resume is not None and _lies_in(Path(resume), run_dir))
    if overwrite and own:
        raise ValueError(
            f"overwrite=True with resume={resume!r}: that would delete what it goes on from; give one of the two"
        )
    if resume == "latest" and _is_overwritten(run_dir):
        raise ValueError(
            f"resume='latest': a run with --overwrite was stopped before it began in {run_dir}: start that run with "
            f"--resume auto, or delete {run_dir / _OVERWRITING} to keep the run before it"
        )
    if not overwrite and not own and (_is_overwritten(run_dir) or _holds_run(run_dir)):
        raise ValueError(
            f"run_dir={str(run_dir)!r} holds a run already: go on with it (--resume), replace it (--overwrite), or "
            "choose another run_dir"
        )


class RunFolder:
    """A run folder held by this job; `lost` is called with one line, in another thread, when another job has taken it.

    Methods but `take` are for the first rank.
    """

    def __init__(self, run_dir: Path, resume: str | None, overwrite: bool, lost: Callable[[str], None]) -> None:
        self._run_dir, self._resume, self._overwrite = run_dir, resume, overwrite
        self._lock = run_lock(run_dir, lost)

    def take(self, world: "World", afresh: bool, log: Callable[[str], None]) -> str | None:
        """Take the folder on rank 0, waiting for an owner of whom it is not known whether it lives; collective.

        Returns why this job cannot have it, the same on all ranks; None where it has it. For `afresh` see `attempt`.
        """
        waited = False
        while True:
            taken, problem = False, None
            if world.rank == 0:
                try:
                    taken = self.attempt(afresh)
                except ValueError as error:
                    problem = str(error)
                except OSError as error:
                    problem = (
                        f"run_dir={str(self._run_dir)!r} cannot be written ({error.strerror or error}): choose a "
                        "folder that can be written"
                    )
                if not (taken or problem or waited):
                    log(
                        f"{self._run_dir} is held by another job ({self._lock.owner}): waiting for up to "
                        f"{STALE_S:.0f} s to see whether it lives"
                    )
            # The others take part in every attempt, so that none of them waits for longer than it may.
            taken, problem = world.broadcast([taken, problem])
            if taken or problem:
                return problem
            waited = True
            time.sleep(1.0)

    def attempt(self, afresh: bool) -> bool:
        """Take the folder; nothing in it changes yet, but that one to overwrite is marked as such.

        Returns whether this job has it; if not, try again: it is not known yet whether the owner lives. Raises
        ValueError where another job has it, or has had it since this one looked whether to start `afresh`.
        """
        if not self._lock.attempt():
            return False
        check_run_folder(self._run_dir, self._resume, self._overwrite)
        if afresh != (resume_path(self._run_dir, self._resume) is None):
            raise ValueError(f"another job has changed {self._run_dir} while this one started: start it again")
        # From now on, --resume auto never goes on with what is to be overwritten, whenever this job is killed.
        if self._overwrite and _holds_run(self._run_dir):
            (self._run_dir / _OVERWRITING).write_text(_NOTE, encoding="utf-8")
        return True

    def begin(self, checkpoint: Path | None, key: bytes | None) -> None:
        """Delete the run that is overwritten, if there is one: the new one begins. Raises OSError.

        Where it starts afresh, without a `checkpoint`, a `config.yaml` that lies there becomes `config.yaml.before`.
        """
        if checkpoint is not None and self._resume not in ("latest", "auto") and _lies_in(checkpoint, self._run_dir):
            # Named, it becomes the newest: killed before its first save, --resume auto would go on from a later one.
            its_run = checkpoint.parent.parent
            if checkpoints(its_run)[-1].name != checkpoint.name:
                newest = read_manifest(checkpoint, key)._replace(serial=next_serial(its_run))
                write_manifest(checkpoint, newest, key)
                replace_text(checkpoint.parent / LATEST, checkpoint.name + "\n")
        if self._overwrite or (self._resume == "auto" and _is_overwritten(self._run_dir)):
            for path in [path for pattern in _WRITTEN for path in self._run_dir.glob(pattern)]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        (self._run_dir / _OVERWRITING).unlink(missing_ok=True)
        users, kept = self._run_dir / "config.yaml", self._run_dir / "config.yaml.before"
        if checkpoint is None and users.exists() and not (self._overwrite or kept.exists()):
            users.rename(kept)

    def release(self) -> None:
        """Let others have the folder; may be called twice."""
        self._lock.release()


def _is_overwritten(run_dir: Path) -> bool:
    """Whether a run was to replace the one that lies there, and did not come to begin."""
    return (run_dir / _OVERWRITING).exists()


def _holds_run(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return any(run_dir.glob("checkpoints/step-*")) or (metrics.exists() and metrics.stat().st_size > 0)


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
