"""Tokens on disk: shards, the corpus they make, folders of prepared data, and the cache of tokenised text.

A shard is a file of tokens and two that index its documents. `NAME.tokens` is the bare array of all documents' tokens,
each document with the token that ends it. For each document, `NAME.ends` has the place after its last token, and
`NAME.text_ends` the UTF-8 bytes of all text up to its end (int64). All are little-endian, are written under another
name, and are renamed when they are whole. They are mapped, and never read as a whole.

A folder of prepared data holds shards and `manifest.json`, which is written last: a folder that has one is whole. The
manifest has the hash of the tokenizer, the type of the tokens, the shards of every part ("train", "validation"), and
what was left out. The cache holds such folders, one for each corpus and tokenizer, with one part, "all". A folder is
made under another name and renamed, so several processes may make the same one at once: the first one's stays.
"""

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mega_scale.data.rows import Tally
from mega_scale.data.sources import Documents, TextsHash
from mega_scale.data.tokenizer import Encoded, encode, token_type, tokenizer_digest
from mega_scale.files import FileLock, LockedError, hash_file, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "mega_scale tokens 2"
_MANIFEST = "manifest.json"
_CACHED_PART = "all"
_INDEX_TYPES = {"ends": "<i8", "text_ends": "<i8"}
# Looking at one token maps 64 KiB into the process, which counts as its memory until it is given back.
_MAPPED_AT_ONCE = 1 << 16  # bytes
_RELEASED_AFTER = 1 << 24  # bytes
_POLL_S = 0.2


# Shards


@dataclass(frozen=True)
class ShardRecord:
    """What a shard must hold.

    Args:
        name: File name without suffix.
        tokens: Number of tokens.
        documents: Number of documents.
        bytes: UTF-8 bytes of the documents' text.
        checksums: xxh3 (128 bits, hexadecimal) by suffix of the file.
    """

    name: str
    tokens: int
    documents: int
    bytes: int
    checksums: dict[str, str]


class MappedFile:
    """A file as an array of `dtype` that lies in the page cache, shared by all processes of a machine."""

    def __init__(self, path: Path, dtype: str) -> None:
        with path.open("rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0  # which cannot be mapped
            self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.array = np.empty(0, dtype) if self._map is None else np.frombuffer(self._map, dtype)
        # Rows lie anywhere: reading on after one, as systems do, would fetch thirty times what is asked for.
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
        self._types = {"tokens": dtype, **_INDEX_TYPES}
        self.record = written
        if documents is not None and documents < written.documents:
            tokens, size = (int(self.mapped[suffix].array[documents - 1]) for suffix in _INDEX_TYPES)
            checksums = {suffix: f"{found}[:{documents}]" for suffix, found in written.checksums.items()}
            self.record = ShardRecord(written.name, tokens, documents, size, checksums)

    @cached_property
    def mapped(self) -> dict[str, MappedFile]:
        """Its files by suffix; mapped at the first use, and readable from then on even if they are removed."""
        return {suffix: MappedFile(self._path(suffix), dtype) for suffix, dtype in self._types.items()}

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

    def check(self, *, content: bool) -> None:
        """Compare the sizes of the files with what was written, and with `content` also their checksums.

        Raises:
            ValueError: A file is missing, cut, too long or damaged.
        """
        for suffix, dtype in self._types.items():
            path, count = self._path(suffix), self._written.tokens if suffix == "tokens" else self._written.documents
            size = count * np.dtype(dtype).itemsize
            try:
                found = path.stat().st_size
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}; prepare it again") from None
            if found != size:
                raise ValueError(f"{path} has {found} bytes, not the {size} that were written: prepare it again")
        for suffix, expected in self._written.checksums.items() if content else ():
            if hash_file(self._path(suffix), None).hash != expected:
                raise ValueError(f"{self._path(suffix)} is damaged, its checksum is not {expected}: prepare it again")

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._written.name}.{suffix}"


