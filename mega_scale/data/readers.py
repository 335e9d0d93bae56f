"""Readers of local files: texts and bad rows, piece by piece, never a file as a whole in memory.

A piece is a part of a file that can be read on its own: a range of bytes of a plain jsonl file, row groups of a parquet
file, record batches of an arrow file; else the whole file.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mega_scale.data.bad_rows import BadRow, Cause

_ROWS_AT_ONCE = 256
# JSON writes a byte of text as six characters at most, and a row may have other columns.
_LINE_PER_TEXT = 8
_BROKEN = (EOFError, OSError, zlib.error, pa.ArrowException)


class Piece(NamedTuple):
    """A part of a file.

    Args:
        file: Absolute name, or the name of what is no file.
        start: First byte, row group, record batch or row; 0 for a whole file.
        stop: Behind the last one; -1 is the end of the file.
        size: What it weighs, bytes.
    """

    file: str
    start: int
    stop: int
    size: int


class Reading(NamedTuple):
    """How rows become texts.

    Args:
        column: Name of the column that holds the text.
        longest: Longest text, UTF-8 bytes.
    """

    column: str
    longest: int


def split_file(file: str, source: str, size: int | None) -> list[Piece]:
    """Split a file into pieces of about a size.

    Args:
        file: Absolute name.
        source: "text", "json", "parquet" or "arrow".
        size: Bytes of a piece; None takes the file whole.

    Returns:
        The pieces in order; one for a file that cannot be split, or not be read.
    """
    total = os.path.getsize(file)
    whole = [Piece(file, 0, -1, total)]
    if size is None or total <= size:
        return whole
    if source == "json" and not _is_compressed(file) and not _is_list(file):
        stops = [*range(size, total, size), total]
        return [Piece(file, start, stop, stop - start) for start, stop in zip([0, *stops], stops, strict=False)]
    try:
        if source == "parquet":
            count = pq.ParquetFile(file).num_row_groups
        elif source == "arrow":
            with pa.memory_map(file) as mapped:
                count = pa.ipc.open_file(mapped).num_record_batches
        else:
            return whole
    except _BROKEN:  # reading it will say what is wrong
        return whole
    step = max(1, count * size // total)
    return [
        Piece(file, first, min(first + step, count), total * min(step, count - first) // count)
        for first in range(0, count, step)
    ]


def read_piece(piece: Piece, source: str, reading: Reading) -> Iterator[str | BadRow]:
    """Read the rows of a piece in order.

    Args:
        piece: Of `split_file`.
        source: "text", "json", "parquet" or "arrow".
        reading: How rows become texts.

    Returns:
        A text, or what is wrong with the row.
    """
    readers: dict[str, Callable[[Piece, Reading], Iterator[str | BadRow]]] = {
        "text": _read_text,
        "json": _read_json,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }
    return readers[source](piece, reading)


def text_of(value: Any, reading: Reading, file: str, line: int) -> str | BadRow:
    """Take a column's value for a text, or say why it is none.

    Args:
        value: What stands in the column.
        reading: How rows become texts.
        file: Name of the file.
        line: Line or row, from 1.
    """
    if value is None or value in ("", b""):
        return BadRow("empty", file, line, "the text is empty")
    if not isinstance(value, str | bytes):
        kind = type(value).__name__
        return BadRow("not_text", file, line, f"data.text_column={reading.column!r} holds {kind}, not text")
    if len(value) > reading.longest:
        return _too_long(file, line, reading)
    try:
        # A str may hold half a surrogate pair, which no UTF-8 has; encoding finds it.
        text = value.decode() if isinstance(value, bytes) else value
        size = len(value) if isinstance(value, bytes) else len(value.encode())
    except UnicodeError as error:
        return BadRow("not_utf8", file, line, f"the text is not UTF-8 ({error})")
    return text if size <= reading.longest else _too_long(file, line, reading)


def _too_long(file: str, line: int, reading: Reading) -> BadRow:
    return BadRow("too_long", file, line, f"the text is longer than data.max_document_bytes={reading.longest}")


def _missing(columns: list[str], reading: Reading, file: str, line: int, count: int = 1) -> BadRow:
    detail = f"there is no column data.text_column={reading.column!r}, only {', '.join(columns)}"
    return BadRow("missing_column", file, line, detail, count)


def _is_compressed(file: str) -> bool:
    return file.endswith((".gz", ".zst"))


def _is_list(file: str) -> bool:
    with _open(file) as opened:
        try:
            return opened.read(64).lstrip()[:1] == b"["
        except _BROKEN:
            return False


def _open(file: str) -> BinaryIO:
    if file.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.endswith(".zst"):
        return io.BufferedReader(pa.input_stream(file, compression="zstd", buffer_size=0))
    return open(file, "rb")


def _broken_file(file: str, line: int, error: Exception) -> BadRow:
    words = str(error).lower()
    cut = isinstance(error, EOFError) or "truncated" in words or "end-of-stream" in words
    cause: Cause = "truncated_file" if cut else "corrupt"
    return BadRow(cause, file, line, f"the file cannot be read from here on ({error})")


def _read_text(piece: Piece, reading: Reading) -> Iterator[str | BadRow]:
    try:
        with _open(piece.file) as opened:
            content = opened.read(reading.longest + 1)
    except _BROKEN as error:
        yield _broken_file(piece.file, 1, error)
        return
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if error.start < reading.longest - 3:  # else a character may only have been cut
            line = content.count(b"\n", 0, error.start) + 1
            yield BadRow("not_utf8", piece.file, line, f"the text is not UTF-8 ({error})")
            return
    found = text_of(content, reading, piece.file, 1)
    yield found.replace("\r\n", "\n").replace("\r", "\n") if isinstance(found, str) else found


def _read_json(piece: Piece, reading: Reading) -> Iterator[str | BadRow]:
    if piece.start == 0 and _is_list(piece.file):
        yield from _read_list(piece, reading)
        return
    line, before = 0, _Before(piece)
    with _open(piece.file) as opened:
        if piece.start:
            opened.seek(piece.start - 1)
            opened.readline()  # the line that the start cuts belongs to the piece before
        place = opened.tell() if piece.stop >= 0 else 0
        while piece.stop < 0 or place < piece.stop:
            line += 1
            try:
                content, size = _read_line(opened, _LINE_PER_TEXT * reading.longest)
            except _BROKEN as error:
                yield _broken_file(piece.file, before.lines + line, error)
                return
            place += size
            if not size:
                return
            row: str | BadRow = _too_long(piece.file, line, reading)
            if content is not None:
                row = _parse(content, reading, piece.file, line)
            # Lines are counted from the file's start only where one has to be named.
            yield row._replace(line=before.lines + line) if isinstance(row, BadRow) else row


def _read_line(opened: BinaryIO, longest: int) -> tuple[bytes | None, int]:
    """A line and its bytes; None in place of one that is too long to be kept in memory."""
    line = opened.readline(longest)
    size = len(line)
    if size < longest or line.endswith(b"\n"):
        return line, size
    while rest := opened.readline(1 << 20):
        size += len(rest)
        if rest.endswith(b"\n"):
            break
    return None, size


class _Before:
    """How many lines a file has before a piece, counted when it is asked for."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self._lines = 0 if piece.start == 0 else None

    @property
    def lines(self) -> int:
        if self._lines is None:
            self._lines = 0
            with open(self._piece.file, "rb") as opened:
                opened_bytes = self._piece.start - 1
                while opened_bytes and (content := opened.read(min(1 << 20, opened_bytes))):
                    self._lines += content.count(b"\n")
                    opened_bytes -= len(content)
                opened.seek(self._piece.start - 1)
                self._lines += opened.readline().endswith(b"\n")
        return self._lines


