"""The checkpoints of a run: which there are, which is the newest that holds what was written.

`run_dir/checkpoints/step-00000030` holds

    manifest.json   size and hash of every other file, written last
    trainer.json    step, tokens, position in the data, layout, counters: plain JSON
    state/          model and optimizer in canonical form, see `mega_scale.checkpoint.state`
    random/         random state of each rank
    config.yaml     the run
    model/          the model's configuration and tokenizer

and bears its name only when all of it lies on the disk. `checkpoints/latest` names the last one written, for people and
other programs; what is resumed from is the newest that is proven, whatever `latest` says.
"""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mega_scale.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    claimed_serial,
    content_problem,
    list_problem,
    read_manifest,
    strays,
    write_manifest,
)
from mega_scale.files import FileLock, discard, local_path, read_regular, replace_text
from mega_scale.settings import require_ranges

STATE, RANDOM, TRAINER, LATEST = "state", "random", "trainer.json", "latest"
_COUNTS, _OBJECTS = ("step", "tokens"), ("data", "layout")  # that every `trainer.json` has
_NAME = re.compile(r"step-[0-9]{8,}")
_POINTER_BYTES = 2**16
_NAMED = 3  # strays in a line
DELETED = ".deleted"
"""What follows the name of a checkpoint that is being deleted."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many are kept; one is always written at the end."""

    every: int = 0
    """Steps between two checkpoints; 0 writes one at the end only (steps)."""

    keep: int = 0
    """Newest checkpoints to keep, older ones are deleted after a new one is proven; 0 keeps all (checkpoints)."""

    keep_every: int = 0
    """Checkpoints of steps that this divides are never deleted; 0 means none of them (steps)."""

    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in host memory (no unit)."""

    key_file: str | None = None
    """File with a secret of at least 16 bytes, with which checkpoints are signed (HMAC-SHA256) against tampering; those
    that are not signed with it are not loaded (path)."""

    def __post_init__(self) -> None:
        if self.key_file is not None:
            self.key_file = local_path(self.key_file, "checkpoint.key_file")

    def validate(self) -> None:
        """Refuse values outside their range. Raises ValueError, which names key, value and range."""
        require_ranges("checkpoint", self, not_negative=("every", "keep", "keep_every"))


def run_lock(run_dir: Path, lost: Callable[[str], None] = lambda _: None) -> FileLock:
    """The lock by which one job at a time has a run folder, which exists; for `lost` see `FileLock`."""
    return FileLock(run_dir / "run.lock", lost)


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Step that a checkpoint folder's name says."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, in the order in which they were written, whatever state they are in.

    A link is one of them, though it may lead to a disk that is not there.
    """
    named = [path for path in run_dir.glob("checkpoints/step-*") if _NAME.fullmatch(path.name)]
    found = [path for path in named if path.is_dir() or path.is_symlink()]
    return sorted(found, key=_age)


def others(run_dir: Path) -> list[Path]:
    """What lies beside the checkpoint folders of a run and is none of them, nor `latest`; nobody reads it."""
    known = {LATEST, *(folder.name for folder in checkpoints(run_dir))}
    return sorted(path for path in run_dir.glob("checkpoints/*") if path.name not in known)


def next_serial(run_dir: Path) -> int:
    """Number for the next checkpoint of a run, greater than that of all it has, damaged ones included."""
    return max((_age(folder)[0] for folder in checkpoints(run_dir)), default=0) + 1


def make_newest(folder: Path, key: bytes | None = None) -> None:
    """Have a verified checkpoint count as written last: its run goes on from it, not from those written after it.

    Raises OSError where it cannot be written.
    """
    run_dir = folder.parent.parent
    if checkpoints(run_dir)[-1].name != folder.name:
        write_manifest(folder, read_manifest(folder, key)._replace(serial=next_serial(run_dir)), key)
        replace_text(folder.parent / LATEST, folder.name + "\n")


def verify(folder: Path, key: bytes | None = None) -> Manifest:
    """Verify that a checkpoint holds what was written: names, sizes and hashes of all files.

    Args:
        folder: of the checkpoint.
        key: secret with which it must be signed, if there is one; so in all functions here.

    Raises:
        CheckpointError: it does not; names the folder and the first file that differs.
    """
    manifest = verify_quickly(folder, key)
    problem = content_problem(folder, manifest, manifest.files, key)
    if problem is not None:
        raise CheckpointError(f"{folder} is no valid checkpoint: {problem}")
    return manifest


def verify_quickly(folder: Path, key: bytes | None = None) -> Manifest:
    """Verify manifest, names, sizes, and what is small: all but the state. Raises CheckpointError as `verify` does."""
    try:
        manifest = read_manifest(folder, key)
        problem = list_problem(folder, manifest)
        if problem is None:
            problem = content_problem(folder, manifest, [n for n in manifest.files if not _is_large(n)], key)
    except CheckpointError as error:
        problem = str(error)
    except OSError as error:  # of a disk that fails, or a folder that may not be looked into
        problem = f"{error.filename or folder} cannot be read ({error.strerror or error})"
    if problem is not None:
        raise CheckpointError(f"{folder} is no valid checkpoint: {problem}")
    return manifest


def large_files(manifest: Manifest) -> list[str]:
    """The files that `verify_quickly` leaves out, largest first."""
    return sorted(filter(_is_large, manifest.files), key=lambda name: (-manifest.files[name].size, name))


def is_checkpoint(path: Path) -> bool:
    """Whether a path means a checkpoint's folder rather than a run's, whatever else lies there."""
    looks_so = (path / MANIFEST).exists() or (path / TRAINER).exists()
    return bool(_NAME.fullmatch(path.name)) or (looks_so and not checkpoints(path))


