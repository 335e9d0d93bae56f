"""Which checkpoints are deleted, and that the last valid one never is."""

import contextlib
from pathlib import Path

from mega_scale.training.checkpoint.files import discard
from mega_scale.training.checkpoint.folder import checkpoints, run_lock, step_of, verify
from mega_scale.training.checkpoint.manifest import CheckpointError

DELETED = ".deleted"
"""What follows the name of a checkpoint that is being deleted."""


def delete(folder: Path) -> None:
    """Delete a checkpoint, its name first: what is killed half way leaves no damaged checkpoint behind.

    Args:
        folder: of the checkpoint; of one that is linked here, only the link is deleted.

    Raises:
        OSError: it cannot be deleted; if it could be renamed, it no longer counts as a checkpoint.
    """
    nameless = folder.with_name(folder.name + DELETED)
    discard(nameless)
    folder.rename(nameless)
    discard(nameless)


def sweep(run_dir: Path) -> None:
    """Delete what a deletion that was killed, or could not be completed, has left; what stays waits for the next."""
    for path in run_dir.glob(f"checkpoints/step-*{DELETED}"):
        with contextlib.suppress(OSError):
            discard(path)


def surplus(run_dir: Path, newest: Path, keep: int, keep_every: int) -> list[Path]:
    """The checkpoints that are not to be kept, oldest first.

    Args:
        run_dir: folder of the run.
        newest: the checkpoint just written, which stays: a damaged one may seem to be newer.
        keep: newest checkpoints to keep; 0 keeps all.
        keep_every: checkpoints of steps that this divides are kept; 0 means none of them.
    """
    others = [folder for folder in checkpoints(run_dir) if folder != newest]
    old = others[: max(len(others) + 1 - keep, 0)] if keep > 0 else []
    return [folder for folder in old if not (keep_every > 0 and step_of(folder) % keep_every == 0)]


def prune(
    run_dir: Path, keep: int, keep_every: int = 0, *, damaged: bool = False, key: bytes | None = None, dry: bool = False
) -> list[Path]:
    """Delete checkpoints of a run that does not train now.

    Every checkpoint is verified first: damaged ones do not count among those that are kept, and nothing is deleted
    unless one that stays is valid.

    Args:
        run_dir: folder of the run.
        keep: newest valid checkpoints to keep; 0 keeps all.
        keep_every: valid checkpoints of steps that this divides are kept; 0 means none of them.
        damaged: delete damaged ones too.
        key: the secret with which checkpoints must be signed, if there is one.
        dry: only say what would be deleted.

    Returns:
        What was deleted.

    Raises:
        ValueError: no checkpoint of the run is valid, or a job has the folder.
    """
    if not dry and checkpoints(run_dir):
        with run_lock(run_dir):
            chosen = prune(run_dir, keep, keep_every, damaged=damaged, key=key, dry=True)
            for folder in chosen:
                delete(folder)
            sweep(run_dir)
        return chosen
    valid, broken = [], []
    for folder in checkpoints(run_dir):
        try:
            verify(folder, key)
        except CheckpointError:
            broken.append(folder)
        else:
            valid.append(folder)
    if not valid:
        raise ValueError(f"{run_dir} has no valid checkpoint ({len(broken)} damaged ones): nothing is deleted")
    old = valid[:-keep] if keep > 0 else []
    chosen = [folder for folder in old if not (keep_every > 0 and step_of(folder) % keep_every == 0)]
    return chosen + (broken if damaged else [])
