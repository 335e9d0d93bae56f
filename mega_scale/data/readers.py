"""Read local files range by range: texts and bad rows in order, never a file as a whole in memory.

A range is a part of a file that can be read on its own: bytes of a plain jsonl file, row groups of a parquet file,
record batches of an arrow file; else the whole file. A damage costs as few rows as the format, or pyarrow, allows.
"""

import contextlib
import functools
import json
import os
import re
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mega_scale.data.compression import DamageError, FileBytes, file_kind
from mega_scale.data.rows import BadRow, Cause, Rows, TextColumn

BROKEN = (EOFError, OSError, UnicodeError, pa.ArrowException)
"""What pyarrow raises for a file or column that is damaged."""

# JSON writes a byte of text as six characters at most, and a row may have other columns.
_LINE_PER_TEXT = 8
_MARK = "\ufeff".encode()
_OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_SPACE = re.compile(r"[ \t\n\r]*")
_ROWS_AT_ONCE = 256
# pyarrow's words for a file that was cut
_CUT = (
    "truncated", "end-of-stream", "expected to be able to read", "expected to read", "or length 0", "size is 0 bytes",
)  # fmt: skip


class FileRange(NamedTuple):
    """A part of a file.

    Args:
        file: Absolute name, or the name of what is no file.
        start: First byte, row group, record batch or row; 0 for a whole file.
        stop: After the last one; -1 is the end of the file.
        size: Bytes on disk.
    """

    file: str
    start: int
    stop: int
    size: int

    @property
    def numbers(self) -> range | None:
        """Numbers of row groups or record batches; None for all."""
        return None if self.stop < 0 else range(self.start, self.stop)


