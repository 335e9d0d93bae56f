"""A run folder: which job has it, its checkpoints, and which of them is the newest that holds what was written.

README.md draws it. A checkpoint bears its name only when all of it lies on the disk. `latest` is for people and other
programs: a run resumes from the newest checkpoint that is proven, whatever `latest` says.
"""

import contextlib
import hmac
import json
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from mega_scale import files
from mega_scale.files import FileLock, Record, discard, read_regular, replace_text
from mega_scale.settings import require_ranges

if TYPE_CHECKING:
    from mega_scale.parallel import World

MANIFEST, STATE, RANDOM, TRAINER, LATEST = "manifest.json", "state", "random", "trainer.json", "latest"
LOCK = "run.lock"

ALLOW_OLDER = "where the newest checkpoint of a run folder is damaged or gone, take an older one"  # of commands
_FORMAT = 1
_PLAIN, _SIGNED = "xxh3_128", "hmac-sha256"
_SHORTEST_KEY = 16
_MOST_BYTES = 2**28  # of a manifest; some 100 a file
_POINTER_BYTES = 2**16
_NAME = re.compile(r"step-[0-9]{8,}")
_LARGE = f"{STATE}/part-"
_NAMED = 3  # strays in a line
_DELETED = ".deleted"  # follows the name of a checkpoint that is being deleted


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many are kept; one is always written at the end."""

    every: int = 0
    """Steps between two checkpoints; 0 writes one at the end, and where schedule.decay=wsd falls, only (steps)."""

    keep: int = 0
    """Newest checkpoints to keep, older ones are deleted after a new one is proven, but not the one from which
    schedule.decay=wsd falls; 0 keeps all (checkpoints)."""

    keep_every: int = 0
    """Checkpoints of steps that this divides are never deleted; 0 means none of them (steps)."""

    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in host memory (no unit)."""

    key_file: str | None = None
    """File with a secret of at least 16 bytes, with which checkpoints are signed (HMAC-SHA256) against tampering; those
    that are not signed with it are not loaded (path)."""

    def __post_init__(self) -> None:
        if self.key_file is not None:
            self.key_file = files.local_path(self.key_file, "checkpoint.key_file")

    def validate(self) -> None:
        """Refuse values outside their range. Raises ValueError."""
        require_ranges("checkpoint", self, not_negative=("every", "keep", "keep_every"))


class CheckpointError(ValueError):
    """A checkpoint is not what was written; the message says what is wrong with which file."""


# The manifest: size and hash of every file, written last, verified before anything is read
#
# A file system may lose or flip bits, and loaders do not notice. xxh3 finds accidents; against somebody who edits files
# on purpose every hash is an HMAC with a secret: `key`, None where there is none, in all functions here.


class Manifest(NamedTuple):
    step: int  # optimizer steps done
    serial: int  # among all checkpoints of its run: the newest is known after going on from an older one
    files: dict[str, Record]  # by path relative to the folder, with slashes

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.files.values())


def read_key(path: str | None) -> bytes | None:
    """Read the secret of `checkpoint.key_file`. Raises ValueError where it cannot be read or is too short."""
    if path is None:
        return None
    try:
        if len(key := Path(path).read_bytes().strip()) >= _SHORTEST_KEY:
            return key
        problem = f"holds {len(key)} bytes: give a secret of {_SHORTEST_KEY} or more"
    except OSError as error:
        problem = f"cannot be read ({error.strerror}): name a readable file"
    raise ValueError(f"checkpoint.key_file={path!r} {problem}")


def write_manifest(folder: Path, manifest: Manifest, key: bytes | None) -> None:
    replace_text(folder / MANIFEST, _manifest_text(manifest, key))