def _parse(content: bytes, reading: Reading, file: str, line: int) -> str | BadRow:
    if not content.strip():
        return BadRow("empty", file, line, "the line is empty")
    try:
        row = json.loads(content.decode())
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", file, line, f"the line is not UTF-8 ({error.reason})")
    except (ValueError, RecursionError) as error:
        return BadRow("broken_json", file, line, f"the line is not JSON ({error})")
    return _column_of(row, reading, file, line)


def _column_of(row: Any, reading: Reading, file: str, line: int) -> str | BadRow:
    if not isinstance(row, dict):
        return BadRow("broken_json", file, line, f"the row is {type(row).__name__}, not an object")
    if reading.column not in row:
        return _missing(list(row), reading, file, line)
    return text_of(row[reading.column], reading, file, line)


def _read_list(piece: Piece, reading: Reading) -> Iterator[str | BadRow]:
    try:
        with _open(piece.file) as opened:
            rows = json.loads(opened.read().decode())
    except _BROKEN as error:
        yield _broken_file(piece.file, 1, error)
        return
    except (ValueError, RecursionError) as error:
        yield BadRow("broken_json", piece.file, getattr(error, "lineno", 1), f"the file is not JSON ({error})")
        return
    for number, row in enumerate(rows, 1):
        yield _column_of(row, reading, piece.file, number)


