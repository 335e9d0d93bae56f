"""The keys under `data:`, mixtures of sources, and the checks that need nothing but the file system."""

import glob
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from mega_scale.files import is_url, local_path
from mega_scale.settings import allowed, known_keys, load_object

Source = Literal["python-stdlib", "text", "json", "parquet", "arrow", "hub", "prepared", "own"]
FILE_SOURCES = ("text", "json", "parquet", "arrow")
Packing = Literal["none", "concat", "reset"]
PackingOrder = Literal["in_order", "best_fit"]
Damage = Literal["truncated_file", "corrupt", "unreadable"]  # of a file

# A hub name is "name" or "owner/name"; anything else that is given as a name must be a folder.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_HUB_TIMEOUT_S = 5.0
# Keys that say where text comes from, which a source of a mixture may have; the other keys hold for all sources.
SOURCE_KEYS = (
    "source", "path", "reader", "hub_name", "hub_config", "hub_split", "text_column", "validation_path",
    "validation_split", "validation_fraction", "max_documents", "streaming",
)  # fmt: skip
# Those that a set of data.validation may have, which is read whole.
_SET_KEYS = ("source", "path", "reader", "hub_name", "hub_config", "hub_split", "text_column", "max_documents")
HELD_OUT = "held_out"
"""Name of the set that is held out of a text which is no mixture, where there are other sets."""
_SHARED_DEFAULTS = ("text_column", "validation_fraction", "streaming")  # which may stand beside a mixture, too

_READER = "name a function as MODULE:NAME or FILE.py:NAME"
_Rule = tuple[object, str, str]  # whether it is broken, the key, and the remedy


