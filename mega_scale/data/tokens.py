"""Tokens on disk: shards, the corpus they make, folders of prepared data, and the cache of tokenised text.

A shard is `NAME.tokens`, the bare array of all documents' tokens with what ends each, and two indexes (int64):
`NAME.ends`, the place after each document's last token, and `NAME.text_ends`, the UTF-8 bytes of all text up to there.
A folder has shards and `manifest.json`, written last: one that has it is whole. The cache holds such folders.
"""

import copy
import hashlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from mega_scale.data.config import DataConfig, cache_folder
from mega_scale.data.sources import Documents, Tally, hashed
from mega_scale.data.tokenizer import Encoded, encode, token_type, tokenizer_digest
from mega_scale.files import FileLock, LockedError, hash_file, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "mega_scale tokens 2"
_MANIFEST = "manifest.json"
_CACHED_PART = "all"
# Looking at one token maps 64 KiB into the process, which counts as its memory until it is given back.
_MAPPED_AT_ONCE = 1 << 16  # bytes
_RELEASED_AFTER = 1 << 24  # bytes
_POLL_S = 0.2


@dataclass(frozen=True)
class ShardRecord:
    """What a shard must hold: numbers of tokens, documents and UTF-8 bytes of text, and xxh3 (128 bits) by suffix."""

    name: str
    tokens: int
    documents: int
    bytes: int
    checksums: dict[str, str]


class Shard:
    """One shard, or its first documents, mapped when it is first read. `record` is what is taken of it."""

    def __init__(self, folder: Path, written: ShardRecord, dtype: str) -> None:
        self._folder, self._written, self.record = folder, written, written
        self._types = {"tokens": dtype, "ends": "<i8", "text_ends": "<i8"}
        self._maps: dict[str, mmap.mmap] = {}

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Its files by suffix, in the page cache, which processes share; readable from then on even if removed."""
        found = {}
        for suffix, dtype in self._types.items():
            with self._path(suffix).open("rb") as file:
                mapped = self._maps[suffix] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Rows lie anywhere: reading on after one would fetch thirty times what is asked for.
            mapped.madvise(mmap.MADV_RANDOM)
            found[suffix] = np.frombuffer(mapped, dtype)
        return found

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to below `stop`, or to the shard's end: (n,) unsigned integers, a view, fetched at once."""
        array, stop = self.arrays["tokens"], min(stop, self.record.tokens)
        first = start * array.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        self._maps["tokens"].madvise(mmap.MADV_WILLNEED, first, stop * array.itemsize - first)
        return array[start:stop]

    def head(self, documents: int) -> "Shard":
        """Keep only so many of its first documents."""
        if documents >= self.record.documents:
            return self
        tokens, size = (int(self.arrays[suffix][documents - 1]) for suffix in ("ends", "text_ends"))
        checksums = {suffix: f"{total}[:{documents}]" for suffix, total in self._written.checksums.items()}
        found = copy.copy(self)
        found.record = ShardRecord(self._written.name, tokens, documents, size, checksums)
        return found

    def release(self) -> None:
        """Give back the pages that this process looked at; they stay in the page cache while there is room."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def check(self, *, content: bool) -> None:
        """Refuse a file that is missing, or whose size, or with `content` checksum, is not what was written."""
        for suffix, dtype in self._types.items():
            path, written = self._path(suffix), self._written
            size = (written.tokens if suffix == "tokens" else written.documents) * np.dtype(dtype).itemsize
            try:
                found = path.stat().st_size
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}; prepare it again") from None
            if found != size:
                raise ValueError(f"{path} has {found} bytes, not the {size} that were written: prepare it again")
            if content and hash_file(path, None).hash != (expected := written.checksums[suffix]):
                raise ValueError(f"{path} is damaged, its checksum is not {expected}: prepare it again")

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._written.name}.{suffix}"


class ShardWriter:
    """Writes one shard into an existing folder; no file has its name before `close`."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._tokens = self._documents = self._bytes = 0
        # Of this process alone: one that lost its parent may still write the same shard.
        suffixes, mark = ("tokens", "ends", "text_ends"), f"unfinished-{os.getpid()}"
        self._files: dict[str, Any] = {end: (folder / f"{name}.{end}.{mark}").open("wb") for end in suffixes}
        self._hashes = {suffix: xxhash.xxh3_128() for suffix in suffixes}

    def add(self, documents: Encoded) -> None:
        arrays = {
            "tokens": np.ascontiguousarray(documents.tokens, dtype=self._dtype),
            "ends": (documents.ends + self._tokens).astype("<i8"),
            "text_ends": (documents.text_ends + self._bytes).astype("<i8"),
        }
        for suffix, array in arrays.items():
            self._files[suffix].write(array.data)
            self._hashes[suffix].update(array.data)
        self._tokens += len(documents.tokens)
        self._documents += len(documents.ends)
        self._bytes += int(documents.text_ends[-1])

    def close(self) -> ShardRecord:
        for suffix, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())  # or a machine that stops may keep the name and lose the content
            file.close()
            os.replace(file.name, self._folder / f"{self._name}.{suffix}")
        checksums = {suffix: total.hexdigest() for suffix, total in self._hashes.items()}
        return ShardRecord(self._name, self._tokens, self._documents, self._bytes, checksums)


