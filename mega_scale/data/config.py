"""The keys under `data:` and the checks that need nothing but the file system."""

import glob
import os
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mega_scale.data.length_schedule import LengthSchedule
from mega_scale.data.mixture_config import mixture_entries
from mega_scale.data.paths import local_path

Source = Literal["python-stdlib", "text", "json", "parquet", "arrow", "hub", "prepared"]
FILE_SOURCES = ("text", "json", "parquet", "arrow")
Packing = Literal["none", "concat", "reset"]
PackingOrder = Literal["in_order", "best_fit"]

# A hub name is "name" or "owner/name"; anything else that is given as a name must be a folder.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass
class DataConfig:
    """Where the text comes from, how it becomes tokens, and in which order they are read."""

    source: Source = "python-stdlib"
    """Kind of corpus: python-stdlib (the text of Python's own library), text (UTF-8, one document a file, line ends
    read as \\n), json (one object a line, or a list), parquet, arrow, hub (a data set by name), or prepared (a folder
    that launch/prepare.py wrote). Text and json may be compressed (gz, zst, bz2, xz, lz4, by content); a byte order
    mark of UTF-8 is left out."""

    path: list[str] | None = None
    """Files or globs to read (paths), for source text, json, parquet and arrow; read in this order. For source
    prepared, the folder."""

    mixture: dict[str, Any] | None = None
    """Several sources by name, each a mapping of its own keys (source, path, hub_name and the like) and either
    weight, its share of the rows, or epochs, how often it is read relative to the others (1 by default); null reads
    the one source that the other keys name."""

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
    """Largest share of bad rows (0 to 1): not UTF-8, no such column, not text, empty, too long, broken JSON, in a
    truncated, corrupt or unreadable file; and of the files' bytes that could not be read, where a file that was cut
    counts as a whole. They are skipped and counted; more of either end the run."""

    validation_path: list[str] | None = None
    """Files or globs to validate on (paths), for source text, json, parquet and arrow; null holds out a share of the
    text."""

    validation_split: str | None = None
    """Name of the data set's split to validate on, for source hub; null holds out a share of the text."""

    validation_fraction: float = 0.05
    """Share of the documents held out for validation (0 to below 1), chosen by a hash of their text so that a repeated
    text stays on one side; unused with validation_path or validation_split; 0 holds out nothing. Prepared data was
    split when it was prepared; there, 0 leaves its validation part unread."""

    validation_documents: int | None = None
    """Size of the validation part at most (documents); null takes all; a stream must be told where to stop."""

    max_documents: int | None = None
    """Read only the first of the corpus (documents), before anything is held out; null reads all."""

    tokenizer: str = "byte"
    """The built-in "byte" (one token a UTF-8 byte), or a Hugging Face tokenizer's folder or hub name."""

    add_bos: bool = False
    """Whether documents begin with what the tokenizer puts before a text (<s>, [CLS]), or with its bos where it puts
    nothing; false: documents follow one another, each ended by eos, else sep. Checkpoints and exports hold the
    tokenizer as it was trained with."""

    sequence_length: int = 512
    """Length of a training sequence (tokens)."""

    length_schedule: list[list[int]] | None = None
    """Shorter sequences by step, as pairs [first step, tokens] such as [[0, 512], [1000, 1024]]; each length divides
    `sequence_length`, whose sequences are cut to it, so a batch keeps its number of tokens; null: always
    `sequence_length`. Validation uses that."""

    packing: Packing = "concat"
    """How documents become sequences: concat (end to end, cut anywhere), reset (the same, but documents are kept apart:
    the moving average begins anew, attention and loss stay inside a document), or none (each alone, in sequences that
    are not full)."""

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
        for key in ("path", "validation_path"):
            if isinstance(value := getattr(self, key), list):
                found = [local_path(part, f"data.{key}") if isinstance(part, str) else part for part in value]
                setattr(self, key, found)
        for key in ("hub_name", "tokenizer", "cache_dir"):
            if isinstance(value := getattr(self, key), str):
                setattr(self, key, local_path(value, f"data.{key}"))

    def validate(self) -> None:
        """Check every key without reading any text.

        Raises:
            ValueError: The first key that cannot work, with its value and the remedy.
        """
        if self.mixture is not None:
            for name, entry in mixture_entries(self).items():
                try:
                    entry.config.validate()
                except ValueError as error:
                    raise ValueError(f"data.mixture.{name}: {error}") from None
            return
        self._validate_choices()
        self._validate_paths()
        self._validate_hub()
        self._validate_numbers()
        self._validate_streaming()
        _validate_tokenizer(self.tokenizer)
        if self.cache_dir is not None and os.path.isfile(self.cache_dir):
            raise _refusal("cache_dir", self.cache_dir, "it is a file; name a folder")

    @property
    def lengths(self) -> LengthSchedule | None:
        """The length schedule; None where all sequences have `sequence_length`."""
        return None if self.length_schedule is None else LengthSchedule(self.length_schedule, self.sequence_length)

    @property
    def validates(self) -> bool:
        """Whether any text is held out for validation."""
        if self.mixture is not None:
            return any(entry.config.validates for entry in mixture_entries(self).values())
        return bool(self.validation_path or self.validation_split or self.validation_fraction)

    def _validate_choices(self) -> None:
        if self.source not in get_args(Source):
            raise _refusal("source", self.source, f"choose one of {', '.join(get_args(Source))}")
        if self.packing not in get_args(Packing):
            raise _refusal("packing", self.packing, f"choose one of {', '.join(get_args(Packing))}")
        if self.packing_order not in get_args(PackingOrder):
            raise _refusal("packing_order", self.packing_order, f"choose one of {', '.join(get_args(PackingOrder))}")
        if self.packing_order == "best_fit" and self.packing != "reset":
            remedy = f"it is for documents that are kept apart, not for data.packing={self.packing!r}"
            raise _refusal("packing_order", "best_fit", f"{remedy}; set data.packing=reset, or packing_order=in_order")
        if self.document_alignment != 1 and self.packing_order != "best_fit":
            raise _refusal("document_alignment", self.document_alignment, "only data.packing_order=best_fit has it")

    def _validate_paths(self) -> None:
        if self.source == "prepared":
            self._validate_prepared()
        elif self.source in FILE_SOURCES:
            if not self.path:
                raise _refusal("path", self.path, f"source {self.source} needs files or globs")
            expand_paths(self.path, key="path")
            if self.validation_path is not None:
                if not self.validation_path:
                    raise _refusal("validation_path", self.validation_path, "name files or globs, or leave it null")
                expand_paths(self.validation_path, key="validation_path")
        for key in ("path", "validation_path"):
            read = self.source in FILE_SOURCES or (self.source == "prepared" and key == "path")
            if not read and getattr(self, key) is not None:
                kinds = ", ".join(FILE_SOURCES)
                remedy = (
                    f"source {self.source} reads no files; set data.source to what they are ({kinds}), or {key} to null"
                )
                raise _refusal(key, getattr(self, key), remedy)
        if not self.text_column:
            raise _refusal("text_column", self.text_column, "name the column that holds the text")

    def _validate_prepared(self) -> None:
        if not self.path or len(self.path) != 1:
            raise _refusal("path", self.path, "source prepared needs one folder; several can be a data.mixture")
        if not os.path.isfile(f"{self.path[0]}/manifest.json"):
            remedy = "it has no manifest.json; name a folder that launch/prepare.py has written to its end"
            raise _refusal("path", self.path[0], remedy)

    def _validate_hub(self) -> None:
        for key in ("hub_name", "hub_config", "validation_split"):
            if getattr(self, key) is not None and self.source != "hub":
                raise _refusal(key, getattr(self, key), f"only source hub has it, not {self.source}; set it to null")
        if self.source != "hub":
            return
        if not self.hub_name or not (HUB_NAME.fullmatch(self.hub_name) or os.path.isdir(self.hub_name)):
            raise _refusal("hub_name", self.hub_name, 'source hub needs a data set\'s name, such as "owner/name"')
        if not self.hub_split:
            raise _refusal("hub_split", self.hub_split, 'name a split, such as "train"')
        if self.validation_split == self.hub_split:
            raise _refusal("validation_split", self.validation_split, "it is what is trained on; name another split")

    def _validate_numbers(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise _refusal("validation_fraction", self.validation_fraction, "give 0, or a share below 1 such as 0.05")
        for key in ("validation_documents", "max_documents"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise _refusal(key, value, "give at least 1, or null for all")
        if not 0 <= self.max_bad_share <= 1:
            raise _refusal("max_bad_share", self.max_bad_share, "give a share from 0 to 1")
        for key in ("max_document_bytes", "shuffle_buffer", "prefetch"):
            if getattr(self, key) < 1:
                raise _refusal(key, getattr(self, key), "give at least 1")
        if self.workers < 0:
            raise _refusal("workers", self.workers, "give a number of processes, or 0")
        if self.sequence_length < 2:
            raise _refusal("sequence_length", self.sequence_length, "give at least 2 tokens")
        if self.document_alignment < 1 or self.sequence_length % self.document_alignment:
            remedy = f"give a divisor of data.sequence_length={self.sequence_length}"
            raise _refusal("document_alignment", self.document_alignment, remedy)
        self.lengths  # noqa: B018  refuses what is no schedule
        if self.seed < 0:
            raise _refusal("seed", self.seed, "give a whole number, 0 or more")

    def _validate_streaming(self) -> None:
        if not self.streaming:
            return
        if self.source in ("python-stdlib", "prepared"):
            raise _refusal("streaming", True, f"source {self.source} is no stream; set data.streaming=false")
        if self.packing == "reset":
            remedy = "a stream does not keep where documents start; set data.streaming=false, or prepare the data"
            raise _refusal("packing", "reset", remedy)
        separate = self.validation_path or self.validation_split
        if self.validation_fraction and not separate and self.validation_documents is None and not self.max_documents:
            raise _refusal(
                "validation_documents",
                None,
                "holding out a share of a stream would read it to its end; say after how many documents to stop, give "
                "validation text of its own, or set data.validation_fraction=0",
            )


def expand_paths(paths: list[str], key: str) -> list[str]:
    """Turn files and globs into the files they name, absolute, sorted within each glob, each once.

    Args:
        paths: Files or globs.
        key: Field of DataConfig that the paths come from, for messages.

    Returns:
        Absolute file names.

    Raises:
        ValueError: A name that is no file, or a glob that matches none.
    """
    files: list[str] = []
    for pattern in paths:
        expanded = os.path.expanduser(pattern)
        if os.path.isdir(expanded):
            raise _refusal(key, pattern, "it is a folder; name its files, for example with a glob such as folder/*.txt")
        # A file whose name holds glob characters is still a file.
        names = [expanded] if os.path.isfile(expanded) else sorted(glob.glob(expanded, recursive=True))
        for name in names:
            if os.path.islink(name) and not os.path.exists(name):
                raise _refusal(key, pattern, f"{name} is a link to nothing; repair or remove it")
            if os.path.isdir(name) and os.path.splitext(expanded)[1]:
                raise _refusal(key, pattern, f"{name} is a folder; name its files, for example {name}/*")
        matches = [os.path.abspath(name) for name in names if os.path.isfile(name)]
        if not matches:
            what = "the glob matches no file" if glob.has_magic(expanded) else "no such file"
            raise _refusal(key, pattern, f"{what} (looked from {os.getcwd()}); correct the path")
        files += matches
    return list(dict.fromkeys(files))


def _validate_tokenizer(name: str) -> None:
    if name == "byte" or os.path.isdir(os.path.expanduser(name)):
        return
    if not HUB_NAME.fullmatch(name):
        raise _refusal("tokenizer", name, 'no such folder; give "byte", an existing tokenizer folder, or a hub name')


def _refusal(key: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"data.{key}={value!r}: {remedy}")
