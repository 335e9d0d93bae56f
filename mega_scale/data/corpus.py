"""From a DataConfig to documents: which texts there are, and which of them are held out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets

from mega_scale.data.config import DataConfig
from mega_scale.data.python_stdlib import stdlib_documents
from mega_scale.data.sources import load_source

_READ_AT_ONCE = 64  # documents


class Documents:
    """Texts that can be read again and again, always the same ones in the same order.

    Args:
        read: Starts from the first text at every call.
    """

    def __init__(self, read: Callable[[], Iterator[str]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[str]:
        return self._read()

    def digest(self) -> str:
        """Hash all texts and their order; reads them once.

        Returns:
            32 hexadecimal digits.
        """
        total = hashlib.blake2b(digest_size=16)
        for text in self:
            total.update(hashlib.blake2b(text.encode(), digest_size=16).digest())
        return total.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """A run's documents.

    Args:
        train: What is trained on.
        validation: What is held out; None where the configuration holds out nothing.
    """

    train: Documents
    validation: Documents | None


def load_corpus(config: DataConfig) -> Corpus:
    """Find a run's documents; texts that are empty are left out.

    Args:
        config: The keys under `data:`, validated.

    Returns:
        The part to train on and the part to validate on.

    Raises:
        ValueError: The source cannot be read, or has no such column.
    """
    everything = load_documents(config)
    if config.validation_path or config.validation_split:
        return Corpus(everything, _first(_source_documents(config, held_out=True), config.validation_documents))
    share = config.validation_fraction
    if not share:
        return Corpus(everything, None)
    train = Documents(lambda: (text for text in everything if not is_held_out(text, share)))
    validation = Documents(lambda: (text for text in everything if is_held_out(text, share)))
    return Corpus(train, _first(validation, config.validation_documents))


def load_documents(config: DataConfig) -> Documents:
    """Find all documents of `data.path`, the hub's split or the default corpus, none held out.

    Args:
        config: The keys under `data:`, validated.

    Returns:
        The documents, at most `max_documents`.

    Raises:
        ValueError: The source cannot be read, or has no such column.
    """
    return _first(_source_documents(config, held_out=False), config.max_documents)


def is_held_out(text: str, share: float) -> bool:
    """Say whether a text belongs to the validation part, from its own hash only.

    Args:
        text: The document.
        share: Held-out share, 0 to 1.

    Returns:
        The same answer for the same text, on every machine.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _first(documents: Documents, count: int | None) -> Documents:
    return documents if count is None else Documents(lambda: islice(documents, count))


def _source_documents(config: DataConfig, *, held_out: bool) -> Documents:
    if config.source == "python-stdlib":
        texts = [text for text in stdlib_documents() if text]
        return Documents(lambda: iter(texts))
    dataset, name = load_source(config, held_out=held_out)
    column = "text" if config.source == "text" else config.text_column
    _require_column(dataset, column, name)
    return Documents(lambda: _read_column(dataset, column, name))


def _require_column(dataset: Any, column: str, name: str) -> None:
    columns = dataset.column_names
    if columns is None:  # a stream of JSON knows its columns by its first row only
        try:
            columns = list(next(iter(dataset), {}))
        except Exception as error:
            raise _unreadable(name, error) from None
    if columns and column not in columns:
        raise ValueError(f"data.text_column={column!r}: {name} has the columns {', '.join(columns)}; name one of them")


def _read_column(dataset: Any, column: str, name: str) -> Iterator[str]:
    batches = dataset.select_columns([column]).iter(batch_size=_READ_AT_ONCE)
    while True:
        # Only the reading is guarded: what goes wrong in the consumer is not the source's fault.
        try:
            batch = next(batches, None)
        except Exception as error:
            raise _unreadable(name, error) from None
        if batch is None:
            return
        for text in batch[column]:
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"data.text_column={column!r} of {name} holds {type(text).__name__}, not text: name another column"
                )
            if text:
                yield text


def _unreadable(name: str, error: Exception) -> ValueError:
    cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
    return ValueError(f"{name} cannot be read: {cause or error}; repair it, or correct data.source")