def read_manifest(folder: Path, key: bytes | None) -> Manifest:
    """Read `manifest.json`, and verify that it is the one that was written. Raises CheckpointError."""
    try:
        text = read_regular(folder / MANIFEST, _MOST_BYTES)
        content = json.loads(text)
        if content["format"] != _FORMAT:
            raise CheckpointError(f"{MANIFEST} has format {content['format']!r}, this version reads {_FORMAT}")
        algorithm = content["hash"]
        if algorithm != (_PLAIN if key is None else _SIGNED):
            needed = "it is signed: set checkpoint.key_file" if key is None else "it is not signed with a secret"
            raise CheckpointError(f"{MANIFEST} has hashes of kind {algorithm!r}: {needed}")
        listed = {path: Record(size, found) for path, (size, found) in content["files"].items()}
        manifest = Manifest(content["step"], content["serial"], listed)
        # To the byte: what JSON reads alike, as a key given twice, was not written by us either.
        if not hmac.compare_digest(_manifest_text(manifest, key).encode(), text):
            changed = "it was changed after it was written" + ("" if key is None else ", or signed with another secret")
            raise CheckpointError(f"{MANIFEST} does not have its own hash: {changed}")
        for number in (manifest.step, manifest.serial, *(record.size for record in listed.values())):
            if type(number) is not int or number < 0:
                raise CheckpointError(f"{MANIFEST} has {str(number)[:40]} where a count belongs")
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({files.reason(error)})") from None
    if folder.name.startswith("step-") and folder.name != f"step-{manifest.step:08d}":
        raise CheckpointError(f"{MANIFEST} is of step {manifest.step}, not of this folder")
    return manifest


def _manifest_text(manifest: Manifest, key: bytes | None) -> str:
    content: dict[str, Any] = {
        "format": _FORMAT,
        "step": manifest.step,
        "serial": manifest.serial,
        "hash": _PLAIN if key is None else _SIGNED,
        "files": dict(sorted(manifest.files.items())),
    }
    found = files.new_hash(key)
    found.update(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    return json.dumps({**content, "digest": found.hexdigest()}, indent=1) + "\n"


def claimed_serial(folder: Path) -> int:
    """Serial to sort by; 0 where the manifest is damaged. Not verified where it is signed: this needs no secret."""
    try:
        content = json.loads(read_regular(folder / MANIFEST, _MOST_BYTES))
        signed = content["hash"] == _SIGNED
        return max(int(content["serial"]), 0) if signed else read_manifest(folder, None).serial
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def own_files(folder: Path) -> set[str]:
    """Names of the files of a checkpoint that has been verified; whatever else lies there is none of it."""
    return set(json.loads(read_regular(folder / MANIFEST, _MOST_BYTES))["files"])


# What lies in a checkpoint's folder, compared with its manifest


def verify(
    folder: Path,
    key: bytes | None = None,
    elsewhere: Mapping[str, int] | None = None,
    *,
    state: bool = True,
    share: tuple[int, int] = (0, 1),
) -> Manifest:
    """Verify that a checkpoint holds what was written: names, sizes and hashes of all files.

    Args:
        folder: the checkpoint.
        key: secret with which it is signed.
        elsewhere: sizes of files that do not lie here, by name.
        state: whether the files of its state are read too.
        share: rank and number of those that share the work: each looks at its files alone, the first at names too.
            So only the manifest grows with the number of ranks that wrote the checkpoint.

    Raises CheckpointError, which names the folder and the first file that differs.
    """
    (rank, ranks), elsewhere = share, elsewhere or {}
    try:
        manifest = read_manifest(folder, key)
        found = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))[rank::ranks]
        if rank == 0:
            _check_names(folder, manifest, elsewhere)
        _check_sizes(folder, manifest, found, elsewhere)
        for name in found:
            if (state or not name.startswith(_LARGE)) and files.hash_file(folder / name, key) != manifest.files[name]:
                raise CheckpointError(f"{name} does not hold what was written (its hash differs)")
        return manifest
    except CheckpointError as error:
        problem = str(error)
    except OSError as error:  # of a disk that fails, or a folder that may not be looked into
        problem = f"{error.filename or folder} cannot be read ({error.strerror or error})"
    raise CheckpointError(f"{folder} is no valid checkpoint: {problem}")


