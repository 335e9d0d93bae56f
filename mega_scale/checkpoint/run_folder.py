"""A run folder as one job has it: what lies there is gone on with, or replaced, or left alone."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mega_scale import files
from mega_scale.checkpoint.folder import (
    LATEST,
    LOCK,
    checkpoints,
    claimed_serial,
    next_serial,
    read_manifest,
    write_manifest,
)
from mega_scale.files import FileLock, discard, replace_text
from mega_scale.process import PEER_LOST, write_stderr
from mega_scale.settings import require

if TYPE_CHECKING:
    from mega_scale.parallel import World

# What a run writes, beside its status and its lock; whatever else lies in its folder is its user's.
_WRITTEN = (
    "checkpoints/step-*",
    "checkpoints/latest*",
    "eval_command/step-*",
    "tensorboard/events.out.tfevents.*",
    "metrics.jsonl*",
    "trackers.json",
)
OVERWRITING = "overwriting"
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
    saved, writable = run_dir / "checkpoints", os.access(run_dir, os.W_OK | os.X_OK)
    require(writable, "run_dir", str(run_dir), "choose a folder that can be written")
    free = saved.is_dir() or not os.path.lexists(saved)
    require(free, "run_dir", str(run_dir), f"{saved} is no folder, move it away")


def check_run_folder(run_dir: Path, resume: str | None, overwrite: bool) -> None:
    """Refuse a run in a folder that holds one, which it neither goes on with nor may replace (`overwrite`)."""
    own = resume in ("latest", "auto") or (resume is not None and _lies_in(Path(resume), run_dir))
    overwritten, problem = _is_overwritten(run_dir), ""
    if overwrite and own:
        problem = f"overwrite=True with resume={resume!r}: that would delete what it goes on from; give one of the two"
    elif resume == "latest" and overwritten:
        stopped = f"a run with --overwrite was stopped before it began in {run_dir}: start that run with --resume auto"
        problem = f"resume='latest': {stopped}, or delete {run_dir / OVERWRITING} to keep the run before it"
    elif not overwrite and not own and (overwritten or _holds_run(run_dir)):
        remedy = "go on with it (--resume), replace it (--overwrite), or choose another run_dir"
        problem = f"run_dir={str(run_dir)!r} holds a run already: {remedy}"
    if problem:
        raise ValueError(problem)


def end_without_folder(reason: str) -> None:
    """End this process, and so the run: the folder belongs to another job."""
    write_stderr(f"error: {' '.join(reason.split())}: this one ends, and saves nothing more")
    os._exit(PEER_LOST)


class Lock(Protocol):
    """What one job at a time can hold, as `FileLock`."""

    @property
    def owner(self) -> str: ...

    def attempt(self) -> bool: ...

    def release(self) -> None: ...


class RunFolder:
    """A run folder held by this job by a lock, and by `more`; for `lost` see `FileLock`.

    Methods but `take` and `release` are for rank 0.
    """

    def __init__(
        self, run_dir: Path, resume: str | None, overwrite: bool, lost: Callable[[str], None], *more: "Lock"
    ) -> None:
        self._run_dir, self._resume, self._overwrite = run_dir, resume, overwrite
        self._locks: tuple[Lock, ...] = (FileLock(run_dir / LOCK, lost), *more)
        self._open = list(self._locks)  # those that are not taken yet

    def release(self) -> None:
        """Let other jobs have the folder; may be called twice."""
        for lock in reversed(self._locks):
            lock.release()

    def take(self, world: "World", afresh: bool, log: Callable[[str], None]) -> str | None:
        """Take the folder on rank 0, waiting for an owner of whom it is not known whether it lives; collective.

        Returns why this job cannot have it, the same on all ranks; None where it has it. For `afresh` see `attempt`.
        """
        for attempts in itertools.count():
            taken, problem = False, None
            if world.rank == 0:
                try:
                    taken = self.attempt(afresh)
                except ValueError as error:
                    problem = str(error)
                except OSError as error:
                    what = f"cannot be written ({error.strerror or error}): choose a folder that can be written"
                    problem = f"run_dir={str(self._run_dir)!r} {what}"
                if not (taken or problem or attempts):
                    log(
                        f"{self._run_dir} is held by another job ({self._open[0].owner}): waiting for up to "
                        f"{files.STALE_S:.0f} s to see whether it lives"
                    )
            # The others take part in every attempt, so that none of them waits for longer than it may.
            taken, problem = world.broadcast([taken, problem])
            if taken or problem:
                break
            time.sleep(1.0)
        return problem

    def attempt(self, afresh: bool) -> bool:
        """Take the folder; nothing in it changes yet, but that one to overwrite is marked as such.

        Returns whether this job has it; if not, try again: it is not known yet whether the owner lives. Raises
        ValueError where another job has it, or has had it since this one looked whether to start `afresh`.
        """
        while self._open:
            if not self._open[0].attempt():
                return False
            del self._open[0]
        check_run_folder(self._run_dir, self._resume, self._overwrite)
        if afresh != (resume_path(self._run_dir, self._resume) is None):
            raise ValueError(f"another job has changed {self._run_dir} while this one started: start it again")
        # From now on, --resume auto never goes on with what is to be overwritten, whenever this job is killed.
        if self._overwrite and _holds_run(self._run_dir):
            (self._run_dir / OVERWRITING).write_text(_NOTE, encoding="utf-8")
        return True

    def begin(self, checkpoint: Path | None, key: bytes | None, serial: int = 0) -> None:
        """Delete the run that is overwritten, if there is one: the new one begins. Raises OSError.

        `serial` is the number of the next checkpoint where the run has others than those in the folder.
        Where it starts afresh, without a `checkpoint`, a `config.yaml` that lies there becomes `config.yaml.before`.
        """
        if checkpoint is not None and self._resume not in ("latest", "auto") and _lies_in(checkpoint, self._run_dir):
            # Named, it becomes the newest: killed before its first save, --resume auto would go on from a later one.
            its_run = checkpoint.parent.parent
            serial = max(serial, next_serial(its_run))
            if serial > claimed_serial(checkpoint) + 1 or checkpoints(its_run)[-1].name != checkpoint.name:
                newest = read_manifest(checkpoint, key)._replace(serial=serial)
                write_manifest(checkpoint, newest, key)
                replace_text(checkpoint.parent / LATEST, checkpoint.name + "\n")
        if self._overwrite or (self._resume == "auto" and _is_overwritten(self._run_dir)):
            for path in [path for pattern in _WRITTEN for path in self._run_dir.glob(pattern)]:
                discard(path)
        (self._run_dir / OVERWRITING).unlink(missing_ok=True)
        users, kept = self._run_dir / "config.yaml", self._run_dir / "config.yaml.before"
        if checkpoint is None and users.exists() and not (self._overwrite or kept.exists()):
            users.rename(kept)


def _is_overwritten(run_dir: Path) -> bool:
    return (run_dir / OVERWRITING).exists()


def _holds_run(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return any(run_dir.glob("checkpoints/step-*")) or (metrics.exists() and metrics.stat().st_size > 0)


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
