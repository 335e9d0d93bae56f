"""Where texts come from: local files, data sets by name, the standard library; each in pieces that are read alone."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets

from mega_scale.data.bad_rows import BadRow
from mega_scale.data.cache import cache_folder
from mega_scale.data.columnar import BROKEN, column_path, values_of
from mega_scale.data.config import DataConfig, expand_paths
from mega_scale.data.hub_reach import look_up
from mega_scale.data.python_stdlib import stdlib_documents
from mega_scale.data.readers import Piece, read_piece, split_file
from mega_scale.data.text_rows import Reading, find, missing, text_of

_READ_AT_ONCE = 64  # rows


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
        """See TextSource. A file that was cut is lost as a whole, at least a file of mean size: nobody knows how much
        is missing."""
        counted = 0
        for row in read_piece(piece, self._kind, self._reading):
            if isinstance(row, BadRow) and row.lost != 0:
                sizes, most = self._sizes, piece.size
                if row.lost is None:
                    most = max(sizes.get(piece.file, 0), sum(sizes.values()) // len(sizes))
                lost = min(most if row.lost is None else row.lost, most - counted)
                counted += lost
                yield row._replace(lost=lost)
            else:
                yield row

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {file: split_file(file, self._kind, None)[0].size for file in self._files}


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
    """A data set that the `datasets` library knows by name.

    Args:
        dataset: `datasets.Dataset` or `datasets.IterableDataset`.
        name: What to call it in messages.
        reading: How rows become texts.
    """

    def __init__(self, dataset: Any, name: str, reading: Reading) -> None:
        self._dataset, self._name, self._reading = dataset, name, reading

    def pieces(self, size: int | None) -> list[Piece]:
        """See TextSource; a stream is one piece."""
        if not isinstance(self._dataset, datasets.Dataset) or not len(self._dataset):
            return [Piece(self._name, 0, -1, 0)]
        count, total = len(self._dataset), self._dataset.size_in_bytes or 0
        step = count if size is None else max(1, min(count, count * size // max(total, 1)))
        starts = range(0, count, step)
        return [Piece(self._name, i, min(i + step, count), total * step // count) for i in starts]

    def read(self, piece: Piece) -> Iterator[str | BadRow]:
        """See TextSource."""
        stored = isinstance(self._dataset, datasets.Dataset)
        return self._read_stored(piece) if stored else self._read_stream()

    def _read_stored(self, piece: Piece) -> Iterator[str | BadRow]:
        rows = self._dataset.with_format("arrow")
        path = column_path(rows.features.arrow_schema, self._reading.column)
        for first in range(piece.start, max(piece.stop, 0), _READ_AT_ONCE):
            if path is None:
                yield missing(rows.column_names, self._reading, self._name, first + 1, piece.stop - first)
                return
            last = min(first + _READ_AT_ONCE, piece.stop)
            values = self._values(rows, path, first, last)
            for number, value in enumerate(values, first + 1):
                yield text_of(value, self._reading, self._name, number)

    def _values(self, rows: Any, path: list[str], first: int, last: int) -> list[Any]:
        """Values of some rows; an exception for one that cannot be read."""
        try:
            return [value for batch in rows[first:last].to_batches() for value in values_of(batch, path)]
        except BROKEN as error:
            if last - first == 1:
                return [error]
        return [value for i in range(first, last) for value in self._values(rows, path, i, i + 1)]

    def _read_stream(self) -> Iterator[str | BadRow]:
        rows, number = iter(self._dataset), 0
        while True:
            # Only the reading is guarded: what goes wrong in the consumer is not the source's fault.
            try:
                row = next(rows, None)
            except Exception as error:
                raise ValueError(
                    f"{self._name} cannot be read behind row {number} ({_cause(error)}): repair it, or set "
                    "data.streaming=false, which reads around bad rows"
                ) from None
            if row is None:
                return
            number += 1
            try:
                value = find(row, self._reading.column)
            except KeyError:
                yield missing(list(row), self._reading, self._name, number)
            else:
                yield text_of(value, self._reading, self._name, number)


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
        return _open_named(config, held_out)
    key, paths = ("validation_path", config.validation_path) if held_out else ("path", config.path)
    assert paths is not None
    column = "text" if config.source == "text" else config.text_column
    return FileSource(expand_paths(paths, key), config.source, Reading(column, config.max_document_bytes))


def _open_named(config: DataConfig, held_out: bool) -> TextSource:
    assert config.hub_name is not None
    reading = Reading(config.text_column, config.max_document_bytes)
    cache = {} if config.cache_dir is None else {"cache_dir": str(cache_folder(config.cache_dir) / "datasets")}
    key, split = ("validation_split", config.validation_split) if held_out else ("hub_split", config.hub_split)
    name, is_folder = f"data.hub_name={config.hub_name!r}", Path(config.hub_name).is_dir()
    if not is_folder and not datasets.config.HF_HUB_OFFLINE:
        reach = look_up(config.hub_name, "dataset")
        if reach == "absent":
            raise ValueError(f"{name}: the hub has no such data set, or needs a log-in for it; correct the name")
        if reach == "unreachable":
            raise ValueError(
                f"{name}: the hub cannot be reached; set HF_HUB_OFFLINE=1 to use what was fetched before, or give "
                "files with data.source=json, parquet, arrow or text"
            )
    try:
        builder = datasets.load_dataset_builder(config.hub_name, config.hub_config, **cache)
        # `datasets` gives up a whole data set for one bad row; the readers here do not.
        if is_folder and (source := _files_of(builder, split, reading)) is not None:
            return source
        try:
            found = datasets.load_dataset(
                config.hub_name, config.hub_config, split=split, streaming=config.streaming, **cache
            )
        except datasets.exceptions.DatasetGenerationError:
            if (source := _files_of(builder, split, reading)) is None:
                raise
            return source
    except Exception as error:
        raise ValueError(
            f"{name} with data.hub_config={config.hub_config!r}, data.{key}={split!r} cannot be loaded: "
            f"{_cause(error)}; correct these keys, or fetch it while the hub can be reached"
        ) from None
    return NamedSource(found, f"{name} ({split})", reading)


def _files_of(builder: Any, split: str | None, reading: Reading) -> FileSource | None:
    """The files of a split, fetched if need be, where they are rows as they lie there."""
    kind, files = type(builder).__module__.rpartition(".")[2], (builder.config.data_files or {}).get(split)
    if kind not in ("json", "parquet", "arrow") or not files or getattr(builder.config, "field", None):
        return None
    return FileSource(datasets.DownloadManager().download(list(files)), kind, reading)


def _cause(error: BaseException) -> str:
    """What went wrong at first, in one line; libraries wrap it in words that do not say it."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
