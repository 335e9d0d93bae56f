"""Read local files range by range: texts and unusable rows in order, never a file as a whole in memory.

A range is a part of a file that can be read on its own: bytes of a plain jsonl file, row groups of a parquet file,
record batches of an arrow file; else the whole file. A damage costs as few rows as the format, or pyarrow, allows.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mega_scale.data.compression import DamageError, FileBytes, describe, file_kind
from mega_scale.data.config import Damage, FileRange

BROKEN = (EOFError, OSError, UnicodeError, pa.ArrowException)
"""What pyarrow raises for a file or column that is damaged."""

Cause = Damage | Literal["not_utf8", "missing_column", "not_text", "empty", "too_long", "broken_json"]

_LINE_PER_TEXT = 8  # JSON writes a byte of text as six characters at most, and a row may have other columns
_NAMED_COLUMNS = 20
_MARK = "\ufeff".encode()
_OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_SPACE = re.compile(r"[ \t\n\r]*")
_ROWS_AT_ONCE = 256
# pyarrow's words for a file that was cut
_CUT = (
    "truncated", "end-of-stream", "expected to be able to read", "expected to read", "or length 0", "size is 0 bytes",
)  # fmt: skip


class BadRow(NamedTuple):
    """One row, or several with the same cause, that cannot be used.

    `line` is the line, or the number of the row, from 1. `lost` are the bytes of the file that could not be read, None
    if nobody knows, as the file was cut.
    """

    cause: Cause
    file: str
    line: int
    detail: str
    rows: int = 1
    lost: int | None = 0

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.detail}"


Rows: TypeAlias = Iterator[str | BadRow]


class TextColumn(NamedTuple):
    """The column that holds the text, and the longest text in UTF-8 bytes.

    Dots in the name lead into columns of columns, unless a column has the whole name.
    """

    name: str
    max_bytes: int

    def text(self, value: Any, file: str, line: int) -> str | BadRow:
        """Take a value of the column as text, without a byte order mark; an exception stands for a corrupt row."""
        if isinstance(value, Exception):
            return BadRow("corrupt", file, line, f"the row cannot be read ({describe(value)})")
        if value is None:
            return BadRow("empty", file, line, "the text is empty")
        if not isinstance(value, str | bytes):
            kind = type(value).__name__
            return BadRow("not_text", file, line, f"data.text_column={self.name!r} holds {kind}, not text")
        if len(value) > self.max_bytes + 3:
            return self.too_long(file, line)
        try:
            # A str may hold half a surrogate pair, which no UTF-8 has; encoding finds it.
            text = (value.decode() if isinstance(value, bytes) else value).removeprefix("\ufeff")
            size = len(text.encode())
        except UnicodeError as error:
            return BadRow("not_utf8", file, line, f"the text is not UTF-8 ({error})")
        if not text:
            return BadRow("empty", file, line, "the text is empty")
        return text if size <= self.max_bytes else self.too_long(file, line)

    def too_long(self, file: str, line: int) -> BadRow:
        """A row whose text is too long."""
        return BadRow("too_long", file, line, f"the text is longer than data.max_document_bytes={self.max_bytes}")

    def missing(self, columns: Sequence[str], file: str, line: int, rows: int = 1) -> BadRow:
        """Rows that lack the column, or that have several of its name."""
        names = ", ".join(columns[:_NAMED_COLUMNS]).encode(errors="backslashreplace").decode() or "none"
        if len(columns) > _NAMED_COLUMNS:
            names += f" and {len(columns) - _NAMED_COLUMNS} more"
        detail = f"there is no column data.text_column={self.name!r}, only {names}"
        if (same := columns.count(self.name)) > 1:
            detail = f"{same} columns have the name data.text_column={self.name!r}, of {names}: rename all but one"
        return BadRow("missing_column", file, line, detail, rows)

    def of_object(self, row: Any, file: str, line: int) -> str | BadRow:
        """The text of a JSON value that should be an object with this column."""
        if not isinstance(row, Mapping):
            return BadRow("broken_json", file, line, f"the row is {type(row).__name__}, not an object")
        value: Any = row
        for name in [self.name] if self.name in row else self.name.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return self.missing(list(row), file, line)
            value = value[name]
        return self.text(value, file, line)


def split_file(file: str, source: str, size: int | None) -> list[FileRange]:
    """Split a file into ranges of about `size` bytes, in order; None, or a file that cannot be split, gives one."""
    try:
        total = os.path.getsize(file)
    except OSError:  # reading it will say what is wrong
        total = 0
    whole = [FileRange(file, 0, -1, total)]
    if size is None or total <= size:
        return whole
    try:
        if source == "json":
            with FileBytes(file) as opened:
                head = opened.read(64)
                if opened.kind or _other_encoding(head) or _is_list(head):
                    return whole
            stops = [*range(size, total, size), total]
            return [FileRange(file, start, stop, stop - start) for start, stop in zip([0, *stops], stops, strict=False)]
        if source == "parquet":
            count = pq.ParquetFile(file).num_row_groups
        elif source == "arrow":
            with pa.memory_map(file) as mapped:
                count = pa.ipc.open_file(mapped).num_record_batches
        else:
            return whole
    except (DamageError, *BROKEN):
        return whole
    step = max(1, count * size // total)
    return [
        FileRange(file, first, min(first + step, count), total * min(step, count - first) // count)
        for first in range(0, count, step)
    ]


def read_range(part: FileRange, source: str, column: TextColumn) -> Rows:
    """Read the rows of a range of `split_file` in order; `source` is text, json, parquet or arrow."""
    readers = {"text": _read_text, "json": _read_json, "parquet": _read_parquet, "arrow": _read_arrow}
    return readers[source](part, column)


def _damaged(file: str, line: int, damage: DamageError) -> BadRow:
    unknown = "; how much is missing is not known, so the whole file counts" if damage.lost is None else ""
    detail = f"the file cannot be read from here on ({damage}){unknown}"
    return BadRow(damage.cause, file, line, detail, lost=damage.lost)


def _other_encoding(head: bytes) -> str | None:
    """The encoding of a file by its byte order mark, unless it is UTF-8."""
    return next((name for mark, name in _OTHER_MARKS.items() if head.startswith(mark)), None)


def _not_utf8(part: FileRange, encoding: str) -> BadRow:
    detail = f"the file is {encoding} by its byte order mark, not utf-8: convert it"
    return BadRow("not_utf8", part.file, 1, detail, lost=part.size)


def _read_all(opened: FileBytes, most: int | None = None) -> tuple[bytes, DamageError | None]:
    """What can be read, up to `most` bytes, and what is wrong after it."""
    found = bytearray()
    try:
        while (most is None or len(found) < most) and (content := opened.read1(1 << 20)):
            found += content
    except DamageError as damage:
        return bytes(found), damage
    return bytes(found[:most]), None


# Text: one document a file


def _read_text(part: FileRange, column: TextColumn) -> Rows:
    try:
        with FileBytes(part.file, part.size) as opened:
            content, damage = _read_all(opened, column.max_bytes + len(_MARK) + 1)
    except DamageError as error:
        content, damage = b"", error
    if damage is not None and not damage.complete:  # half a document is none
        yield _damaged(part.file, 1, damage)._replace(lost=None if damage.lost is None else part.size)
        return
    content = content.removeprefix(_MARK)
    found = column.text(content, part.file, 1) if len(content) <= column.max_bytes else column.too_long(part.file, 1)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if error.start < column.max_bytes - 3:  # else a character may only have been cut
            line = content.count(b"\n", 0, error.start) + 1
            found = BadRow("not_utf8", part.file, line, f"the text is not UTF-8 ({error})", lost=part.size)
    if content.count(0) * 4 > len(content):
        detail = "the file is no text: it holds NUL bytes, as UTF-16 without a mark and binary files do"
        found = BadRow("not_utf8", part.file, 1, detail, lost=part.size)
    if (encoding := _other_encoding(content)) is not None:
        found = _not_utf8(part, encoding)
    yield found.replace("\r\n", "\n").replace("\r", "\n") if isinstance(found, str) else found
    if damage is not None:
        yield _damaged(part.file, 1, damage)


# JSON: one object a line, or a list of objects


def _is_list(head: bytes) -> bool:
    return head.removeprefix(_MARK).lstrip()[:1] == b"["


def _read_json(part: FileRange, column: TextColumn) -> Rows:
    line, before = 0, functools.cache(lambda: _lines_before(part))  # counted only when a line has to be named
    try:
        with FileBytes(part.file, part.size if part.stop < 0 else None) as opened:
            head = b"" if part.start else opened.peek(64)
            if (encoding := _other_encoding(head)) is not None:
                yield _not_utf8(part, encoding)
            elif _is_list(head):
                yield from _read_list(opened, part, column)
            else:
                for found in _read_lines(opened, part, column):
                    line += 1
                    yield found._replace(line=before() + line) if isinstance(found, BadRow) else found
    except DamageError as damage:
        row = _damaged(part.file, before() + line + 1, damage)
        could_not_open = damage.lost == 0 and not damage.complete
        yield row._replace(lost=part.size) if could_not_open else row


def _read_lines(opened: FileBytes, part: FileRange, column: TextColumn) -> Rows:
    """Rows of a range, whose line is filled in by the caller."""
    if part.start:
        opened.seek(part.start - 1)
        opened.readline()  # the line that the start cuts belongs to the range before
    place, longest = opened.tell() if part.stop >= 0 else 0, _LINE_PER_TEXT * column.max_bytes
    while part.stop < 0 or place < part.stop:
        content = opened.readline(longest)
        if not content:
            if part.stop >= 0:
                raise DamageError("truncated_file", "the file became shorter while it was read", part.stop - place)
            return
        size = len(content)
        if size < longest or content.endswith(b"\n"):
            row = _parse(content, column, part.file)
        else:  # not kept in memory
            while (rest := opened.readline(1 << 20)) and not rest.endswith(b"\n"):
                size += len(rest)
            size += len(rest)
            row = column.too_long(part.file, 0)
        place += size
        if isinstance(row, BadRow) and row.cause in ("broken_json", "not_utf8"):
            row = row._replace(lost=opened.on_disk(size))
        yield row


def _lines_before(part: FileRange) -> int:
    """How many lines a file has before a range; 0 if it is gone."""
    if not part.start:
        return 0
    found, left = 0, part.start - 1
    with contextlib.suppress(OSError), open(part.file, "rb") as opened:
        while left and (content := opened.read(min(1 << 20, left))):
            found += content.count(b"\n")
            left -= len(content)
        opened.seek(part.start - 1)
        found += opened.readline().endswith(b"\n")
    return found


def _parse(content: bytes, column: TextColumn, file: str) -> str | BadRow:
    """The text of a line of JSON."""
    content = content.removeprefix(_MARK)  # also where files with marks were joined
    if not content.strip():
        return BadRow("empty", file, 0, "the line is empty")
    try:
        row = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        encoding = error.reason if isinstance(error, UnicodeDecodeError) else None
        if not content.endswith(b"\n") and encoding in (None, "unexpected end of data"):
            detail = "the file ends within a line, so the whole file counts: more may be missing"
            return BadRow("truncated_file", file, 0, f"{detail}; it is not JSON ({error})", lost=None)
        if encoding is not None:
            return BadRow("not_utf8", file, 0, f"the line is not UTF-8 ({encoding})")
        return BadRow("broken_json", file, 0, f"the line is not JSON ({error})")
    return column.of_object(row, file, 0)


def _read_list(opened: FileBytes, part: FileRange, column: TextColumn) -> Rows:
    """Rows of one list, up to where it is broken."""
    content, damage = _read_all(opened)
    try:
        text = content.removeprefix(_MARK).decode(errors="strict" if damage is None else "ignore")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield BadRow("not_utf8", part.file, line, f"the file is not UTF-8 ({error})", lost=part.size)
        return
    number, place, decoder = 0, _skip_space(text, text.index("[") + 1), json.JSONDecoder()
    try:
        while text[place : place + 1] != "]":
            if place == len(text):
                raise json.JSONDecodeError("Expecting ']'", text, place)
            row, place = decoder.raw_decode(text, place)
            number += 1
            yield column.of_object(row, part.file, number)
            place = _skip_space(text, place)
            if text[place : place + 1] == ",":
                place = _skip_space(text, place + 1)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        if (place := _skip_space(text, place + 1)) != len(text):
            raise json.JSONDecodeError("Expecting the end of the file", text, place)
    except (ValueError, RecursionError) as error:
        if damage is None:
            cut = not text.rstrip().endswith("]")
            lost = None if cut else -(-part.size * (len(text) - place) // len(text))
            damage = DamageError("truncated_file" if cut else "broken_json", f"it is not JSON: {error}", lost)
    if damage is not None:
        yield _damaged(part.file, number + 1, damage)


def _skip_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


# Parquet and arrow


def _read_parquet(part: FileRange, column: TextColumn) -> Rows:
    try:
        mapped = pa.memory_map(part.file)
        opened = pq.ParquetFile(mapped, page_checksum_verification=True)
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        schema = opened.schema_arrow
        path = column_path(schema, column)
    except BROKEN as error:
        yield _broken_file(part.file, 1, error, magic=b"PAR1")
        return
    with opened:
        for group in range(part.start, part.stop if part.stop >= 0 else len(sizes)):
            row, end = sum(sizes[:group]), sum(sizes[: group + 1])
            if path is None:
                yield column.missing(schema.names, part.file, row + 1, end - row)
                continue
            words = "fewer rows than the file says"
            for at_once in (_ROWS_AT_ONCE, 1):  # one by one up to the damage, if there is one
                number = sum(sizes[:group])
                try:
                    for batch in opened.iter_batches(at_once, row_groups=[group], columns=[".".join(path)]):
                        number += batch.num_rows
                        if number > row:
                            yield from _texts(batch, path, column, part.file, row)
                            row = number
                    break
                except BROKEN as error:
                    words = describe(error)
            if row < end:
                detail = f"the rows cannot be read from here on ({words})"
                lost = mapped.size() * (end - row) // sum(sizes)
                yield BadRow("corrupt", part.file, row + 1, detail, end - row, lost)


def _read_arrow(part: FileRange, column: TextColumn) -> Rows:
    """Rows of an arrow file, or of a stream, in which `datasets` keeps its own."""
    try:
        mapped = pa.memory_map(part.file)
        is_file, opened = mapped.read(6) == b"ARROW1", None
        if is_file:
            with contextlib.suppress(pa.ArrowInvalid):  # cut, so that its index is missing: all before is a stream
                opened = pa.ipc.open_file(mapped)
    except BROKEN as error:
        yield _broken_file(part.file, 1, error)
        return
    if opened is None:
        yield from _read_stream(mapped, 8 if is_file else 0, column, part.file)
        return
    row, wanted = 0, range(part.start, part.stop if part.stop >= 0 else opened.num_record_batches)
    for number in range(wanted.stop):
        try:
            batch = opened.get_batch(number)
        except BROKEN as error:
            if number in wanted:
                lost = mapped.size() // opened.num_record_batches
                detail = f"a record batch cannot be read ({describe(error)})"
                yield BadRow("corrupt", part.file, row + 1, detail, lost=lost)
            continue
        if number in wanted:
            yield from _texts(batch, column_path(batch.schema, column), column, part.file, row)
        row += batch.num_rows


def _read_stream(mapped: Any, begin: int, column: TextColumn, file: str) -> Rows:
    row, place = 0, 0
    try:
        mapped.seek(begin)
        stream = pa.ipc.open_stream(mapped)
        path = column_path(stream.schema, column)
        while True:
            place = mapped.tell()
            batch = stream.read_next_batch()
            yield from _texts(batch, path, column, file, row)
            row += batch.num_rows
    except StopIteration:
        return
    except BROKEN as error:
        yield _broken_file(file, row + 1, error, place)


def column_path(schema: Any, column: TextColumn) -> list[str] | None:
    """Find a column by its name, or by names joined by dots; None if there is none, or several."""
    if column.name in schema.names:
        return [column.name] if schema.names.count(column.name) == 1 else None
    fields, path = list(schema), column.name.split(".")
    for name in path:
        found = [field for field in fields if field.name == name]
        if len(found) != 1:
            return None
        kind = found[0].type
        fields = [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    return path


def _texts(batch: Any, path: list[str] | None, column: TextColumn, file: str, row: int) -> Rows:
    """Rows of a batch, of which the first is number `row`, counted from 0."""
    if path is None:
        yield column.missing(batch.schema.names, file, row + 1, batch.num_rows)
        return
    for number, value in enumerate(column_values(batch, path), row + 1):
        yield column.text(value, file, number)


def column_values(batch: Any, path: list[str]) -> list[Any]:
    """Values of a column of a record batch or table, found by `column_path`.

    Texts are bytes, which may not be UTF-8; other values are as they are; an exception stands for a corrupt row.
    """
    column = batch.column(path[0])
    if path[1:]:
        column = pc.struct_field(column, path[1:])
    try:
        return _plain_values(column)
    except BROKEN:
        found: list[Any] = []
        for i in range(len(column)):
            try:
                found += _plain_values(column.slice(i, 1))
            except BROKEN as error:
                found.append(error)
        return found


def _plain_values(column: Any) -> list[Any]:
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.cast(column.type.storage_type)
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.type in (pa.string(), pa.large_string()):
        column = column.view(pa.binary() if column.type == pa.string() else pa.large_binary())
    elif pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    column.validate(full=True)
    found: list[Any] = column.to_pylist()
    return found


def _broken_file(file: str, line: int, error: Exception, place: int = 0, magic: bytes = b"") -> BadRow:
    """A file that cannot be read from byte `place` on; one that begins, but does not end, with its `magic` was cut."""
    size, kind, cut = 0, None, any(words in str(error).lower() for words in _CUT)
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        head = opened.read(512)
        size = opened.seek(0, 2)
        opened.seek(max(size - len(magic), 0))
        cut = cut or bool(magic and head.startswith(magic) and opened.read() != magic)
        kind = file_kind(head)
    detail = describe(error)
    foreign = not place and kind not in (None, "parquet" if magic else "arrow")
    if foreign:
        cut, detail = False, f"it is a {kind} file"
    cause: Cause = "truncated_file" if cut else "corrupt"
    if foreign or (not cut and getattr(error, "errno", None)):
        cause = "unreadable"
    lost = None if cut or not size else size - place
    return BadRow(cause, file, line, f"the file cannot be read from here on ({detail})", lost=lost)
