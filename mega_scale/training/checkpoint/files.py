"""Writing small files so that they survive a crash, and reading what may be anything."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder.

    Raises:
        OSError: it cannot.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def dump(path: Path, content: dict[str, Any]) -> None:
    """Write plain JSON.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_regular(path: Path, limit: int) -> bytes:
    """Read a file of which nobody knows yet what it is: no link is followed, no pipe waited for.

    Args:
        path: of the file.
        limit: most that is read (bytes).

    Returns:
        All of it.

    Raises:
        OSError: it is missing, cannot be read, is no regular file, or is larger than the limit.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name} is no regular file")
        if status.st_size > limit:
            raise OSError(f"{path.name} has {status.st_size:,} bytes, more than the {limit:,} that one can have")
        return file.read(limit)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; where there is no room for all of it, none of it stays.

    Raises:
        OSError: it cannot be written.
    """
    data = (line + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        size, written = file.tell(), 0
        try:
            while written < len(data):
                written += file.write(data[written:])
        except OSError:
            file.truncate(size)
            raise


def discard(path: Path) -> None:
    """Delete what lies at a path, if anything; of a link the link alone, never what it points to.

    Raises:
        OSError: some of it stays.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)  # as much as can be, where one file cannot
    if path.exists():
        path.rmdir()


def reason(error: OSError) -> str:
    """What is wrong, without number and name of the class."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")


def replace_text(path: Path, text: str) -> None:
    """Give a file another content at once: whoever reads it finds all of the old or all of the new.

    Raises:
        OSError: it cannot be written.
    """
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    flush(fresh)
    os.replace(fresh, path)
    flush(path.parent)