class ShardWriter:
    """Writes one shard into an existing folder; no file has its name before `close`."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._tokens = self._documents = self._bytes = 0
        suffixes = ("tokens", *_INDEX_TYPES)
        self._files: dict[str, Any] = {suffix: self._unfinished(suffix).open("wb") for suffix in suffixes}
        self._hashes = {suffix: xxhash.xxh3_128() for suffix in suffixes}

    def add(self, documents: Encoded) -> None:
        """Append documents."""
        self._write("tokens", np.ascontiguousarray(documents.tokens, dtype=self._dtype))
        self._write("ends", (documents.ends + self._tokens).astype("<i8"))
        self._write("text_ends", (documents.text_ends + self._bytes).astype("<i8"))
        self._tokens += len(documents.tokens)
        self._documents += len(documents.ends)
        self._bytes += int(documents.text_ends[-1])

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


# The corpus that shards make


class TokenStore:
    """The documents of one or more shards as one sequence of tokens, read by place.

    Attributes:
        tokens: Tokens of all documents and of what ends them.
        documents: Number of documents.
        bytes: UTF-8 bytes of the documents' text.
        fingerprint: Hash of all tokens and of where documents end, 32 hexadecimal digits.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = [shard for shard in shards if shard.record.tokens]
        records = [shard.record for shard in self._shards]
        self._starts = np.cumsum([0, *(record.tokens for record in records)])  # (shards + 1,)
        self._first_documents = np.cumsum([0, *(record.documents for record in records)])
        self._first_bytes = np.cumsum([0, *(record.bytes for record in records)])
        self.tokens, self.documents = int(self._starts[-1]), int(self._first_documents[-1])
        self.bytes = sum(record.bytes for record in records)
        total = xxhash.xxh3_128()
        for record in records:
            total.update(f"{record.tokens} {sorted(record.checksums.items())} ".encode())
        self.fingerprint = total.hexdigest()
        self._mapped = 0

    @classmethod
    def joined(cls, stores: Sequence["TokenStore"]) -> "TokenStore":
        """Put several one after another."""
        return cls([shard for store in stores for shard in store._shards])

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy tokens `start` to below `stop` into `out` (stop - start,), the only time that they are copied."""
        i = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while start + done < stop:
            first = start + done - int(self._starts[i])
            found = self._shards[i].tokens(first, first + stop - start - done)
            out[done : done + len(found)] = found
            done += len(found)
            i += 1
        self._count(out.nbytes)

    def ends(self, first: int, last: int) -> np.ndarray:
        """The place after the last token of documents `first` to below `last`: (last - first,) int64."""
        return self._of_documents(first, last, lambda shard: shard.ends, self._starts)

    def text_ends(self, first: int, last: int) -> np.ndarray:
        """UTF-8 bytes of all text up to the end of documents `first` to below `last`: (last - first,) int64."""
        return self._of_documents(first, last, lambda shard: shard.text_ends, self._first_bytes)

    def bounds(self, first: int, last: int) -> np.ndarray:
        """Starts of documents `first` to below `last`, and the last one's end: (last - first + 1,) int64."""
        ends = self.ends(max(first - 1, 0), last)
        return np.append(0, ends) if first == 0 else ends

    def document_at(self, place: int) -> int:
        """Find the document that has the token at a place (0 to below `tokens`)."""
        i = int(np.searchsorted(self._starts, place, side="right")) - 1
        self._count(_MAPPED_AT_ONCE)
        within = np.searchsorted(self._shards[i].ends, place - self._starts[i], side="right")
        return int(self._first_documents[i] + within)

    def first_documents(self, count: int | None) -> "TokenStore":
        """Keep only the first documents; None keeps all. The tokens stay where they are."""
        if count is None or count >= self.documents:
            return self
        shards = zip(self._shards, self._first_documents.tolist(), strict=False)
        return TokenStore([shard.head(count - first) for shard, first in shards if first < count])

    def map(self) -> None:
        """Map all files now, so that they stay readable even if they are removed."""
        for shard in self._shards:
            shard.mapped  # noqa: B018

    def _of_documents(self, first: int, last: int, of: Callable[[Shard], np.ndarray], before: np.ndarray) -> np.ndarray:
        """Numbers that shards hold of their documents, counted from the start of the corpus."""
        found = [np.empty(0, np.int64)]
        i = int(np.searchsorted(self._first_documents, first, side="right")) - 1
        while first < last:
            within = first - int(self._first_documents[i])
            numbers = of(self._shards[i])[within : within + last - first]
            found.append(numbers + before[i])
            first += len(numbers)
            i += 1
        self._count(sum(numbers.nbytes for numbers in found))
        return np.concatenate(found)

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
    """What a folder of prepared data holds.

    Args:
        tokenizer: Hash of the tokenizer, see `tokenizer_digest`.
        tokenizer_name: `data.tokenizer` of the preparation.
        dtype: Type of the tokens, as numpy writes it.
        parts: Shards by part, in order.
        tally: Rows that were read, and the bad ones.
        add_bos: `data.add_bos` of the preparation.
    """

    tokenizer: str
    tokenizer_name: str
    dtype: str
    parts: dict[str, list[ShardRecord]]
    tally: Tally
    add_bos: bool = False

    def totals(self, part: str) -> dict[str, int]:
        """Tokens, documents and bytes of a part."""
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
    """Read what a folder of prepared data holds.

    Raises:
        ValueError: It is no such folder, was not prepared to the end, or has another format.
    """
    try:
        found = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"{folder} has the format {found['format']!r}, not {FORMAT!r}: prepare it again")
        parts = {
            part: [ShardRecord(**record) for record in content["shards"]] for part, content in found["parts"].items()
        }
        tally, names = Tally.from_json(found["rows"]), (found["tokenizer"], found["tokenizer_name"])
        return PreparedManifest(*names, found["dtype"], parts, tally, bool(found.get("add_bos", False)))
    except OSError:
        raise ValueError(
            f"{str(folder)!r} has no {_MANIFEST}: name a folder that launch/prepare.py has written to its end"
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{str(folder / _MANIFEST)!r} is damaged: prepare the data again") from None


def open_part(folder: Path, manifest: PreparedManifest, part: str) -> TokenStore:
    """Open the documents of a part, none if the folder has no such part; reads none of them.

    Raises:
        ValueError: A file is missing or has another size than was written.
    """
    shards = [Shard(folder, record, manifest.dtype) for record in manifest.parts.get(part, [])]
    for shard in shards:
        shard.check(content=False)
    return TokenStore(shards)


def check_content(folder: Path) -> Iterator[str]:
    """Compare all files of a folder with their checksums; names each shard that is good.

    Raises:
        ValueError: A file is missing or damaged, or the folder is none of prepared data.
    """
    manifest = read_manifest(folder)
    for records in manifest.parts.values():
        for record in records:
            Shard(folder, record, manifest.dtype).check(content=True)
            yield record.name


# The cache of tokenised text


def open_tokens(cache: Path, key: str) -> TokenStore | None:
    """Open the tokens that the cache has under a key; None if there are none, or they are damaged."""
    try:
        for _ in check_content(cache / key):
            pass
        store = open_part(cache / key, read_manifest(cache / key), _CACHED_PART)
        store.map()  # what is mapped stays readable when another process replaces the folder
    except (OSError, ValueError):
        return None
    return store


def write_tokens(cache: Path, key: str, documents: Iterable[Encoded], dtype: str) -> TokenStore:
    """Write documents to the cache, which is created, as they come, so that they need not fit in memory.

    Raises:
        ValueError: The folder cannot be written.
    """
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
    cache: Path,
    add_bos: bool = False,
    name: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> TokenStore:
    """Tokenise documents, or find their tokens in the cache; reads them once to see whether they are known.

    Args:
        documents: Texts.
        tokenizer: Ends every document with its eos or sep token.
        cache: Folder for tokens; several processes may use it at once.
        add_bos: `data.add_bos`.
        name: Of processes that want documents of one name at the same time, one tokenises them, and the others wait
            for it; None: this one does.
        log: Is given one line if this process waits.

    Raises:
        ValueError: The text cannot be read, by whichever process does it, or the folder cannot be written.
    """
    if name is None:
        return _tokenise(documents, tokenizer, cache, add_bos)[0]
    lock, note, seen = FileLock(cache / f"{name}.lock"), cache / f"{name}.json", set[str]()
    while True:
        outcome = _read_note(note)
        if outcome.get("by") in seen and (store := _tokens_of(outcome, documents, cache)) is not None:
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
    outcome = {"by": lock.owner}
    try:
        store, outcome["key"] = _tokenise(documents, tokenizer, cache, add_bos)
        outcome["rows"] = documents.tally.to_json()
        return store
    except ValueError as error:
        outcome["error"] = str(error)
        raise
    finally:
        try:
            if len(outcome) > 1:
                write_json(note, outcome)
        finally:
            lock.release()


def _read_note(note: Path) -> dict[str, Any]:
    """What the last process left for those that wait for it."""
    try:
        return dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _tokens_of(outcome: dict[str, Any], documents: Documents, cache: Path) -> TokenStore | None:
    if "error" in outcome:
        raise ValueError(outcome["error"])
    store = open_tokens(cache, outcome["key"])
    documents.tally.clear()
    documents.tally.merge(Tally.from_json(outcome["rows"]))
    return store


def _tokenise(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", cache: Path, add_bos: bool
) -> tuple[TokenStore, str]:
    """The tokens, and the key that they have in the cache."""
    digest = documents.digest()
    described = f"{FORMAT} {digest} {tokenizer_digest(tokenizer, add_bos)}"
    key = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    store = open_tokens(cache, key)
    if store is None:
        texts = encode(_unchanged(documents, digest), tokenizer, add_bos)
        store = write_tokens(cache, key, texts, token_type(tokenizer))
    return store, key


def _unchanged(documents: Documents, digest: str) -> Iterator[str]:
    """The same texts once more; others than those that were hashed must not be stored under their name."""
    total = TextsHash()
    for text in documents:
        total.add(text)
        yield text
    if total.digest() != digest:
        raise ValueError("the text changed while it was read: start again when nobody writes to its files")
