"""The keys under `data:` and the checks that need nothing but the file system."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Source = Literal["python-stdlib", "text", "json", "parquet", "hub"]
FILE_SOURCES = ("text", "json", "parquet")

# A hub name is "name" or "owner/name"; anything else that is given as a name must be a folder.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass
class DataConfig:
    """Where the text comes from, how it becomes tokens, and in which order they are read."""

    source: Source = "python-stdlib"
    """Kind of corpus: python-stdlib (the text of Python's own library), text (UTF-8, one document a file, line ends
    read as \\n), json (one object a line, or a list), parquet, or hub (a data set by name)."""

    path: list[str] | None = None
    """Files or globs to read (paths), for source text, json and parquet; read in this order."""

    hub_name: str | None = None
    """Name of a Hugging Face data set, such as "owner/name", or the folder of one, for source hub."""

    hub_config: str | None = None
    """Name of the data set's configuration, for source hub, where it has several."""

    hub_split: str = "train"
    """Name of the data set's split to train on, for source hub."""

    text_column: str = "text"
    """Name of the column that holds the text, for source json, parquet and hub."""

    validation_path: list[str] | None = None
    """Files or globs to validate on (paths), for source text, json and parquet; null holds out a share of the text."""

    validation_split: str | None = None
    """Name of the data set's split to validate on, for source hub; null holds out a share of the text."""

    validation_fraction: float = 0.05
    """Share of the documents held out for validation (0 to below 1), chosen by a hash of their text so that a repeated
    text stays on one side; unused with validation_path or validation_split; 0 holds out nothing."""

    validation_documents: int | None = None
    """Size of the validation part at most (documents); null takes all; a stream must be told where to stop."""

    max_documents: int | None = None
    """Read only the first of the corpus (documents), before anything is held out; null reads all."""

    tokenizer: str = "byte"
    """The built-in "byte" (one token a UTF-8 byte), or a Hugging Face tokenizer's folder or hub name."""

    sequence_length: int = 512
    """Length of a training sequence (tokens)."""

    streaming: bool = False
    """Read the training text while training, in its own order, instead of tokenising it first; needs shuffle=false."""

    shuffle: bool = True
    """Draw the sequences of every epoch in a new order given by `seed`; false: in the order of the corpus."""

    seed: int = 0
    """Seed of the order of the sequences (no unit)."""

    cache_dir: str | None = None
    """Folder for tokenised text (path); null takes ~/.cache/mega_scale."""

    def validate(self) -> None:
        """Check every key without reading any text.

        Raises:
            ValueError: The first key that cannot work, with its value and the remedy.
        """
        if self.source not in get_args(Source):
            raise _refusal("source", self.source, f"choose one of {', '.join(get_args(Source))}")
        self._validate_paths()
        self._validate_hub()
        self._validate_numbers()
        self._validate_streaming()
        _validate_tokenizer(self.tokenizer)
        if self.cache_dir is not None and Path(self.cache_dir).expanduser().is_file():
            raise _refusal("cache_dir", self.cache_dir, "it is a file; name a folder")

    @property
    def validates(self) -> bool:
        """Whether any text is held out for validation."""
        return bool(self.validation_path or self.validation_split or self.validation_fraction)

    def _validate_paths(self) -> None:
        if self.source in FILE_SOURCES:
            if not self.path:
                raise _refusal("path", self.path, f"source {self.source} needs files or globs")
            expand_paths(self.path, key="path")
            if self.validation_path is not None:
                if not self.validation_path:
                    raise _refusal("validation_path", self.validation_path, "name files or globs, or leave it null")
                expand_paths(self.validation_path, key="validation_path")
        for key in ("path", "validation_path"):
            if self.source not in FILE_SOURCES and getattr(self, key) is not None:
                raise _refusal(key, getattr(self, key), f"source {self.source} reads no files; set it to null")
        if not self.text_column:
            raise _refusal("text_column", self.text_column, "name the column that holds the text")

    def _validate_hub(self) -> None:
        for key in ("hub_name", "hub_config", "validation_split"):
            if getattr(self, key) is not None and self.source != "hub":
                raise _refusal(key, getattr(self, key), f"only source hub has it, not {self.source}; set it to null")
        if self.source != "hub":
            return
        if not self.hub_name or not (HUB_NAME.fullmatch(self.hub_name) or Path(self.hub_name).is_dir()):
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
        if self.sequence_length < 2:
            raise _refusal("sequence_length", self.sequence_length, "give at least 2 tokens")
        if self.seed < 0:
            raise _refusal("seed", self.seed, "give a whole number, 0 or more")

    def _validate_streaming(self) -> None:
        if not self.streaming:
            return
        if self.source == "python-stdlib":
            raise _refusal("streaming", True, "source python-stdlib is read whole; set data.streaming=false")
        if self.shuffle:
            raise _refusal("streaming", True, "a stream is read in its own order; set data.shuffle=false")
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
        matches = [os.path.abspath(name) for name in names if os.path.isfile(name)]
        if not matches:
            what = "the glob matches no file" if glob.has_magic(expanded) else "no such file"
            raise _refusal(key, pattern, f"{what} (looked from {os.getcwd()}); correct the path")
        files += matches
    return list(dict.fromkeys(files))


def _validate_tokenizer(name: str) -> None:
    if name == "byte" or Path(name).expanduser().is_dir():
        return
    if not HUB_NAME.fullmatch(name):
        raise _refusal("tokenizer", name, 'no such folder; give "byte", an existing tokenizer folder, or a hub name')


def _refusal(key: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"data.{key}={value!r}: {remedy}")