@dataclass
class DataConfig:
    """Where the text comes from, how it becomes tokens, and in which order they are read."""

    source: Source = "python-stdlib"
    """Kind of corpus: python-stdlib (the text of Python's own library), text (UTF-8, one document a file), json (one
    object a line, or a list), parquet, arrow, hub (a data set by name), prepared (a folder that launch/prepare.py
    wrote), or own (what a function of yours gives, see reader). Text and json may be compressed (gz, zst, bz2, xz,
    lz4, by content)."""

    path: list[str] | None = None
    """Files or globs to read in this order (paths), for sources that are files; the folder of source prepared."""

    reader: str | None = None
    """Function that gives the texts of source own, as MODULE:NAME or FILE.py:NAME; called without arguments, it returns
    texts, the same ones in the same order each time."""

    mixture: dict[str, Any] | None = None
    """Several sources by name, each with its own keys (source, path, hub_name and the like) and either weight, its
    share of the rows, or epochs, how often it is read relative to the others (1 by default)."""

    hub_name: str | None = None
    """Name of a Hugging Face data set, such as "owner/name", or the folder of one, for source hub."""

    hub_config: str | None = None
    """Name of the data set's configuration, for source hub, where it has several."""

    hub_split: str = "train"
    """Name of the data set's split to train on, for source hub."""

    text_column: str = "text"
    """Name of the column that holds the text, for source json, parquet, arrow and hub; a.b is column b of column a."""

    max_document_bytes: int = 1 << 26
    """Longest document (UTF-8 bytes); a longer one is a bad row."""

    max_bad_share: float = 0.01
    """Largest share of rows that cannot be used (0 to 1), and of the files' bytes that cannot be read, where a file
    that was cut counts as a whole. They are skipped and counted by cause; more of either end the run."""

    validation_path: list[str] | None = None
    """Files or globs to validate on (paths), for sources that are files; null holds out a share of the text."""

    validation_split: str | None = None
    """Name of the data set's split to validate on, for source hub; null holds out a share of the text."""

    validation_fraction: float = 0.05
    """Share of the documents held out for validation (0 to below 1), chosen by a hash of their text; unused with
    validation_path or validation_split; 0 holds out nothing, or leaves the validation part of prepared data unread."""

    validation_documents: int | None = None
    """Size of the validation part at most (documents); null takes all; a stream must be told where to stop."""

    validation: dict[str, Any] | None = None
    """Further texts to validate on by name, such as {code: {source: text, path: [code/*.py]}}, each read whole, with
    figures of its own, as the held out text of each source of a mixture has. A set has the keys of such a source."""

    max_documents: int | None = None
    """Read only the first of the corpus (documents), before anything is held out; null reads all."""

    tokenizer: str = "byte"
    """The built-in "byte" (one token a UTF-8 byte), or a Hugging Face tokenizer's folder or hub name."""

    add_bos: bool = False
    """Whether documents begin with what the tokenizer puts before a text (<s>, [CLS]), or else with its bos; false:
    they follow one another, each ended by eos, else sep. Exports hold the tokenizer as it was trained with."""

    sequence_length: int = 512
    """Length of a training sequence (tokens)."""

    length_schedule: list[list[int]] | None = None
    """Shorter sequences by step, as pairs [first step, tokens] such as [[0, 512], [1000, 1024]]; each length divides
    `sequence_length`, whose sequences are cut to it. A batch keeps its number of tokens; validation is not cut."""

    packing: Packing = "concat"
    """How documents become sequences: concat (end to end, cut anywhere), reset (the same, but the moving average begins
    anew, attention and loss stay inside a document), or none (each alone, in sequences that are not full)."""

    packing_order: PackingOrder = "in_order"
    """Which documents share a sequence: in_order (as they come, cut where a sequence ends), or, with packing reset,
    best_fit (whole ones that fill it best; only a document longer than a sequence is cut)."""

    document_alignment: int = 1
    """Documents start at multiples of this (tokens), with packing_order best_fit. The chunk size makes every document
    compute exactly what it computes alone, and attention cheaper, but leaves places empty; 1 leaves the fewest."""

    streaming: bool = False
    """Read the training text while training instead of tokenising it first; every process reads all of it."""

    shuffle: bool = True
    """Draw the sequences of every epoch in a new order given by `seed`; false: in the order of the corpus. A stream's
    files are read in a new order, and its documents drawn from a buffer."""

    shuffle_buffer: int = 10_000
    """Documents of a stream that are held in memory to draw from (documents)."""

    seed: int = 0
    """Seed of the order of the sequences (no unit)."""

    workers: int = 0
    """Processes of each rank that read ahead; 0 reads when a step asks for it (processes)."""

    prefetch: int = 2
    """Steps that each of the `workers` reads ahead (steps)."""

    cache_dir: str | None = None
    """Folder for tokenised text (path); null takes ~/.cache/mega_scale."""

    def __post_init__(self) -> None:
        for key in ("path", "validation_path", "hub_name", "tokenizer", "cache_dir"):
            value = getattr(self, key)
            if isinstance(value, list):
                stored = key == "path" and self.source == "prepared"
                paths = [part if stored and is_url(part) else local_path(part, f"data.{key}") for part in value]
                setattr(self, key, paths)
            elif isinstance(value, str):
                setattr(self, key, local_path(value, f"data.{key}"))

    @property
    def lengths(self) -> "LengthSchedule | None":
        """The length schedule; None if all sequences have `sequence_length`."""
        return None if self.length_schedule is None else LengthSchedule(self.length_schedule, self.sequence_length)

    @property
    def prepared(self) -> Path:
        """Where this host has the prepared data, or its copy."""
        [path] = self.path or [""]
        if not is_url(path):
            return Path(path)
        from mega_scale.object_store import folder_of

        return folder_of(path, cache_folder(self.cache_dir), "copies")

    def bring(self) -> None:
        """Copy prepared data that lies in an object store to this host. Raises ValueError or OSError."""
        sources = [source for source, *_ in mixture_entries(self).values()] if self.mixture else [self]
        for source in [*sources, *validation_sets(self).values()]:
            for path in filter(is_url, source.path or []):
                from mega_scale.object_store import copy_folder

                copy_folder(path, cache_folder(self.cache_dir), "data.path")

    @property
    def files(self) -> list[str]:
        paths = [*(self.path or []), *(self.validation_path or [])] if self.source in FILE_SOURCES else []
        return expand_paths(paths, "path")

    @property
    def separate_validation(self) -> bool:
        return bool(self.validation_path or self.validation_split)

    @property
    def validates(self) -> bool:
        """Whether there is any text to validate on."""
        sources = mixture_entries(self).values()
        held_out = any(source.separate_validation or source.validation_fraction for source, *_ in sources)
        return held_out or bool(self.validation)

    def validate(self, *, here: bool = True) -> None:
        """Check every key without reading any text. Raises ValueError for the first that cannot work.

        Text that is not `here` is not looked for.
        """
        for name, (source, *_) in mixture_entries(self).items():
            try:
                for broken, key, remedy in chain(source._text_rules() if here else (), source._order_rules()):
                    if broken:
                        raise _refusal(key, getattr(source, key), remedy)
            except ValueError as error:
                raise of_source(name, error) from None
        validation_sets(self)

    def _text_rules(self) -> Iterator[_Rule]:
        source, name = self.source, self.hub_name or ""
        for key, choices in (("source", Source), ("packing", Packing), ("packing_order", PackingOrder)):
            names = get_args(choices)
            yield getattr(self, key) not in names, key, f"choose one of {', '.join(names)}"
        if source == "prepared":
            folders = self.path or []
            yield len(folders) != 1, "path", "source prepared needs one folder; several can be a data.mixture"
            remedy = "it has no manifest.json; name a folder that launch/prepare.py has written to its end"
            yield not (self.prepared / "manifest.json").is_file(), "path", remedy
        for key, is_needed in (("path", True), ("validation_path", False)):
            paths = getattr(self, key)
            if source in FILE_SOURCES and (is_needed or paths is not None):
                yield not paths, key, f"source {source} needs files or globs" + ("" if is_needed else ", or null")
                expand_paths(paths, key)
            elif not (source == "prepared" and is_needed):
                remedy = f"set data.source to what they are ({', '.join(FILE_SOURCES)}), or {key} to null"
                yield paths is not None, key, f"source {source} reads no files; {remedy}"
        yield not self.text_column, "text_column", "name the column that holds the text"
        if source == "own":
            yield self.reader is None, "reader", _READER
            load_object(self.reader or "", "data.reader", _READER)
        yield (
            source != "own" and self.reader is not None,
            "reader",
            f"only source own has it, not {source}; set it to null",
        )
        if source == "hub":
            is_name = HUB_NAME.fullmatch(name) or os.path.isdir(name)
            yield not is_name, "hub_name", 'source hub needs a data set\'s name, such as "owner/name"'
            yield not self.hub_split, "hub_split", 'name a split, such as "train"'
            is_trained = self.validation_split == self.hub_split
            yield is_trained, "validation_split", "it is what is trained on; name another split"
        for key in ("hub_name", "hub_config", "validation_split") if source != "hub" else ():
            yield getattr(self, key) is not None, key, f"only source hub has it, not {source}; set it to null"
        name = self.tokenizer
        is_name = name == "byte" or HUB_NAME.fullmatch(name) or os.path.isdir(name)
        yield not is_name, "tokenizer", 'no such folder; give "byte", an existing tokenizer folder, or a hub name'
        yield os.path.isfile(self.cache_dir or ""), "cache_dir", "it is a file; name a folder"

    def _order_rules(self) -> Iterator[_Rule]:
        for keys, least, most, remedy in (
            (("validation_fraction",), 0, math.nextafter(1, 0), "give 0, or a share below 1 such as 0.05"),
            (("validation_documents", "max_documents"), 1, math.inf, "give at least 1, or null for all"),
            (("max_bad_share",), 0, 1, "give a share from 0 to 1"),
            (("max_document_bytes", "shuffle_buffer", "prefetch"), 1, math.inf, "give at least 1"),
            (("workers",), 0, math.inf, "give a number of processes, or 0"),
            (("sequence_length",), 2, math.inf, "give at least 2 tokens"),
            (("seed",), 0, math.inf, "give a whole number, 0 or more"),
        ):
            for key in keys:
                value = getattr(self, key)
                yield value is not None and not least <= value <= most, key, remedy
        self.lengths  # noqa: B018  refuses what is no schedule
        best_fit, length, alignment = self.packing_order == "best_fit", self.sequence_length, self.document_alignment
        remedy = f"data.packing={self.packing!r} cuts them; set data.packing=reset, or packing_order=in_order"
        yield best_fit and self.packing != "reset", "packing_order", f"whole documents are kept apart, but {remedy}"
        yield alignment != 1 and not best_fit, "document_alignment", "only data.packing_order=best_fit has it"
        divides = alignment >= 1 and length % alignment == 0
        yield not divides, "document_alignment", f"give a divisor of data.sequence_length={length}"
        if self.streaming:
            is_stored = self.source in ("python-stdlib", "prepared")
            yield is_stored, "streaming", f"source {self.source} is no stream; set data.streaming=false"
            remedy = "a stream does not keep where documents start; set data.streaming=false, or prepare the data"
            yield self.packing == "reset", "packing", remedy
            is_endless = self.validation_documents is None and self.max_documents is None
            held_out = self.validation_fraction and not self.separate_validation
            remedy = "a stream would be read to its end; give a number of documents, validation text of its own"
            yield held_out and is_endless, "validation_documents", f"{remedy}, or data.validation_fraction=0"


