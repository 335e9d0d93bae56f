"""Where texts come from: local files, data sets by name, the standard library; each in pieces that are read alone."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets

from mega_scale.data.bad_rows import BadRow
from mega_scale.data.cache import cache_folder
from mega_scale.data.config import DataConfig, expand_paths
from mega_scale.data.hub_reach import look_up
from mega_scale.data.python_stdlib import stdlib_documents
from mega_scale.data.readers import Piece, Reading, read_piece, split_file, text_of

_READ_AT_ONCE = 64  # documents


class TextSource(Protocol):
    """Texts in pieces."""

    def pieces(self, size: int | None) -> list[Piece]:
        """Split all text into pieces of about so many bytes; None splits no file."""

    def read(self, piece: Piece) -> Iterator[str | BadRow]:
        """Read the rows of a piece in order: a text, or what is wrong with the row."""


class FileSource:
    """Local files.

    Args:
        files: Absolute names.
        kind: "text", "json", "parquet" or "arrow".
        reading: How rows become texts.
    """

    def __init__(self, files: Sequence[str], kind: str, reading: Reading) -> None:
        self._files, self._kind, self._reading = files, kind, reading

    def pieces(self, size: int | None) -> list[Piece]:
        """See TextSource."""
        return [piece for file in self._files for piece in split_file(file, self._kind, size)]

    def read(self, piece: Piece) -> Iterator[str | BadRow]:
        """See TextSource."""
        return read_piece(piece, self._kind, self._reading)


class StdlibSource:
    """The text of the Python that runs this."""

    def pieces(self, size: int | None) -> list[Piece]:
        """See TextSource; it is one piece."""
        return [Piece("python-stdlib", 0, -1, 0)]

    def read(self, piece: Piece) -> Iterator[str | BadRow]:
        """See TextSource."""
        return iter(self._texts)

    @cached_property
    def _texts(self) -> list[str]:
        return [text for text in stdlib_documents() if text]


class NamedSource:
    """A data set that the `datasets` library knows by name, or a folder of one.

    Args:
        dataset: `datasets.Dataset` or `datasets.IterableDataset`.
        name: What to call it in messages.
        reading: How rows become texts.
    """

    def __init__(self, dataset: Any, name: str, reading: Reading) -> None:
        self._dataset, self._name, self._reading = dataset, name, reading
        columns = dataset.column_names
        if columns is None:  # a stream of JSON knows its columns by its first row only
            columns = list(next(iter(dataset), {}))
        if columns and reading.column not in columns:
            raise ValueError(
                f"data.text_column={reading.column!r}: {name} has the columns {', '.join(columns)}; name one of them"
            )

    def pieces(self, size: int | None) -> list[Piece]:
        """See TextSource; a stream is one piece."""
        if size is None or not isinstance(self._dataset, datasets.Dataset) or not len(self._dataset):
            return [Piece(self._name, 0, -1, 0)]
        count, total = len(self._dataset), self._dataset.size_in_bytes or 0
        step = max(1, min(count, count * size // max(total, 1)))
        starts = range(0, count, step)
        return [Piece(self._name, i, min(i + step, count), total * step // count) for i in starts]

    def read(self, piece: Piece) -> Iterator[str | BadRow]:
        """See TextSource."""
        dataset = self._dataset if piece.stop < 0 else self._dataset.select(range(piece.start, piece.stop))
        batches = dataset.select_columns([self._reading.column]).iter(batch_size=_READ_AT_ONCE)
        number = piece.start
        while True:
            # Only the reading is guarded: what goes wrong in the consumer is not the source's fault.
            try:
                batch = next(batches, None)
            except Exception as error:
                raise _unreadable(self._name, error) from None
            if batch is None:
                return
            for text in batch[self._reading.column]:
                number += 1
                yield text_of(text, self._reading, self._name, number)


def open_source(config: DataConfig, *, held_out: bool = False) -> TextSource:
    """Open a source without reading its text.

    Args:
        config: The keys under `data:`, validated.
        held_out: Take `validation_path` or `validation_split` in place of `path` or `hub_split`.

    Returns:
        The source.

    Raises:
        ValueError: It cannot be found, or has no such column.
    """
    if config.source == "python-stdlib":
        return StdlibSource()
    if config.source == "hub":
        reading = Reading(config.text_column, config.max_document_bytes)
        return NamedSource(*_load_named(config, held_out), reading)
    key, paths = ("validation_path", config.validation_path) if held_out else ("path", config.path)
    assert paths is not None
    column = "text" if config.source == "text" else config.text_column
    return FileSource(expand_paths(paths, key), config.source, Reading(column, config.max_document_bytes))


def _load_named(config: DataConfig, held_out: bool) -> tuple[Any, str]:
    assert config.hub_name is not None
    arguments: dict[str, Any] = {"streaming": config.streaming}
    if config.cache_dir is not None:
        arguments["cache_dir"] = str(cache_folder(config.cache_dir) / "datasets")
    key, split = ("validation_split", config.validation_split) if held_out else ("hub_split", config.hub_split)
    name = f"data.hub_name={config.hub_name!r}"
    if not Path(config.hub_name).is_dir() and not datasets.config.HF_HUB_OFFLINE:
        reach = look_up(config.hub_name, "dataset")
        if reach == "absent":
            raise ValueError(f"{name}: the hub has no such data set, or needs a log-in for it; correct the name")
        if reach == "unreachable":
            raise ValueError(
                f"{name}: the hub cannot be reached; set HF_HUB_OFFLINE=1 to use what was fetched before, or give "
                "files with data.source=json, parquet, arrow or text"
            )
    try:
        return datasets.load_dataset(config.hub_name, config.hub_config, split=split, **arguments), f"{name} ({split})"
    except Exception as error:
        raise ValueError(
            f"{name} with data.hub_config={config.hub_config!r}, data.{key}={split!r} cannot be loaded: {error}; "
            "correct these keys, or fetch it while the hub can be reached"
        ) from None


def _unreadable(name: str, error: Exception) -> ValueError:
    cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
    return ValueError(f"{name} cannot be read: {cause or error}; repair it, or correct data.source")