verify_quickly = partial(verify, state=False)
"""`verify` all but the state: manifest, names, sizes, and what is small."""


def verify_outline(folder: Path, key: bytes | None = None) -> Manifest:
    """Verify the manifest and what describes the run, and no file of which each rank has one: what every rank of a
    large run can do before they meet, and `find_checkpoint` with a `world` does the rest. Raises CheckpointError."""
    manifest = read_manifest(folder, key)
    described = [name for name in manifest.files if not name.startswith((f"{STATE}/", f"{RANDOM}/"))]
    try:
        _check_sizes(folder, manifest, described, {})
        for name in described:
            if files.hash_file(folder / name, key) != manifest.files[name]:
                raise CheckpointError(f"{name} does not hold what was written (its hash differs)")
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is no valid checkpoint: {error}") from None
    except OSError as error:
        problem = f"{error.filename or folder} cannot be read ({error.strerror or error})"
        raise CheckpointError(f"{folder} is no valid checkpoint: {problem}") from None
    return manifest


def _verify_together(folder: Path, key: bytes | None, world: "World") -> Manifest:
    """Verify a checkpoint, each rank some of its files; collective. Raises the same CheckpointError on all ranks."""
    problem, manifest = None, Manifest(0, 0, {})
    try:
        manifest = verify(folder, key, share=(world.rank, world.size))
    except CheckpointError as error:
        problem = str(error)
    if problem := world.first(problem):
        raise CheckpointError(problem)
    return manifest


def _check_names(folder: Path, manifest: Manifest, elsewhere: Mapping[str, int]) -> None:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    for name in _around(manifest) & found.keys():
        # A link to a folder is none of the checkpoint's own, and its files are not looked through.
        if found[name].is_symlink() or found[name].is_dir() == (name == MANIFEST):
            raise CheckpointError(f"{name} is a link, or no longer what it was")
        del found[name]
    if missing := manifest.files.keys() - found.keys() - elsewhere.keys():
        raise CheckpointError(f"{min(missing)} is missing")


def _check_sizes(folder: Path, manifest: Manifest, names: Iterable[str], elsewhere: Mapping[str, int]) -> None:
    for name in names:
        if (size := elsewhere.get(name)) is None:
            try:
                found = (folder / name).lstat()
            except FileNotFoundError:
                raise CheckpointError(f"{name} is missing") from None
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{name} is no regular file")
            size = found.st_size
        if size != manifest.files[name].size:
            raise CheckpointError(f"{name} has {size} bytes, {manifest.files[name].size} were written")


def _around(manifest: Manifest) -> set[str]:
    """Names that a checkpoint has beside its files: their folders, and the manifest."""
    return {parent.as_posix() for name in manifest.files for parent in PurePosixPath(name).parents} | {MANIFEST}


def strays(folder: Path, manifest: Manifest) -> list[str]:
    """What lies in a checkpoint's folder and is none of it, such as `.nfs...`; of a stray folder, only itself."""
    found = {path.relative_to(folder) for path in folder.rglob("*")}
    found -= {Path(name) for name in manifest.files.keys() | _around(manifest)}
    return sorted(path.as_posix() for path in found if path.parent not in found)


def read_state(folder: Path) -> dict[str, Any]:
    """Read `trainer.json` of a checkpoint. Raises ValueError where it holds something else than a trainer writes."""
    try:
        found = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
        for name, kind in {"step": int, "tokens": int, "data": dict, "layout": dict}.items():
            if type(found[name]) is not kind or (kind is int and found[name] < 0):
                raise ValueError(f"{name} is {str(found[name])[:40]!r}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{folder / TRAINER} cannot be read ({error!r}): choose another checkpoint") from None
    return found