def _refusal(key: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"data.{key}={value!r}: {remedy}")


def expand_paths(paths: Sequence[str], key: str) -> list[str]:
    """Turn files and globs, given as `key`, into the files they name: absolute, sorted within each glob, each once.

    Raises ValueError where a name is no file, or a glob matches none.
    """
    files: list[str] = []
    for pattern in paths:
        if os.path.isdir(pattern):
            raise _refusal(key, pattern, "it is a folder; name its files, for example with a glob such as folder/*.txt")
        # A file whose name holds glob characters is still a file.
        names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        for name in names:
            if os.path.islink(name) and not os.path.exists(name):
                raise _refusal(key, pattern, f"{name} is a link to nothing; repair or remove it")
            if os.path.isdir(name) and os.path.splitext(pattern)[1]:
                raise _refusal(key, pattern, f"{name} is a folder; name its files, for example {name}/*")
        matches = [os.path.abspath(name) for name in names if os.path.isfile(name)]
        if not matches:
            what = "the glob matches no file" if glob.has_magic(pattern) else "no such file"
            raise _refusal(key, pattern, f"{what} (looked from {os.getcwd()}); correct the path")
        files += matches
    return list(dict.fromkeys(files))


class FileRange(NamedTuple):
    """A part of a file: bytes, row groups, record batches or rows from `start` to below `stop`; -1 is the file's end.

    `file` is an absolute name, or the name of what is no file; `size` are bytes on disk.
    """

    file: str
    start: int
    stop: int
    size: int