class TokenStore:
    """The documents of one or more shards as one sequence of tokens, read by place.

    `tokens` counts those of all documents and of what ends them, `bytes` those of the text in UTF-8. `fingerprint` is a
    hash of all tokens and of where documents end, 32 hexadecimal digits.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = [shard for shard in shards if shard.record.tokens]
        records = [shard.record for shard in self._shards]
        # What lies before each shard, and in all of them: (shards + 1,) each.
        self._documents, self._tokens, self._bytes = (
            np.cumsum([0, *(getattr(record, key) for record in records)]) for key in ("documents", "tokens", "bytes")
        )
        self.documents, self.tokens, self.bytes = (
            int(before[-1]) for before in (self._documents, self._tokens, self._bytes)
        )
        total = xxhash.xxh3_128()
        for record in records:
            total.update(f"{record.tokens} {sorted(record.checksums.items())} ".encode())
        self.fingerprint = total.hexdigest()
        self._mapped = 0

    @classmethod
    def joined(cls, stores: Sequence["TokenStore"]) -> "TokenStore":
        return cls([shard for store in stores for shard in store._shards])

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy tokens `start` to below `stop` into `out` (stop - start,)."""
        i = int(np.searchsorted(self._tokens, start, side="right")) - 1
        done = 0
        while start + done < stop:
            first = start + done - int(self._tokens[i])
            found = self._shards[i].tokens(first, first + stop - start - done)
            out[done : done + len(found)] = found
            done += len(found)
            i += 1
        self._count(out.nbytes)

    def bounds(self, first: int, last: int, suffix: Literal["ends", "text_ends"] = "ends") -> np.ndarray:
        """Starts of documents `first` to below `last`, and the last one's end: (last - first + 1,) int64.

        As places of tokens, or as UTF-8 bytes of all text up to there.
        """
        found, before = [np.zeros(int(first == 0), np.int64)], self._tokens if suffix == "ends" else self._bytes
        first = max(first - 1, 0)  # a document starts where the one before ends
        i = int(np.searchsorted(self._documents, first, side="right")) - 1
        while first < last:
            within, end = first - int(self._documents[i]), self._shards[i].record.documents
            numbers = self._shards[i].arrays[suffix][within : min(within + last - first, end)]
            found.append(numbers + before[i])
            first += len(numbers)
            i += 1
        self._count(sum(numbers.nbytes for numbers in found))
        return np.concatenate(found)

    def document_at(self, place: int) -> int:
        """Find the document that has the token at a place (0 to below `tokens`)."""
        i = int(np.searchsorted(self._tokens, place, side="right")) - 1
        self._count(_MAPPED_AT_ONCE)
        within = np.searchsorted(self._shards[i].arrays["ends"], place - self._tokens[i], side="right")
        return int(self._documents[i] + within)

    def first_documents(self, count: int | None) -> "TokenStore":
        """Keep only the first documents; None keeps all. The tokens stay where they are."""
        if count is None or count >= self.documents:
            return self
        shards = zip(self._shards, self._documents.tolist(), strict=False)
        return TokenStore([shard.head(count - first) for shard, first in shards if first < count])

    def map(self) -> None:
        """Map all files now, so that they stay readable even if they are removed."""
        for shard in self._shards:
            shard.arrays  # noqa: B018

    def _count(self, size: int) -> None:
        """Give back pages when this process has looked at many."""
        self._mapped += max(size, _MAPPED_AT_ONCE)
        if self._mapped > _RELEASED_AFTER:
            self._mapped = 0
            for shard in self._shards:
                shard.release()