def summary(folder: Path, key: bytes | None = None, elsewhere: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Facts about a checkpoint, whose state is not read; only the first three where it has a problem.

    Sizes of files that lie `elsewhere` are given by name.
    """
    found: dict[str, Any] = {"folder": str(folder), "serial": claimed_serial(folder), "problem": None}
    try:
        manifest, state = verify_quickly(folder, key, elsewhere=elsewhere), read_state(folder)
    except ValueError as error:
        return found | {"problem": str(error)}
    found |= {"step": manifest.step, "bytes": manifest.bytes, "tokens": state["tokens"], "layout": state["layout"]}
    return found | {"loss": state.get("validation", {}).get("loss")}


# The checkpoints of a run


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def state_file(rank: int) -> str:
    return f"part-{rank:05d}.safetensors"


def random_file(rank: int) -> str:
    return f"{RANDOM}/rank-{rank:05d}.safetensors"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, and links to them, in the order in which they were written, whole or not."""
    named = [path for path in run_dir.glob("checkpoints/step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in named if path.is_dir() or path.is_symlink()), key=_age)


def _age(folder: Path) -> tuple[int, int]:
    step, serial = _step_of(folder), claimed_serial(folder)
    if not serial:
        # One whose manifest cannot be read stands where its step would have put it: it is named when it was the newest.
        beside = (path for path in folder.parent.glob("step-*") if _NAME.fullmatch(path.name))
        serial = max((claimed_serial(path) for path in beside if _step_of(path) < step), default=0) + 1
    return serial, step


def others(run_dir: Path) -> list[Path]:
    """What lies beside the checkpoint folders of a run and is none of them, nor `latest`; nobody reads it."""
    known = {LATEST, *(folder.name for folder in checkpoints(run_dir))}
    return sorted(path for path in run_dir.glob("checkpoints/*") if path.name not in known)


def next_serial(run_dir: Path) -> int:
    """Number for the next checkpoint of a run, greater than that of all it has, damaged ones included."""
    return max((_age(folder)[0] for folder in checkpoints(run_dir)), default=0) + 1


def is_name(name: str) -> bool:
    """Whether a name is one of a checkpoint's folder."""
    return bool(_NAME.fullmatch(name))


def is_checkpoint(path: Path) -> bool:
    """Whether a path means a checkpoint's folder rather than a run's, whatever else lies there."""
    looks_so = (path / MANIFEST).exists() or (path / TRAINER).exists()
    return bool(_NAME.fullmatch(path.name)) or (looks_so and not checkpoints(path))


def find_checkpoint(
    path: Path,
    key: bytes | None = None,
    *,
    older: bool = True,
    proof: Callable[[Path, bytes | None], Manifest] = verify_quickly,
    world: "World | None" = None,
) -> tuple[Path, list[str]]:
    """The checkpoint that a path means: itself, or the newest of a run folder that is proven.

    `proof` is `verify_quickly`, or `verify`, which reads its state too. Where a `world` is given, its ranks share the
    reading of all of it, and this is collective. `older`: an older one may be taken for one that is damaged or gone.

    Returns its folder, and what is to be said: what is wrong with newer ones or with `latest`, and strays, a sentence
    each. Raises ValueError where there is none, only an older one could be taken and may not be, or it is damaged:
    nothing is taken instead of a checkpoint that was named.
    """
    named = is_checkpoint(path)
    candidates = [path] if named else checkpoints(path)[::-1]
    if world is not None:
        # Folders are listed once, so that all ranks try the same ones.
        named, names = world.broadcast([named, [str(folder) for folder in candidates]])
        candidates, proof = [Path(name) for name in names], partial(_verify_together, world=world)
    problems: list[str] = []
    for folder in candidates:
        try:
            manifest = proof(folder, key)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        pointer, gone = ([], False) if problems or named else _pointer_problem(path, folder)
        if not older and (newer := problems or (pointer if gone else [])):
            raise CheckpointError(f"{'; '.join(newer)}: to take {folder} instead, give that folder, or --allow-older")
        notes = _stray_notes(folder, manifest) if world is None or world.rank == 0 else []
        return folder, [*problems, *pointer, *notes]
    if named:
        remedy = "there is no other valid one beside it"
        for folder in checkpoints(path.parent.parent):
            with contextlib.suppress(CheckpointError):
                if folder.name != path.name and verify_quickly(folder, key):
                    remedy = f"resume from {folder} instead"
        raise CheckpointError(f"{problems[0]}; {remedy}")
    if problems:
        raise CheckpointError(f"none of the {len(problems)} checkpoints in {path} is valid: {'; '.join(problems)}")
    raise ValueError(
        f"{path} is neither a checkpoint (it has no {MANIFEST}) nor a run folder with one in checkpoints/: "
        "give a step-... folder, or the run_dir of a run that has saved"
    )


def _pointer_problem(run_dir: Path, newest: Path) -> tuple[list[str], bool]:
    """What is wrong with `latest`, whose word nobody takes, and whether it names a checkpoint that is gone."""
    pointer, gone = run_dir / "checkpoints" / LATEST, False
    try:
        text = read_regular(pointer, _POINTER_BYTES).decode(errors="replace")
        if text == newest.name + "\n":
            return [], False
        what = f"holds {text[:40]!r}"
        gone = bool(_NAME.fullmatch(text.strip())) and not pointer.with_name(text.strip()).is_dir()
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
    return [f"{pointer} {what}, {newest.name} is the newest valid checkpoint"], gone


def _stray_notes(folder: Path, manifest: Manifest) -> list[str]:
    found = strays(folder, manifest)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    names = ", ".join(map(repr, found[:_NAMED]))
    return [f"{folder} also holds {names}{more}, which nobody reads"] if found else []


# Which are deleted; the last valid one never is


def delete(folder: Path) -> None:
    """Delete a checkpoint, its name first: a kill half way leaves no damaged one. Raises OSError."""
    nameless = folder.with_suffix(_DELETED)
    discard(nameless)
    folder.rename(nameless)
    discard(nameless)


def sweep(run_dir: Path, ending: str = _DELETED) -> None:
    """Delete what a deletion (or, by another `ending` of its name, a save) that was killed or failed has left."""
    for path in run_dir.glob(f"checkpoints/step-*{ending}"):
        files.forget(path)


def surplus(folders: list[Path], keep: int, keep_every: int) -> list[Path]:
    """Those of some checkpoints, oldest first, that neither `keep` (0: all) nor `keep_every` (0: none) keeps."""
    old = folders[:-keep] if keep > 0 else []
    return [folder for folder in old if not (keep_every > 0 and _step_of(folder) % keep_every == 0)]


def prune(
    run_dir: Path,
    keep: int,
    keep_every: int = 0,
    *,
    damaged: bool = False,
    key: bytes | None = None,
    dry: bool = False,
    spared: Callable[[Path], bool] = lambda folder: False,
) -> tuple[list[Path], list[Path]]:
    """Delete checkpoints of a run that does not train now; `dry` deletes none.

    Every checkpoint is verified first: damaged ones do not count among those that are kept (see `surplus`), and are
    deleted if `damaged`. Returns those that are deleted, and those that only stay because they are `spared`. Raises
    ValueError where no checkpoint is valid, or a job has the folder.
    """
    valid, broken = [], []
    with contextlib.nullcontext() if dry or not checkpoints(run_dir) else FileLock(run_dir / LOCK):
        for folder in checkpoints(run_dir):
            try:
                verify(folder, key)
                valid.append(folder)
            except CheckpointError:
                broken.append(folder)
        if not valid:
            raise ValueError(f"{run_dir} has no valid checkpoint ({len(broken)} damaged ones): nothing is deleted")
        old = surplus(valid, keep, keep_every)
        staying = [folder for folder in old if spared(folder)]
        chosen = [folder for folder in old if folder not in staying] + (broken if damaged else [])
        if not dry:
            for folder in chosen:
                delete(folder)
            sweep(run_dir)
    return chosen, staying
