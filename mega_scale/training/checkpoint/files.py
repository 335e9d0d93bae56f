"""Writing small files so that they survive a crash."""

import json
import os
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