# Folders of prepared data


@dataclass(frozen=True)
class PreparedManifest:
    """What a folder of prepared data holds: `tokenizer` is its digest, `parts` are shards in order, by part."""

    tokenizer: str
    tokenizer_name: str
    dtype: str
    parts: dict[str, list[ShardRecord]]
    tally: Tally
    add_bos: bool = False

    def totals(self, part: str) -> dict[str, int]:
        records = self.parts[part]
        return {key: sum(getattr(record, key) for record in records) for key in ("tokens", "documents", "bytes")}


def write_manifest(folder: Path, manifest: PreparedManifest) -> None:
    """Declare a folder, in which all shards lie, whole."""
    parts = {
        part: {**manifest.totals(part), "shards": [asdict(record) for record in records]}
        for part, records in manifest.parts.items()
    }
    head = {"format": FORMAT, "tokenizer": manifest.tokenizer, "tokenizer_name": manifest.tokenizer_name}
    rest = {"add_bos": manifest.add_bos, "dtype": manifest.dtype, "parts": parts, "rows": manifest.tally.to_json()}
    write_json(folder / _MANIFEST, head | rest)


def read_manifest(folder: Path) -> PreparedManifest:
    """Read what a folder of prepared data holds; ValueError if it is none, is not whole, or has another format."""
    try:
        found = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"{folder} has the format {found['format']!r}, not {FORMAT!r}: prepare it again")
        parts = {name: [ShardRecord(**shard) for shard in part["shards"]] for name, part in found["parts"].items()}
        names, tally = (found["tokenizer"], found["tokenizer_name"]), Tally.from_json(found["rows"])
        return PreparedManifest(*names, found["dtype"], parts, tally, bool(found.get("add_bos", False)))
    except OSError:
        raise ValueError(
            f"{str(folder)!r} has no {_MANIFEST}: name a folder that launch/prepare.py has written to its end"
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{str(folder / _MANIFEST)!r} is damaged: prepare the data again") from None


def open_part(folder: Path, manifest: PreparedManifest, part: str, *, content: bool = False) -> TokenStore:
    """Open the documents of a part, none if the folder has no such part; reads them only to check their `content`."""
    shards = [Shard(folder, record, manifest.dtype) for record in manifest.parts.get(part, [])]
    for shard in shards:
        shard.check(content=content)
    return TokenStore(shards)


def check_content(folder: Path) -> Iterator[str]:
    """Compare all files of a folder with their checksums, and refuse damaged ones; names each shard that is good."""
    manifest = read_manifest(folder)
    for record in chain.from_iterable(manifest.parts.values()):
        Shard(folder, record, manifest.dtype).check(content=True)
        yield record.name


# The cache of tokenised text


def open_tokens(cache: Path, key: str) -> TokenStore | None:
    """Open the tokens that the cache has under a key; None if there are none, or they are damaged."""
    with suppress(OSError, ValueError):
        store = open_part(cache / key, read_manifest(cache / key), _CACHED_PART, content=True)
        store.map()  # what is mapped stays readable when another process replaces the folder
        return store
    return None


def write_tokens(cache: Path, key: str, documents: Iterable[Encoded], dtype: str) -> TokenStore:
    """Write documents to the cache as they come; of several processes that make the same, the first one's stays."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as unfinished:
            made = Path(unfinished) / "made"
            made.mkdir()
            writer = ShardWriter(made, _CACHED_PART, dtype)
            for encoded in documents:
                writer.add(encoded)
            manifest = PreparedManifest("", "", dtype, {_CACHED_PART: [writer.close()]}, Tally())
            write_manifest(made, manifest)
            store = open_part(made, manifest, _CACHED_PART)
            store.map()
            if open_tokens(cache, key) is None:
                with suppress(OSError):  # there is none to replace
                    os.rename(cache / key, Path(unfinished) / "damaged")
            with suppress(OSError):  # another process was first
                os.rename(made, cache / key)
            return store
    except OSError as error:
        raise ValueError(
            f"the folder for tokenised text {str(cache)!r} cannot be written ({error}): name another one with "
            "data.cache_dir, or make room"
        ) from None


def tokenise(
    documents: Documents,
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    part: str,
    log: Callable[[str], None] = lambda _: None,
) -> TokenStore:
    """Tokenise documents, or find their tokens in the cache; reads them once to see whether they are known.

    Of processes that want the same `part` at the same time, one tokenises it, and the others wait for it, and are
    refused what it is refused; `log` is given one line if this one waits.
    """
    # Processes agree on a name without reading text.
    files = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in config.files]
    described = json.dumps([part, asdict(config), tokenizer_digest(tokenizer), files])
    name = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    cache, add_bos = cache_folder(config.cache_dir), config.add_bos
    lock, note, seen = FileLock(cache / f"{name}.lock"), cache / f"{name}.json", set[str]()
    while True:
        outcome: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            outcome = dict(json.loads(note.read_text(encoding="utf-8")))
        if outcome.get("by") in seen:  # left by a process that this one has waited for
            if "error" in outcome:
                raise ValueError(outcome["error"])
            if (store := open_tokens(cache, outcome["key"])) is not None:
                documents.tally.clear()
                documents.tally.merge(Tally.from_json(outcome["rows"]))
                return store
        try:
            cache.mkdir(parents=True, exist_ok=True)
            if lock.attempt():
                break
        except LockedError:
            if not seen:
                log(f"waits for the text to be tokenised by another process ({lock.owner})")
            seen.add(lock.owner)
        except OSError:  # a folder that is only read may have the tokens
            return _tokenise(documents, tokenizer, cache, add_bos)[0]
        time.sleep(_POLL_S)
    by = {"by": lock.owner}
    try:
        store, key = _tokenise(documents, tokenizer, cache, add_bos)
        write_json(note, by | {"key": key, "rows": documents.tally.to_json()})
        return store
    except ValueError as error:
        write_json(note, by | {"error": str(error)})
        raise
    finally:
        lock.release()


def _tokenise(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", cache: Path, add_bos: bool
) -> tuple[TokenStore, str]:
    """The tokens, and the key that they have in the cache."""
    digest = documents.digest()
    described = f"{FORMAT} {digest} {tokenizer_digest(tokenizer, add_bos)}"
    key = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def unchanged() -> Iterator[str]:
        """The same texts once more; others than those that were hashed must not be stored under their name."""
        total = hashlib.blake2b(digest_size=16)
        yield from hashed(documents, total)
        if total.hexdigest() != digest:
            raise ValueError("the text changed while it was read: start again when nobody writes to its files")

    store = open_tokens(cache, key)
    if store is None:
        store = write_tokens(cache, key, encode(unchanged(), tokenizer, add_bos), token_type(tokenizer))
    return store, key
