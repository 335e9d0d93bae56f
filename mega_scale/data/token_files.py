"""Tokens on disk, mapped and never read as a whole: a shard is a file of tokens and two that index its documents.

`NAME.tokens` is the bare array of all documents' tokens, each document with the token that ends it. For each document,
`NAME.ends` has the place after its last token, and `NAME.text_ends` the UTF-8 bytes of all text up to its end (int64).
All are little-endian, are written under another name, and are renamed when they are whole.
"""

import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mega_scale.data.tokenizer import Encoded

_CHECKED_AT_ONCE = 1 << 24  # bytes
_INDEX_TYPES = {"ends": "<i8", "text_ends": "<i8"}


@dataclass(frozen=True)
class ShardRecord:
    """What a shard must hold.

    Args:
        name: File name without suffix.
        tokens: Number of tokens.
        documents: Number of documents.
        bytes: UTF-8 bytes of the documents' text.
        checksums: xxh3 of the 128 bit kind, hexadecimal, by suffix of the file.
    """

    name: str
    tokens: int
    documents: int
    bytes: int
    checksums: dict[str, str]


class MappedFile:
    """A file as an array that lies in the page cache, shared by all processes of a machine.

    Args:
        path: The file.
        dtype: Of its values.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        with path.open("rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0  # which cannot be mapped
            self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.array = np.empty(0, dtype) if self._map is None else np.frombuffer(self._map, dtype)
        # Rows lie anywhere: reading on behind one, as systems do, would fetch thirty times what is asked for.
        self._advise("MADV_RANDOM")

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Values `start` to below `stop`, a view, fetched from disk at once."""
        first = start * self.array.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        self._advise("MADV_WILLNEED", first, stop * self.array.itemsize - first)
        return self.array[start:stop]

    def release(self) -> None:
        """Give back the pages that this process looked at; they stay in the page cache while there is room."""
        self._advise("MADV_DONTNEED")

    def _advise(self, what: str, *place: int) -> None:
        if self._map is not None and hasattr(mmap, what):  # not every system has them
            self._map.madvise(getattr(mmap, what), *place)


class Shard:
    """One shard, mapped when it is first read.

    Args:
        folder: Where its files lie.
        written: What they must hold.
        dtype: Of the tokens.
        documents: Take only so many of its first documents; None takes all.

    Attributes:
        record: What is taken.
    """

    def __init__(self, folder: Path, written: ShardRecord, dtype: str, documents: int | None = None) -> None:
        self._folder, self._written, self._dtype = folder, written, dtype
        self.record = written
        if documents is not None and documents < written.documents:
            self.record = self._head(documents)

    @cached_property
    def mapped(self) -> dict[str, MappedFile]:
        """Its files by suffix; mapped at the first use, and readable from then on even if they are removed."""
        return {suffix: MappedFile(self._path(suffix), dtype) for suffix, dtype in self._types().items()}

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to below `stop`, or to the shard's end: (n,) unsigned integers, a view."""
        return self.mapped["tokens"].slice(start, min(stop, self.record.tokens))

    @property
    def ends(self) -> np.ndarray:
        """(documents,) int64, ascending: the place after each document's last token."""
        return self.mapped["ends"].array[: self.record.documents]

    @property
    def text_ends(self) -> np.ndarray:
        """(documents,) int64, ascending: the UTF-8 bytes of all text up to each document's end."""
        return self.mapped["text_ends"].array[: self.record.documents]

    def head(self, documents: int) -> "Shard":
        """Keep only so many of its first documents."""
        return Shard(self._folder, self._written, self._dtype, min(documents, self.record.documents))

    def release(self) -> None:
        """Give back the pages that this process looked at."""
        for file in self.__dict__.get("mapped", {}).values():
            file.release()

    def check_sizes(self) -> None:
        """Compare the sizes of the files with what was written, without reading them.

        Raises:
            ValueError: A file is missing, cut or too long.
        """
        for suffix, dtype in self._types().items():
            path, count = self._path(suffix), self._written.tokens if suffix == "tokens" else self._written.documents
            size = count * np.dtype(dtype).itemsize
            try:
                found = path.stat().st_size
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}; prepare it again") from None
            if found != size:
                raise ValueError(f"{path} has {found} bytes, not the {size} that were written: prepare it again")

    def check_content(self) -> None:
        """Read the files and compare their checksums with those of what was written.

        Raises:
            ValueError: A file is missing or not what was written.
        """
        self.check_sizes()
        for suffix, checksum in self._written.checksums.items():
            if checksum_of(self._path(suffix)) != checksum:
                raise ValueError(f"{self._path(suffix)} is damaged, its checksum is not {checksum}: prepare it again")

    def _types(self) -> dict[str, str]:
        return {"tokens": self._dtype, **_INDEX_TYPES}

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._written.name}.{suffix}"

    def _head(self, documents: int) -> ShardRecord:
        tokens, text_bytes = (int(self.mapped[suffix].array[documents - 1]) for suffix in _INDEX_TYPES)
        checksums = {suffix: f"{checksum}[:{documents}]" for suffix, checksum in self._written.checksums.items()}
        return ShardRecord(self._written.name, tokens, documents, text_bytes, checksums)


class ShardWriter:
    """Writes one shard; nothing is there under its name before `close`.

    Args:
        folder: An existing folder.
        name: File name without suffix.
        dtype: Little-endian unsigned integer type that holds every token.
    """

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._tokens = self._documents = self._bytes = 0
        suffixes = ("tokens", *_INDEX_TYPES)
        self._files: dict[str, Any] = {suffix: self._unfinished(suffix).open("wb") for suffix in suffixes}
        self._hashes = {suffix: xxhash.xxh3_128() for suffix in suffixes}

    def add(self, pieces: Encoded) -> None:
        """Append documents."""
        self._write("tokens", np.ascontiguousarray(pieces.tokens, dtype=self._dtype))
        self._write("ends", (pieces.ends + self._tokens).astype("<i8"))
        self._write("text_ends", (pieces.text_ends + self._bytes).astype("<i8"))
        self._tokens += len(pieces.tokens)
        self._documents += len(pieces.ends)
        self._bytes += int(pieces.text_ends[-1])

    def close(self) -> ShardRecord:
        """Put the files in their place."""
        for suffix, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())  # or a machine that stops may keep the name and lose the content
            file.close()
            os.replace(self._unfinished(suffix), self._folder / f"{self._name}.{suffix}")
        checksums = {suffix: total.hexdigest() for suffix, total in self._hashes.items()}
        return ShardRecord(self._name, self._tokens, self._documents, self._bytes, checksums)

    def _unfinished(self, suffix: str) -> Path:
        # Of this process alone: one that lost its parent may still write the same shard.
        return self._folder / f"{self._name}.{suffix}.unfinished-{os.getpid()}"

    def _write(self, suffix: str, array: np.ndarray) -> None:
        self._files[suffix].write(array.data)
        self._hashes[suffix].update(array.data)


def hash_of(tokens: np.ndarray) -> str:
    """Hash an array of tokens in memory (xxh3, 128 bits, hexadecimal)."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(tokens).data)


def checksum_of(path: Path) -> str:
    """Compute the checksum of a file (xxh3, 128 bits, hexadecimal)."""
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_CHECKED_AT_ONCE):
            total.update(piece)
    return total.hexdigest()