def split_file(file: str, source: str, size: int | None) -> list[FileRange]:
    """Split a file into ranges of about `size` bytes, in order; None, or a file that cannot be split, gives one."""
    try:
        total = os.path.getsize(file)
    except OSError:  # reading it will say what is wrong
        total = 0
    whole = [FileRange(file, 0, -1, total)]
    if size is None or total <= size:
        return whole
    if source == "json" and _has_lines(file):
        stops = [*range(size, total, size), total]
        return [FileRange(file, start, stop, stop - start) for start, stop in zip([0, *stops], stops, strict=False)]
    try:
        if source == "parquet":
            count = pq.ParquetFile(file).num_row_groups
        elif source == "arrow":
            with pa.memory_map(file) as mapped:
                count = pa.ipc.open_file(mapped).num_record_batches
        else:
            return whole
    except BROKEN:
        return whole
    step = max(1, count * size // total)
    return [
        FileRange(file, first, min(first + step, count), total * min(step, count - first) // count)
        for first in range(0, count, step)
    ]


def read_range(part: FileRange, source: str, column: TextColumn) -> Rows:
    """Read the rows of a range of `split_file` in order; `source` is text, json, parquet or arrow."""
    return {"text": _read_text, "json": _read_json, "parquet": _read_parquet, "arrow": _read_arrow}[source](
        part, column
    )


def _damaged(file: str, line: int, damage: DamageError) -> BadRow:
    unknown = "; how much is missing is not known, so the whole file counts" if damage.lost is None else ""
    detail = f"the file cannot be read from here on ({damage}){unknown}"
    return BadRow(damage.cause, file, line, detail, lost=damage.lost)


def _encoding(head: bytes) -> str | None:
    """The encoding of a file by its byte order mark, unless it is UTF-8."""
    return next((name for mark, name in _OTHER_MARKS.items() if head.startswith(mark)), None)


def _not_utf8(part: FileRange, encoding: str) -> BadRow:
    detail = f"the file is {encoding} by its byte order mark, not utf-8: convert it"
    return BadRow("not_utf8", part.file, 1, detail, lost=part.size)


def _read_all(opened: FileBytes, most: int = -1) -> tuple[bytes, DamageError | None]:
    """What can be read, up to `most` bytes, and what is wrong after it."""
    found = bytearray()
    try:
        while (most < 0 or len(found) < most) and (content := opened.read1(1 << 20)):
            found += content
    except DamageError as damage:
        return bytes(found), damage
    return bytes(found if most < 0 else found[:most]), None


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
    yield _one_text(content.removeprefix(_MARK), part, column)
    if damage is not None:
        yield _damaged(part.file, 1, damage)


def _one_text(content: bytes, part: FileRange, column: TextColumn) -> str | BadRow:
    if (encoding := _encoding(content)) is not None:
        return _not_utf8(part, encoding)
    if content.count(0) * 4 > len(content):
        detail = "the file is no text: it holds NUL bytes, as UTF-16 without a mark and binary files do"
        return BadRow("not_utf8", part.file, 1, detail, lost=part.size)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if error.start < column.max_bytes - 3:  # else a character may only have been cut
            line = content.count(b"\n", 0, error.start) + 1
            return BadRow("not_utf8", part.file, line, f"the text is not UTF-8 ({error})", lost=part.size)
    if len(content) > column.max_bytes:
        return column.too_long(part.file, 1)
    found = column.text(content, part.file, 1)
    return found.replace("\r\n", "\n").replace("\r", "\n") if isinstance(found, str) else found


# JSON: one object a line, or a list of objects


def _has_lines(file: str) -> bool:
    """Whether a file of JSON can be cut anywhere and read from the next line on."""
    try:
        with FileBytes(file) as opened:
            head = opened.read(64)
            return not (opened.is_compressed or _encoding(head) or _is_list(head))
    except DamageError:
        return False


def _is_list(head: bytes) -> bool:
    return head.removeprefix(_MARK).lstrip()[:1] == b"["


def _read_json(part: FileRange, column: TextColumn) -> Rows:
    line, before = 0, functools.cache(lambda: _lines_before(part))  # counted only when a line has to be named
    try:
        with FileBytes(part.file, part.size if part.stop < 0 else None) as opened:
            head = b"" if part.start else opened.peek(64)
            if (encoding := _encoding(head)) is not None:
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
    place = opened.tell() if part.stop >= 0 else 0
    while part.stop < 0 or place < part.stop:
        content, size = _read_line(opened, _LINE_PER_TEXT * column.max_bytes)
        if not size:
            if part.stop >= 0:
                raise DamageError("truncated_file", "the file became shorter while it was read", part.stop - place)
            return
        place += size
        row = _parse(content, column, part.file) if content is not None else column.too_long(part.file, 0)
        if isinstance(row, BadRow) and row.cause in ("broken_json", "not_utf8"):
            row = row._replace(lost=opened.on_disk(size))
        yield row


def _read_line(opened: FileBytes, longest: int) -> tuple[bytes | None, int]:
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
    number, place, decoder = 0, text.index("[") + 1, json.JSONDecoder()
    try:
        while (place := _skip_space(text, place)) < len(text) and text[place] != "]":
            row, place = decoder.raw_decode(text, place)
            number += 1
            yield column.of_object(row, part.file, number)
            place = _skip_space(text, place)
            if text[place : place + 1] == ",":
                place += 1
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        if place == len(text):
            raise json.JSONDecodeError("Expecting ']'", text, place)
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
        for group in part.numbers or range(len(sizes)):
            first, end = sum(sizes[:group]), sum(sizes[: group + 1])
            if path is None:
                yield column.missing(schema.names, part.file, first + 1, end - first)
                continue
            for row in _read_group(opened, group, path, column, part.file, first, end):
                if isinstance(row, BadRow) and row.lost:
                    row = row._replace(lost=mapped.size() * row.rows // sum(sizes))  # noqa: PLW2901
                yield row


def _read_group(opened: Any, group: int, path: list[str], column: TextColumn, file: str, first: int, end: int) -> Rows:
    """Rows `first` to below `end` of the file, counted from 0, which are those of a row group."""
    row, error = first, None
    for at_once in (_ROWS_AT_ONCE, 1):  # one by one up to the damage, if there is one
        number = first
        try:
            for batch in opened.iter_batches(at_once, row_groups=[group], columns=[".".join(path)]):
                number += batch.num_rows
                if number > row:
                    yield from _texts(batch, path, column, file, row)
                    row = number
        except BROKEN as found:
            error = found
        else:
            break
    if row < end:
        words = "fewer rows than the file says" if error is None else _words(error)
        yield BadRow("corrupt", file, row + 1, f"the rows cannot be read from here on ({words})", end - row, lost=1)


def _read_arrow(part: FileRange, column: TextColumn) -> Rows:
    """Rows of an arrow file, or of a stream, in which `datasets` keeps its own."""
    try:
        mapped = pa.memory_map(part.file)
        if mapped.read(6) != b"ARROW1":
            mapped.seek(0)
            yield from _read_stream(mapped, column, part.file)
            return
        try:
            opened = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:  # cut, so that its index is missing: all before that is a stream
            mapped.seek(8)
            yield from _read_stream(mapped, column, part.file)
            return
    except BROKEN as error:
        yield _broken_file(part.file, 1, error)
        return
    row, wanted = 0, part.numbers or range(opened.num_record_batches)
    for number in range(wanted.stop):
        try:
            batch = opened.get_batch(number)
        except BROKEN as error:
            if number in wanted:
                lost = mapped.size() // opened.num_record_batches
                detail = f"a record batch cannot be read ({_words(error)})"
                yield BadRow("corrupt", part.file, row + 1, detail, lost=lost)
            continue
        if number in wanted:
            yield from _texts(batch, column_path(batch.schema, column), column, part.file, row)
        row += batch.num_rows


def _read_stream(mapped: Any, column: TextColumn, file: str) -> Rows:
    row, place = 0, 0
    try:
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
        return [_plain_value(column.slice(i, 1)) for i in range(len(column))]


def _plain_value(column: Any) -> Any:
    try:
        return _plain_values(column)[0]
    except BROKEN as error:
        return error


def _plain_values(column: Any) -> list[Any]:
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.cast(column.type.storage_type)
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


def _broken_file(file: str, line: int, error: Exception, place: int = 0, magic: bytes = b"") -> BadRow:
    """A file that cannot be read from byte `place` on; one that begins, but does not end, with its `magic` was cut."""
    size, kind, cut = 0, None, any(words in str(error).lower() for words in _CUT)
    try:
        with open(file, "rb") as opened:
            head = opened.read(512)
            size = opened.seek(0, 2)
            opened.seek(max(size - len(magic), 0))
            cut = cut or bool(magic and head.startswith(magic) and opened.read() != magic)
            kind = file_kind(head)
    except OSError:
        pass
    detail = _words(error)
    foreign = not place and kind not in (None, "parquet" if magic else "arrow")
    if foreign:
        cut, detail = False, f"it is a {kind} file"
    cause: Cause = "truncated_file" if cut else "corrupt"
    if foreign or (not cut and getattr(error, "errno", None)):
        cause = "unreadable"
    lost = None if cut or not size else size - place
    return BadRow(cause, file, line, f"the file cannot be read from here on ({detail})", lost=lost)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
