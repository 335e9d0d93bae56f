"""The manifest of a checkpoint: size and hash of every file, written last, verified before anything is read.

A file system may lose or flip what it was given, and loaders do not notice: of checkpoints with one flipped bit, plain
ones load as if nothing had happened. xxh3 finds accidents; against somebody who edits files on purpose a secret is
needed, with which every hash is an HMAC.
"""

import hmac
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mega_scale.files import Record, hash_file, new_hash, read_regular

MANIFEST = "manifest.json"
_FORMAT = 1
_PLAIN, _SIGNED = "xxh3_128", "hmac-sha256"
_SHORTEST_KEY = 16
_MOST_BYTES = 2**28  # of a manifest; some 100 a file


class CheckpointError(ValueError):
    """A checkpoint is not what was written; the message says what is wrong with which file."""


class Manifest(NamedTuple):
    """What a checkpoint consists of.

    Args:
        step: optimizer steps done.
        serial: number of the checkpoint among all of its run, so that the newest is known after going on from an older
            one.
        files: by path relative to the folder, with slashes.
    """

    step: int
    serial: int
    files: dict[str, Record]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(record.size for record in self.files.values())


def read_key(path: str | None) -> bytes | None:
    """Read the secret of `checkpoint.key_file`.

    Raises ValueError where it cannot be read or is shorter than 16 bytes.
    """
    if path is None:
        return None
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"checkpoint.key_file={path!r} cannot be read ({error.strerror}): name a readable file"
        ) from None
    if len(key) < _SHORTEST_KEY:
        raise ValueError(
            f"checkpoint.key_file={path!r} holds {len(key)} bytes: give a secret of {_SHORTEST_KEY} or more"
        )
    return key


def write_manifest(folder: Path, manifest: Manifest, key: bytes | None) -> None:
    """Write or replace `manifest.json`, as a whole, and have the disk keep it. Raises OSError."""
    beside = folder.with_name(f"{folder.name}.{MANIFEST}")  # inside, it would be a file that does not belong there
    with open(beside, "wb") as file:
        file.write(_text(manifest, key))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / MANIFEST)


def read_manifest(folder: Path, key: bytes | None) -> Manifest:
    """Read `manifest.json`, and verify that it is the one that was written.

    Raises:
        CheckpointError: there is none, it was changed, belongs to another folder, or is not signed with the secret.
    """
    try:
        text = read_regular(folder / MANIFEST, _MOST_BYTES)
        content = json.loads(text)
        if content["format"] != _FORMAT:
            raise CheckpointError(f"{MANIFEST} has format {content['format']!r}, this version reads {_FORMAT}")
        algorithm = content["hash"]
        if algorithm != (_PLAIN if key is None else _SIGNED):
            needed = "it is signed: set checkpoint.key_file" if key is None else "it is not signed with a secret"
            raise CheckpointError(f"{MANIFEST} has hashes of kind {algorithm!r}: {needed}")
        files = {path: Record(size, found) for path, (size, found) in content["files"].items()}
        manifest = Manifest(content["step"], content["serial"], files)
        # To the byte: what JSON reads alike, as a key given twice, was not written by us either.
        if not hmac.compare_digest(_text(manifest, key), text):
            changed = "it was changed after it was written" + ("" if key is None else ", or signed with another secret")
            raise CheckpointError(f"{MANIFEST} does not have its own hash: {changed}")
        for number in (manifest.step, manifest.serial, *(record.size for record in files.values())):
            if type(number) is not int or number < 0:
                raise CheckpointError(f"{MANIFEST} has {str(number)[:40]} where a count belongs")
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({' '.join(repr(error).split())[:200]})") from None
    if folder.name.startswith("step-") and folder.name != f"step-{manifest.step:08d}":
        raise CheckpointError(f"{MANIFEST} is of step {manifest.step}, not of this folder")
    return manifest


def claimed_serial(folder: Path) -> int:
    """Number of a checkpoint among those of its run, to sort by; 0 where the manifest is damaged.

    Not verified where it is signed: this needs no secret.
    """
    try:
        return read_manifest(folder, None).serial
    except CheckpointError:
        pass
    try:
        content = json.loads(read_regular(folder / MANIFEST, _MOST_BYTES))
        return max(int(content["serial"]), 0) if content["hash"] == _SIGNED else 0
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def own_files(folder: Path) -> set[str]:
    """Names of the files of a checkpoint that has been verified; whatever else lies there is none of it."""
    return set(json.loads(read_regular(folder / MANIFEST, _MOST_BYTES))["files"])


def list_problem(folder: Path, manifest: Manifest) -> str | None:
    """Say what is wrong with names and sizes of a checkpoint's files, without reading them; none where all is well."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    for name in _around(manifest) & found.keys():
        # A link to a folder is none of the checkpoint's own, and its files are not looked through.
        if found[name].is_symlink() or found[name].is_dir() == (name == MANIFEST):
            return f"{name} is a link, or no longer what it was"
        del found[name]
    if missing := manifest.files.keys() - found.keys():
        return f"{min(missing)} is missing"
    for name, record in manifest.files.items():
        if found[name].is_symlink() or not found[name].is_file():
            return f"{name} is no regular file"
        size = found[name].stat().st_size
        if size != record.size:
            return f"{name} has {size} bytes, {record.size} were written"
    return None


def strays(folder: Path, manifest: Manifest) -> list[str]:
    """What lies in a checkpoint's folder and is none of it, such as `.nfs...` or `.DS_Store`; nobody reads it.

    Of a stray folder, only the folder itself.
    """
    found = {path.relative_to(folder) for path in folder.rglob("*")}
    found -= {Path(name) for name in manifest.files.keys() | _around(manifest)}
    return sorted(path.as_posix() for path in found if path.parent not in found)


def content_problem(folder: Path, manifest: Manifest, names: Iterable[str], key: bytes | None) -> str | None:
    """Say which of some files does not hold what was written; none where all do."""
    for name in names:
        try:
            found = hash_file(folder / name, key)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if (
            not hmac.compare_digest(found.hash, str(manifest.files[name].hash))
            or found.size != manifest.files[name].size
        ):
            return f"{name} does not hold what was written (its hash differs)"
    return None


def _around(manifest: Manifest) -> set[str]:
    """Names that a checkpoint has beside its files: their folders, and the manifest."""
    return {parent.as_posix() for name in manifest.files for parent in PurePosixPath(name).parents} | {MANIFEST}


def _text(manifest: Manifest, key: bytes | None) -> bytes:
    content: dict[str, Any] = {
        "format": _FORMAT,
        "step": manifest.step,
        "serial": manifest.serial,
        "hash": _PLAIN if key is None else _SIGNED,
        "files": dict(sorted(manifest.files.items())),
    }
    found = new_hash(key)
    found.update(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    return (json.dumps({**content, "digest": found.hexdigest()}, indent=1) + "\n").encode()