def newest_first(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, those that were written last first."""
    return checkpoints(run_dir)[::-1]


def find_checkpoint(
    path: Path,
    key: bytes | None = None,
    *,
    older: bool = True,
    proof: Callable[[Path, bytes | None], Manifest] = verify_quickly,
) -> tuple[Path, list[str]]:
    """The checkpoint that a path means: itself, or the newest of a run folder that is proven.

    Args:
        path: of a checkpoint or run folder.
        key: see `verify`.
        older: whether an older one may be taken where the newest of a run folder is damaged or gone.
        proof: `verify_quickly`, or `verify`, which reads the state too.

    Returns:
        Its folder, and what is to be said: what is wrong with newer ones or with `latest`, and strays, a sentence each.

    Raises:
        ValueError: the checkpoint is damaged, there is none, or only an older one could be taken and may not be;
            nothing else is taken instead of a checkpoint that was named.
    """
    if is_checkpoint(path):
        try:
            return path, stray_notes(path, proof(path, key))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {_others(path, key)}") from None
    problems = []
    for folder in newest_first(path):
        try:
            manifest = proof(folder, key)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        pointer = pointer_problem(path, folder)
        newer = problems + ([pointer] if pointer and _names_missing(path) else [])
        if newer and not older:
            raise CheckpointError(f"{'; '.join(newer)}: to take {folder} instead, give that folder, or --allow-older")
        return folder, [*problems, *([pointer] if pointer else []), *stray_notes(folder, manifest)]
    if problems:
        raise CheckpointError(f"none of the {len(problems)} checkpoints in {path} is valid: {'; '.join(problems)}")
    raise ValueError(
        f"{path} is neither a checkpoint (it has no {MANIFEST}) nor a run folder with one in checkpoints/: "
        "give a step-... folder, or the run_dir of a run that has saved"
    )


def pointer_problem(run_dir: Path, newest: Path) -> str | None:
    """What is wrong with `latest`, whose word nobody takes; none where it names the newest valid checkpoint."""
    pointer = run_dir / "checkpoints" / LATEST
    try:
        named = _named(run_dir)
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        return f"{pointer} {what}, {newest.name} is the newest valid checkpoint"
    if named == newest.name + "\n":
        return None
    if named.strip() == newest.name:
        return f"{pointer} was changed after it was written, but names the newest valid checkpoint"
    return f"{pointer} names {named.strip()[:40]!r}, {newest.name} is the newest valid checkpoint"


def stray_notes(folder: Path, manifest: Manifest) -> list[str]:
    """A sentence on what lies in a checkpoint's folder and is none of it, if anything does."""
    found = strays(folder, manifest)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    names = ", ".join(map(repr, found[:_NAMED]))
    return [f"{folder} also holds {names}{more}, which nobody reads"] if found else []


def read_state(folder: Path) -> dict[str, Any]:
    """Read `trainer.json` of a checkpoint. Raises ValueError where it holds something else than a trainer writes."""
    try:
        found = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
        for name in _COUNTS:
            if type(found[name]) is not int or found[name] < 0:
                raise ValueError(f"{name} is {str(found[name])[:40]!r}")
        for name in _OBJECTS:
            if not isinstance(found[name], dict):
                raise ValueError(f"{name} is {str(found[name])[:40]!r}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{folder / TRAINER} cannot be read ({error!r}): choose another checkpoint") from None
    return found


def summary(folder: Path, key: bytes | None = None) -> dict[str, Any]:
    """Facts about a checkpoint, whose state is not read.

    Returns:
        `folder`, `serial` and `problem` (a text, or None); of one without a problem also `step`, `bytes`, `tokens`,
        `loss` on the validation text (or None) and `layout`.
    """
    found: dict[str, Any] = {"folder": str(folder), "serial": claimed_serial(folder), "problem": None}
    try:
        manifest, state = verify_quickly(folder, key), read_state(folder)
    except ValueError as error:
        return found | {"problem": str(error)}
    found |= {"step": manifest.step, "bytes": manifest.bytes, "tokens": state["tokens"]}
    return found | {"loss": state.get("validation", {}).get("loss"), "layout": state["layout"]}


# Which are deleted; the last valid one never is


def delete(folder: Path) -> None:
    """Delete a checkpoint, its name first: what is killed half way leaves no damaged checkpoint behind.

    Of a linked one, only the link is deleted. Raises OSError where it cannot be deleted; once renamed, it no longer
    counts.
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
        key: see `verify`.
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


def _age(folder: Path) -> tuple[int, int]:
    step = step_of(folder)
    # One whose manifest cannot be read stands where its step would have put it, so that it is named when it was newest.
    return (claimed_serial(folder) or _serial_before(folder, step) + 1, step)


def _serial_before(folder: Path, step: int) -> int:
    older = [path for path in folder.parent.glob("step-*") if _NAME.fullmatch(path.name) and step_of(path) < step]
    return max((claimed_serial(path) for path in older), default=0)


def _named(run_dir: Path) -> str:
    return read_regular(run_dir / "checkpoints" / LATEST, _POINTER_BYTES).decode(errors="replace")


def _names_missing(run_dir: Path) -> bool:
    """Whether `latest` names a checkpoint that is no longer there."""
    try:
        name = _named(run_dir).strip()
    except OSError:
        return False
    return bool(_NAME.fullmatch(name)) and not (run_dir / "checkpoints" / name).is_dir()


def _is_large(name: str) -> bool:
    return name.startswith(f"{STATE}/part-")


def _others(path: Path, key: bytes | None) -> str:
    for folder in newest_first(path.parent.parent):
        if folder.name != path.name:
            try:
                verify_quickly(folder, key)
            except CheckpointError:
                continue
            return f"resume from {folder} instead"
    return "there is no other valid one beside it"
