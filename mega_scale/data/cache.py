"""Tokenised text of earlier runs: folders of prepared data, one for each corpus and tokenizer.

A folder is made under another name and renamed, so a reader never finds half of one, and several processes may make the
same one at once: the first one's stays.
"""

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mega_scale.data.prepared import Manifest, check_content, open_part, read_manifest, write_manifest
from mega_scale.data.rows import Tally
from mega_scale.data.token_files import ShardWriter
from mega_scale.data.token_store import TokenStore
from mega_scale.data.tokenizer import Encoded

_PART = "all"


def open_tokens(folder: Path, key: str) -> TokenStore | None:
    """Open tokens that were written before.

    Args:
        folder: Folder of the cache.
        key: Hash of what the tokens were made from.

    Returns:
        The tokens, or None where there are none or they are damaged.
    """
    try:
        for _ in check_content(folder / key):
            pass
        store = open_part(folder / key, read_manifest(folder / key), _PART)
        store.map()  # what is mapped stays readable when another process replaces the folder
    except (OSError, ValueError):
        return None
    return store


def write_tokens(folder: Path, key: str, pieces: Iterable[Encoded], dtype: str) -> TokenStore:
    """Write tokens piece by piece, so that they need not fit in memory.

    Args:
        folder: Folder of the cache, created if it does not exist.
        key: Hash of what the tokens are made from.
        pieces: Whole documents, in order.
        dtype: Little-endian unsigned integer type that holds every token.

    Returns:
        The tokens.

    Raises:
        ValueError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as unfinished:
            made = Path(unfinished) / "made"
            made.mkdir()
            writer = ShardWriter(made, _PART, dtype)
            for piece in pieces:
                writer.add(piece)
            manifest = Manifest("", "", dtype, {_PART: [writer.close()]}, Tally())
            write_manifest(made, manifest)
            store = open_part(made, manifest, _PART)
            store.map()
            if open_tokens(folder, key) is None:
                with suppress(OSError):  # there is none to replace
                    os.rename(folder / key, Path(unfinished) / "damaged")
            with suppress(OSError):  # another process was first
                os.rename(made, folder / key)
            return store
    except OSError as error:
        raise ValueError(
            f"the folder for tokenised text {str(folder)!r} cannot be written ({error}): name another one with "
            "data.cache_dir, or make room"
        ) from None
