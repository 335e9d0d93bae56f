"""Where texts come from, which of them are held out, and how many rows that cannot be used are too many."""

import hashlib
import importlib
import importlib.machinery
import inspect
import os
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from mega_scale.data.config import Damage, DataConfig, FileRange
from mega_scale.settings import load_object

if TYPE_CHECKING:
    from mega_scale.data.readers import BadRow, FileSource, HubSource, Rows

_MIN_JUDGED = 1000  # rows: the share of fewer says little before all have been read
_ROUNDS = 8  # of the permutation


# Rows that cannot be used


@dataclass
class Tally:
    """Rows read so far, bad ones too; the bad ones by file and cause; the last one in words.

    `lost` are the bytes on disk by file that could not be read, `bytes` those of all files, 0 if unknown.
    """

    rows: int = 0
    bad: dict[str, Counter[str]] = field(default_factory=dict)
    last: str = ""
    lost: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    def add(self, row: "BadRow") -> None:
        self.rows, self.last = self.rows + row.rows, str(row)
        self.bad.setdefault(row.file, Counter())[row.cause] += row.rows
        if row.lost:
            self.lost[row.file] += row.lost

    def clear(self, size: int = 0) -> None:
        """Count anew, in files of `size` bytes."""
        vars(self).update(vars(Tally(bytes=size)))

    def merge(self, other: "Tally") -> None:
        self.rows += other.rows
        self.last = other.last or self.last
        for file, causes in other.bad.items():
            self.bad.setdefault(file, Counter()).update(causes)
        self.lost.update(other.lost)
        self.bytes += other.bytes

    def by_cause(self) -> dict[str, int]:
        found = Counter[str]()
        for causes in self.bad.values():
            found.update(causes)
        return dict(sorted(found.items()))

    def figures(self) -> dict[str, int]:
        """What a run logs: `bad_rows/CAUSE`, and `lost_bytes` if something could not be read."""
        found = {f"bad_rows/{cause}": count for cause, count in self.by_cause().items()}
        return found | ({"lost_bytes": self.lost.total()} if self.lost else {})

    def lines(self, most: int = 20) -> list[str]:
        """Say what was left out, one line a file, for the `most` files with the most bad rows."""
        worst = sorted(self.bad, key=lambda file: (-self.bad[file].total(), file))
        found = []
        for file in worst[:most]:
            line = ", ".join(f"{count} {cause}" for cause, count in sorted(self.bad[file].items()))
            if file in self.lost and not self.bad[file].keys().isdisjoint(get_args(Damage)):
                line += f", {self.lost[file]:,} bytes lost"
            found.append(f"left out of {file}: {line}")
        if len(worst) > most:
            found.append(f"and rows of {len(worst) - most} more files")
        return found

    def check(self, share: float, *, ended: bool) -> None:
        """Refuse text of which more than a share of the rows, or of the bytes, cannot be used.

        Before all have been read, rows count as at least a thousand, and bytes only where a part of a file was lost:
        nobody can count the rows in it. The ValueError names the last bad row's file and line.
        """
        found = self.by_cause()
        bad, lost = sum(found.values()), min(self.lost.total(), self.bytes)
        # Quotients, rounded as the share itself was: 0.29 * 100 is less than 29.
        if bad / max(self.rows, 1 if ended else _MIN_JUDGED) > share:
            what = f"{bad} of {self.rows} rows"
        elif lost / max(self.bytes, 1) > share and (ended or not found.keys().isdisjoint(get_args(Damage))):
            what = f"{lost:,} of {self.bytes:,} bytes"
        else:
            return
        causes = ", ".join(f"{count} {cause}" for cause, count in found.items())
        raise ValueError(
            f"{what} cannot be used ({causes}), more than data.max_bad_share={share}; the last one is {self.last}; "
            "repair them, or raise data.max_bad_share"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the same rows give the same."""
        bad = {file: dict(sorted(self.bad[file].items())) for file in sorted(self.bad)}
        found: dict[str, Any] = {"rows": self.rows, "bad": bad, "last": self.last}
        return found | ({"lost": dict(sorted(self.lost.items())), "bytes": self.bytes} if self.lost else {})

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Tally":
        """Read what `to_json` gave; older tallies do not count bytes."""
        bad = {file: Counter(causes) for file, causes in found["bad"].items()}
        return cls(found["rows"], bad, found["last"], Counter(found.get("lost", {})), found.get("bytes", 0))


def usable(rows: "Iterable[str | BadRow]", tally: Tally, share: float = 1.0) -> Iterator[str]:
    """Yield the texts, and count them and the bad rows in `tally`, of which more than `share` are a ValueError."""
    for row in rows:
        if isinstance(row, str):
            tally.rows += 1
            yield row
        else:
            tally.add(row)
            tally.check(share, ended=False)
    tally.check(share, ended=True)


# Documents


def hashed(texts: Iterable[str], total: "hashlib.blake2b") -> Iterator[str]:
    """Pass texts on, and hash them and their order."""
    for text in texts:
        total.update(hashlib.blake2b(text.encode(), digest_size=16).digest())
        yield text


class Documents:
    """Texts that can be read again and again, always the same ones in the same order.

    `read` is given the seed and epoch of an order of file ranges, or None for the corpus's own. `tally` is what the
    last reading found.
    """

    def __init__(self, read: Callable[[tuple[int, int] | None], Iterator[str]], tally: Tally | None = None) -> None:
        self._read = read
        self.tally = tally or Tally()

    def __iter__(self) -> Iterator[str]:
        return self._read(None)

    def shuffled(self, seed: int, epoch: int, buffer: int) -> Iterator[str]:
        """Permute file ranges by seed and epoch, alike on every machine, and draw texts from a buffer of so many."""
        draw, held = random.Random(f"{seed} {epoch}"), list[str]()
        for text in self._read((seed, epoch)):
            if len(held) < buffer:
                held.append(text)
                continue
            i = int(draw.random() * buffer)
            yield held[i]
            held[i] = text
        draw.shuffle(held)
        yield from held

    def select(self, wanted: Callable[[str], bool]) -> "Documents":
        return Documents(lambda order: (text for text in self._read(order) if wanted(text)), self.tally)

    def first(self, count: int | None) -> "Documents":
        """Keep the first texts of the corpus's own order; None keeps all."""
        return self if count is None else Documents(lambda order: islice(self._read(None), count), self.tally)

    def digest(self) -> str:
        """Hash all texts and their order (32 hexadecimal digits); reads them once."""
        total = hashlib.blake2b(digest_size=16)
        for _ in hashed(self, total):
            pass
        return total.hexdigest()


class Corpus(NamedTuple):
    """A run's documents: what it trains on, and what it validates on, None if nothing is held out."""

    train: Documents
    validation: Documents | None


def load_corpus(config: DataConfig) -> Corpus:
    """Find a run's documents; rows that cannot be used are left out and counted."""
    everything, share = load_documents(config), config.validation_fraction
    if config.separate_validation:
        return Corpus(everything, load_documents(config, held_out=True))
    if not share:
        return Corpus(everything, None)
    held_out = everything.select(lambda text: is_held_out(text, share))
    train = everything.select(lambda text: not is_held_out(text, share))
    return Corpus(train, held_out.first(config.validation_documents))


def load_documents(config: DataConfig, *, held_out: bool = False) -> Documents:
    """Find all documents to train on, at most `max_documents`, or those of a validation text of its own."""
    source, tally = open_source(config, held_out=held_out), Tally()
    ranges = source.ranges(None)
    size = sum(part.size for part in ranges)

    def read(order: tuple[int, int] | None) -> Iterator[str]:
        tally.clear(size)
        numbers = np.arange(len(ranges))
        if order is not None:
            numbers = shuffled(numbers, len(ranges), *order)
        rows = (row for i in numbers for row in source.read(ranges[i]))
        return usable(rows, tally, config.max_bad_share)

    return Documents(read, tally).first(config.validation_documents if held_out else config.max_documents)


def is_held_out(text: str, share: float) -> bool:
    """Whether a text belongs to the validation part, by its own hash only: the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def shuffled(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Look up places (n,) of a pseudo-random permutation of 0..length-1, by the arguments alone: (n,) int64.

    A Feistel network permutes the next power of four; what falls outside the range is permuted again till it is inside.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    found = np.asarray(positions).astype(np.uint64)
    outside = np.arange(len(found))
    while outside.size:
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            # The finaliser of splitmix64: every bit of the input changes about half the bits of the result.
            mixed = right ^ key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
            left, right = right, left ^ (mixed & mask)
        found[outside] = (left << half) | right
        outside = outside[found[outside] >= length]
    return found.astype(np.int64)


# Sources: each splits all its text into ranges of about `size` bytes (None splits no file), and reads a range in order


def open_source(config: DataConfig, *, held_out: bool = False) -> "FileSource | HubSource | OwnSource | StdlibSource":
    """Open what to train on, or with `held_out` a validation text of its own; reads no text."""
    if config.source == "python-stdlib":
        return StdlibSource()
    if config.source == "own":
        return OwnSource(str(config.reader))
    from mega_scale.data.readers import open_files  # noqa: PLC0415  needs pyarrow

    return open_files(config, held_out)


class OwnSource:
    """What a user's function gives, in one range."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._texts = load_object(name, "data.reader", "name a function as MODULE:NAME or FILE.py:NAME")

    def ranges(self, size: int | None) -> list[FileRange]:
        return [FileRange(self._name, 0, -1, 0)]

    def read(self, part: FileRange) -> "Rows":
        for number, text in enumerate(self._texts()):
            if not isinstance(text, str):
                raise ValueError(f"data.reader={self._name!r} gives a {type(text).__name__} as text {number}: give str")
            yield text


# The default corpus: the sources of Python's library, and the documentation of its compiled modules

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# CPython's own test modules say nothing about Python, and importing readline may write to the terminal.
_SKIPPED_MODULES = re.compile(r"_?xx|_test|_ctypes_test|readline$")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")


class StdlibSource:
    """The text of the Python that runs this, in one range."""

    def ranges(self, size: int | None) -> list[FileRange]:
        return [FileRange("python-stdlib", 0, -1, 0)]

    def read(self, part: FileRange) -> "Rows":
        return iter(stdlib_documents())


@cache
def stdlib_documents() -> list[str]:
    """Read Python's own library: every module's source, then the documentation of the modules without one.

    Order and text depend on the Python installation only, so every process of a run sees the same.
    """
    root, files, texts = Path(sysconfig.get_paths()["stdlib"]), list[Path](), list[str]()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        # _sysconfigdata holds the build machine's settings, which are no text.
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        with suppress(UnicodeDecodeError):
            texts.append(file.read_bytes().decode("utf-8"))
    compiled, shared = set(sys.builtin_module_names), sysconfig.get_config_var("DESTSHARED")
    if shared and os.path.isdir(shared):
        suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
        compiled |= {file.split(".")[0] for file in os.listdir(shared) if file.endswith(suffixes)}
    for name in sorted(name for name in compiled if not _SKIPPED_MODULES.match(name)):
        try:
            module = importlib.import_module(name)
        except ImportError:  # built against a library that this machine lacks
            continue
        entries = [_entry(module.__name__, module)]
        for key, member in sorted(vars(module).items()):
            if getattr(member, "__module__", None) == module.__name__:
                place = f"{module.__name__}.{key}"
                entries += [_entry(place, member)] if inspect.isclass(member) or inspect.isroutine(member) else []
                within = sorted(vars(member).items()) if inspect.isclass(member) else []
                entries += [_entry(f"{place}.{inner}", value) for inner, value in within]
        texts.append("\n\n".join(filter(None, entries)))
    return [text for text in texts if text]


def _entry(name: str, member: object) -> str:
    """A heading with its own documentation; empty if there is none, or if it shows an address."""
    kinds = (inspect.ismodule, inspect.isclass, inspect.isroutine, inspect.isgetsetdescriptor)
    if not any(is_kind(member) for is_kind in (*kinds, inspect.ismemberdescriptor)):
        return ""
    text = vars(member).get("__doc__") if inspect.isclass(member) else getattr(member, "__doc__", None)
    if not isinstance(text, str) or not text.strip() or _ADDRESS.search(text):
        return ""
    signature = getattr(member, "__text_signature__", None) if inspect.isroutine(member) else None
    if signature is not None:
        name += signature.replace("$", "")
    return f"{name}\n{inspect.cleandoc(text)}\n"
