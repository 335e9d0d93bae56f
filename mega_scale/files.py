"""Files on this machine: one rule for the paths that a user gives, writing as a whole, and checksums."""

import json
import os
import re
from pathlib import Path
from typing import Any

import xxhash

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.\-]+):/")
_READ_AT_ONCE = 1 << 24  # bytes


def local_path(path: str, key: str) -> str:
    """Expand `~` and `~user`, and refuse what names no place on this machine.

    Args:
        path: of a file or folder, a glob, or a name that is no path.
        key: what it was given as, for messages.

    Returns:
        The path.

    Raises:
        ValueError: It is empty, or begins with a scheme (`s3://`, or what is left of one, `s3:/`) or an unknown user.
    """
    if not path.strip():
        raise ValueError(f"{key}={path!r} names nothing: give a path, or leave {key} out")
    if scheme := _SCHEME.match(path):
        raise ValueError(
            f"{key}={path!r}: {scheme[1]}:// is no local path, and stores are not supported: mount it, or copy it here "
            f"(a folder of this name is ./{path.strip()})"
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise ValueError(f"{key}={path!r}: there is no such user, or no home folder (a file of this name is ./{path})")
    return expanded


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there as a whole or not at all, also after the machine stops.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def checksum(path: Path) -> str:
    """The xxh3 checksum of a file (128 bits, hexadecimal).

    Raises:
        OSError: it cannot be read.
    """
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while content := file.read(_READ_AT_ONCE):
            total.update(content)
    return total.hexdigest()