def cache_folder(cache_dir: str | None) -> Path:
    """Name the folder for tokenised text, by default in the user's cache; creates nothing."""
    try:
        return Path("~/.cache/mega_scale" if cache_dir is None else cache_dir).expanduser()
    except RuntimeError:
        raise ValueError(f"data.cache_dir={cache_dir!r}: this user has no home folder; name a folder") from None


def find_on_hub(name: str, kind: Literal["model", "dataset"]) -> Literal["there", "absent", "unreachable"]:
    """Ask the Hugging Face hub once for a name, because the clients' own retries take most of a minute.

    A name that is hidden from this user is absent; without a network, all are unreachable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError:  # it exists; fetching it will say how to ask for access
        return "there"
    except RepositoryNotFoundError:
        return "absent"
    except Exception:  # the HTTP client, and with it the errors of a missing network, differ between versions
        return "unreachable"
    return "there"


def mixture_entries(config: DataConfig) -> dict[str, tuple[DataConfig, Fraction, bool]]:
    """Read `data.mixture`: its sources by name, in the order given; ValueError for what it cannot have.

    Each has the keys under `data:` as they hold for it, its share, and whether that is in epochs (how often it is read
    while a source of `epochs: 1` is read once) rather than of the rows. Without a mixture, one source has the name "".
    """
    if config.mixture is None:
        return {"": (config, Fraction(1), False)}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in SOURCE_KEYS and field.name not in _SHARED_DEFAULTS and value != field.default:
            raise _refusal(field.name, value, "data.mixture names the sources; give the key to one of them")
    if not config.mixture:
        raise _refusal("mixture", {}, "name sources, or set it to null")
    found, types = {}, known_keys(DataConfig)
    for name, entry in config.mixture.items():
        where = f"data.mixture.{name}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}={entry!r}: give the source's keys, such as source, path and weight")
        known = {f"{where}.{key}": types.get(key, float) for key in (*SOURCE_KEYS, "weight", "epochs")}
        given = {key: allowed(f"{where}.{key}", value, known) for key, value in entry.items()}
        kind = "weight" if "weight" in given else "epochs"
        share = given.pop(kind, 1)
        if not 0 < share < math.inf:
            raise ValueError(f"{where}.{kind}={share!r}: give a number above 0")
        if "epochs" in given:
            raise ValueError(f"{where} has a weight and epochs: give one of them")
        try:
            source = replace(config, mixture=None, **given)
        except ValueError as error:
            raise of_source(name, error) from None
        found[name] = source, Fraction(str(share)), kind == "epochs"
    if len({by_epochs for _, _, by_epochs in found.values()}) > 1:
        raise ValueError("data.mixture: some sources have a weight and some have epochs; give all of them the same")
    return found


def validation_sets(config: DataConfig) -> dict[str, DataConfig]:
    """Read `data.validation`: what each set is read by, by its name; ValueError for what it cannot have."""
    found, types, held_out = {}, known_keys(DataConfig), mixture_entries(config)
    unset = {field.name: field.default for field in fields(config) if field.name in SOURCE_KEYS}
    unset |= {"mixture": None, "validation": None, "validation_fraction": 0.0, "text_column": config.text_column}
    for name, entry in (config.validation or {}).items():
        where = f"data.validation.{name}"
        if not re.fullmatch(r"[\w.-]+", str(name)) or name in (*held_out, HELD_OUT):
            raise ValueError(f"{where}: give the set another name, of letters, digits and ._- that no source has")
        if not isinstance(entry, dict) or "source" not in entry:
            raise ValueError(f"{where}={entry!r}: give its source ({', '.join(get_args(Source))}) and keys, as path")
        known = {f"{where}.{key}": types[key] for key in _SET_KEYS}
        given = {key: allowed(f"{where}.{key}", value, known) for key, value in entry.items()}
        try:
            found[name] = replace(config, **(unset | given))
            for broken, key, remedy in found[name]._text_rules():
                if broken:
                    raise _refusal(key, getattr(found[name], key), remedy)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return found


def of_source(name: str, error: ValueError) -> ValueError:
    """Say of which source of a mixture an error is."""
    return ValueError(f"data.mixture.{name}: {error}") if name else error


class LengthSchedule:
    """Shorter sequences at first: from each stage's step on, rows have its length, which divides L.

    At a step of length l, each row of L = `data.sequence_length` tokens is read as L / l rows of the same micro-batch.
    """

    def __init__(self, stages: Sequence[Any], sequence_length: int) -> None:
        key = f"data.length_schedule={stages!r}"
        if not stages or any(not isinstance(stage, list | tuple) or len(stage) != 2 for stage in stages):
            raise ValueError(f"{key}: give pairs [first step, tokens], such as [[0, 512], [1000, 1024]]")
        self._steps, self.lengths = ([stage[i] for stage in stages] for i in (0, 1))
        if self._steps[0] != 0 or self._steps != sorted(set(self._steps)):
            raise ValueError(f"{key}: steps {self._steps} must begin at 0 and ascend; sort them, the first being 0")
        for length in self.lengths:
            if length < 2 or sequence_length % length:
                divisors = [n for n in range(2, sequence_length + 1) if sequence_length % n == 0]
                near = sorted(sorted(divisors, key=lambda n: abs(n - length))[:3])
                raise ValueError(
                    f"{key}: a length of {length} does not divide data.sequence_length={sequence_length}, the rows "
                    f"that are read; take one of {', '.join(map(str, near))}, or another sequence_length"
                )

    def at(self, step: int) -> int:
        """The length of a step's rows, tokens; `step` is the number of steps done before."""
        return self.lengths[bisect_right(self._steps, step) - 1]
