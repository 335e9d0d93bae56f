"""Tokens on disk, so that a corpus is tokenised once and its tokens are shared by the processes of a machine.

`<key>.json` names `<fingerprint>.tokens`, the bare array; the key is a hash of what was tokenised. Both are written
under another name and renamed, tokens first: a reader never finds half a file, and several processes may write at once.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

_HASHED_AT_ONCE = 1 << 24  # tokens


class StoredTokens(NamedTuple):
    """Tokens of a corpus.

    Args:
        tokens: (T,) unsigned integers, mapped from disk.
        bytes: UTF-8 bytes of the text.
        fingerprint: Hash of the tokens, 32 hexadecimal digits.
    """

    tokens: np.ndarray
    bytes: int
    fingerprint: str


def cache_folder(cache_dir: str | None) -> Path:
    """Name the folder for tokenised text; creates nothing.

    Args:
        cache_dir: `data.cache_dir`; None takes the user's cache folder.

    Returns:
        The folder.

    Raises:
        ValueError: There is no home folder.
    """
    try:
        return Path("~/.cache/mega_scale" if cache_dir is None else cache_dir).expanduser()
    except RuntimeError:
        raise ValueError(f"data.cache_dir={cache_dir!r}: this user has no home folder; name a folder") from None


def fingerprint(tokens: np.ndarray) -> str:
    """Hash tokens; the same ones have the same fingerprint on every machine.

    Args:
        tokens: (T,) little-endian unsigned integers.

    Returns:
        32 hexadecimal digits.
    """
    total = hashlib.blake2b(tokens.dtype.str.encode(), digest_size=16)
    for start in range(0, len(tokens), _HASHED_AT_ONCE):
        total.update(np.ascontiguousarray(tokens[start : start + _HASHED_AT_ONCE]).data)
    return total.hexdigest()


def open_tokens(folder: Path, key: str) -> StoredTokens | None:
    """Open tokens that were written before.

    Args:
        folder: Folder of the cache.
        key: Hash of what the tokens were made from.

    Returns:
        The tokens, or None where there are none or they are damaged.
    """
    try:
        entry = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / f"{entry['fingerprint']}.tokens", dtype=entry["dtype"], mode="r")
        found = StoredTokens(tokens, entry["bytes"], entry["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if fingerprint(tokens) == found.fingerprint else None


def write_tokens(folder: Path, key: str, pieces: Iterable[tuple[np.ndarray, int]], dtype: str) -> StoredTokens | None:
    """Write tokens piece by piece, so that they need not fit in memory.

    Args:
        folder: Folder of the cache, created if it does not exist.
        key: Hash of what the tokens are made from.
        pieces: Tokens (T,) and the UTF-8 bytes of their text, in order.
        dtype: Little-endian unsigned integer type that holds every token.

    Returns:
        The tokens, or None if there were none.

    Raises:
        ValueError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as unfinished:
            return _write(folder, Path(unfinished), key, pieces, dtype)
    except OSError as error:
        raise ValueError(
            f"the folder for tokenised text {str(folder)!r} cannot be written ({error}): name another one with "
            "data.cache_dir, or make room"
        ) from None


def _write(
    folder: Path, unfinished: Path, key: str, pieces: Iterable[tuple[np.ndarray, int]], dtype: str
) -> StoredTokens | None:
    total, text_bytes, length = hashlib.blake2b(dtype.encode(), digest_size=16), 0, 0
    with open(unfinished / "tokens", "wb") as file:
        for tokens, count in pieces:
            array = np.ascontiguousarray(tokens, dtype=dtype)
            file.write(array.data)
            total.update(array.data)
            text_bytes += count
            length += len(array)
    if not length:
        return None
    name = total.hexdigest()
    entry = {"fingerprint": name, "dtype": dtype, "bytes": text_bytes, "tokens": length}
    (unfinished / "entry").write_text(json.dumps(entry), encoding="utf-8")
    os.replace(unfinished / "tokens", folder / f"{name}.tokens")
    os.replace(unfinished / "entry", folder / f"{key}.json")
    return StoredTokens(np.memmap(folder / f"{name}.tokens", dtype=dtype, mode="r"), text_bytes, name)