def _read_parquet(piece: Piece, reading: Reading) -> Iterator[str | BadRow]:
    try:
        file = pq.ParquetFile(piece.file, page_checksum_verification=True)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except _BROKEN as error:
        yield _broken_file(piece.file, 1, error)
        return
    names = file.schema_arrow.names
    with file:
        for group in range(piece.start, len(sizes) if piece.stop < 0 else piece.stop):
            row, end = sum(sizes[:group]), sum(sizes[: group + 1])
            if reading.column not in names:
                yield _missing(names, reading, piece.file, row + 1, end - row)
                continue
            batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[reading.column])
            yield from _read_batches(batches, reading, piece.file, row, end)


def _read_arrow(piece: Piece, reading: Reading) -> Iterator[str | BadRow]:
    try:
        mapped = pa.memory_map(piece.file)
        row, batches = 0, _arrow_stream(mapped, piece)
        if batches is None:
            file = pa.ipc.open_file(mapped)
            row = sum(file.get_batch(i).num_rows for i in range(piece.start))
            batches = map(file.get_batch, range(piece.start, file.num_record_batches if piece.stop < 0 else piece.stop))
    except _BROKEN as error:
        yield _broken_file(piece.file, 1, error)
        return
    yield from _read_batches(batches, reading, piece.file, row, None)


def _arrow_stream(mapped: Any, piece: Piece) -> Iterator[Any] | None:
    """Batches of the streaming format, in which `datasets` keeps its own; None for the other format."""
    if piece.stop >= 0:
        return None
    try:
        return iter(pa.ipc.open_stream(mapped))
    except pa.ArrowInvalid:
        mapped.seek(0)
        return None


def _read_batches(
    batches: Iterator[Any], reading: Reading, file: str, row: int, end: int | None
) -> Iterator[str | BadRow]:
    """Rows of record batches, of which the first is number `row`, counted from 0."""
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            values = _values(batch, reading)
        except _BROKEN as error:
            lost = 1 if end is None else end - row
            yield BadRow("corrupt", file, row + 1, f"the rows cannot be read from here on ({error})", lost)
            return
        if values is None:
            yield _missing(batch.schema.names, reading, file, row + 1, batch.num_rows)
            row += batch.num_rows
            continue
        for value in values:
            row += 1
            yield text_of(value, reading, file, row)


def _values(batch: Any, reading: Reading) -> list[Any] | None:
    """A column as bytes, which may not be UTF-8, or as what it is, if it is no text."""
    if reading.column not in batch.schema.names:
        return None
    column = batch.column(reading.column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type):
        column = column.view(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.view(pa.large_binary())
    elif pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    column.validate(full=True)
    return column.to_pylist()
