"""Rows of parquet and arrow files; what is damaged costs as few of them as pyarrow allows."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mega_scale.data.bad_rows import BadRow, Cause
from mega_scale.data.text_rows import Reading, missing, text_of

BROKEN = (EOFError, OSError, UnicodeError, pa.ArrowException)
_ROWS_AT_ONCE = 256
_CUT = (
    "truncated",
    "end-of-stream",
    "expected to be able to read",
    "expected to read",
    "or length 0",
    "size is 0 bytes",
)


def read_parquet(file: str, groups: range | None, reading: Reading) -> Iterator[str | BadRow]:
    """Read rows of a parquet file in order.

    Args:
        file: Its name.
        groups: Numbers of the row groups; None takes all.
        reading: How rows become texts.

    Returns:
        A text, or what is wrong with the row.
    """
    try:
        mapped = pa.memory_map(file)
        opened = pq.ParquetFile(mapped, page_checksum_verification=True)
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        schema = opened.schema_arrow
        path = column_path(schema, reading.column)
    except BROKEN as error:
        yield broken_file(file, 1, error, ends=b"PAR1")
        return
    with opened:
        for group in groups or range(len(sizes)):
            row, end = sum(sizes[:group]), sum(sizes[: group + 1])
            if path is None:
                yield missing(schema.names, reading, file, row + 1, end - row)
                continue
            for found in _read_group(opened, group, path, reading, file, row, end):
                lost = mapped.size() * found.rows // sum(sizes) if isinstance(found, BadRow) and found.lost else 0
                yield found._replace(lost=lost) if isinstance(found, BadRow) else found


def _read_group(
    opened: Any, group: int, path: list[str], reading: Reading, file: str, row: int, end: int
) -> Iterator[str | BadRow]:
    """Rows of a group, of which the first is number `row`, counted from 0."""
    first, error = row, None
    for at_once in (_ROWS_AT_ONCE, 1):  # one by one up to the damage, where there is one
        number = first
        try:
            for batch in opened.iter_batches(at_once, row_groups=[group], columns=[".".join(path)]):
                number += batch.num_rows
                if number > row:
                    yield from _texts(batch, path, reading, file, row)
                    row = number
        except BROKEN as found:
            error = found
        else:
            break
    if row < end:
        detail = f"the rows cannot be read from here on ({_words(error)})"
        yield BadRow("corrupt", file, row + 1, detail, end - row, lost=1)


def read_arrow(file: str, batches: range | None, reading: Reading) -> Iterator[str | BadRow]:
    """Read rows of an arrow file, or of a stream, in which `datasets` keeps its own; see `read_parquet`."""
    try:
        mapped = pa.memory_map(file)
        if mapped.read(6) != b"ARROW1":
            mapped.seek(0)
            yield from _read_stream(mapped, reading, file)
            return
        try:
            opened = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:  # cut, so that its index is missing: a stream is all that it holds before that
            mapped.seek(8)
            yield from _read_stream(mapped, reading, file)
            return
    except BROKEN as error:
        yield broken_file(file, 1, error)
        return
    row = 0
    for number in range(opened.num_record_batches if batches is None else batches.stop):
        try:
            batch = opened.get_batch(number)
        except BROKEN as error:
            if batches is None or number in batches:
                lost = mapped.size() // opened.num_record_batches
                yield BadRow("corrupt", file, row + 1, f"a record batch cannot be read ({_words(error)})", lost=lost)
            continue
        if batches is None or number in batches:
            yield from _texts(batch, column_path(batch.schema, reading.column), reading, file, row)
        row += batch.num_rows


def _read_stream(mapped: Any, reading: Reading, file: str) -> Iterator[str | BadRow]:
    row, place, path = 0, 0, None
    try:
        stream = pa.ipc.open_stream(mapped)
        path = column_path(stream.schema, reading.column)
        while True:
            place = mapped.tell()
            batch = stream.read_next_batch()
            yield from _texts(batch, path, reading, file, row)
            row += batch.num_rows
    except StopIteration:
        return
    except BROKEN as error:
        yield broken_file(file, row + 1, error, place)


def column_path(schema: Any, column: str) -> list[str] | None:
    """Find a column by its name, or by names joined by dots; None where there is none, or several."""
    if column in schema.names:
        return [column] if schema.names.count(column) == 1 else None
    fields, path = list(schema), column.split(".")
    for name in path:
        found = [field for field in fields if field.name == name]
        if len(found) != 1:
            return None
        kind = found[0].type
        fields = [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    return path


def _texts(batch: Any, path: list[str] | None, reading: Reading, file: str, row: int) -> Iterator[str | BadRow]:
    """Rows of a batch, of which the first is number `row`, counted from 0."""
    if path is None:
        yield missing(batch.schema.names, reading, file, row + 1, batch.num_rows)
        return
    for number, value in enumerate(values_of(batch, path), row + 1):
        yield text_of(value, reading, file, number)


def values_of(batch: Any, path: list[str]) -> list[Any]:
    """Values of a column.

    Args:
        batch: A record batch or table.
        path: Of `column_path`.

    Returns:
        Texts as bytes, which may not be UTF-8; what is no text as it is; an exception for a row that is corrupt.
    """
    column = batch.column(path[0])
    if path[1:]:
        column = pc.struct_field(column, path[1:])
    try:
        return _plain(column)
    except BROKEN:
        return [_value(column.slice(i, 1)) for i in range(len(column))]


def _value(column: Any) -> Any:
    try:
        return _plain(column)[0]
    except BROKEN as error:
        return error


def _plain(column: Any) -> list[Any]:
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column = column.cast(kind.storage_type)
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type):
        column = column.view(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.view(pa.large_binary())
    elif pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    column.validate(full=True)
    return column.to_pylist()


def broken_file(file: str, line: int, error: Exception, place: int = 0, ends: bytes = b"") -> BadRow:
    """What is wrong with a file of which nothing can be read from a place on.

    Args:
        file: Its name.
        line: The first row that is lost, from 1.
        error: What pyarrow says.
        place: Bytes that could be read.
        ends: What a whole file begins and ends with; one that only begins with it was cut.
    """
    size, cut = 0, any(words in str(error).lower() for words in _CUT)
    try:
        with open(file, "rb") as opened:
            begins = ends and opened.read(len(ends)) == ends
            size = opened.seek(0, 2)
            opened.seek(max(size - len(ends), 0))
            cut = cut or bool(begins and opened.read() != ends)
    except OSError:
        pass
    cause: Cause = "truncated_file" if cut else "unreadable" if getattr(error, "errno", None) else "corrupt"
    lost = None if cut or not size else size - place
    return BadRow(cause, file, line, f"the file cannot be read from here on ({_words(error)})", lost=lost)


def _words(error: Exception | None) -> str:
    return "fewer rows than the file says" if error is None else f"{type(error).__name__}: {error}"
