"""Readers of local files: texts and bad rows, piece by piece, never a file as a whole in memory.

A piece is a part of a file that can be read on its own: a range of bytes of a plain jsonl file, row groups of a parquet
file, record batches of an arrow file; else the whole file.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mega_scale.data.bad_rows import BadRow
from mega_scale.data.columnar import BROKEN, read_arrow, read_parquet
from mega_scale.data.compression import DamageError, FileBytes
from mega_scale.data.text_rows import Reading, find, missing, text_of, too_long

# JSON writes a byte of text as six characters at most, and a row may have other columns.
_LINE_PER_TEXT = 8
_MARK = "\ufeff".encode()
_OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_SPACE = re.compile(r"[ \t\n\r]*")


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


def split_file(file: str, source: str, size: int | None) -> list[Piece]:
    """Split a file into pieces of about a size.

    Args:
        file: Absolute name.
        source: "text", "json", "parquet" or "arrow".
        size: Bytes of a piece; None takes the file whole.

    Returns:
        The pieces in order; one for a file that cannot be split, or not be read.
    """
    try:
        total = os.path.getsize(file)
    except OSError:  # reading it will say what is wrong
        total = 0
    whole = [Piece(file, 0, -1, total)]
    if size is None or total <= size:
        return whole
    if source == "json" and _has_lines(file):
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
    except BROKEN:
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
    if source in ("parquet", "arrow"):
        read = read_parquet if source == "parquet" else read_arrow
        return read(piece.file, None if piece.stop < 0 else range(piece.start, piece.stop), reading)
    readers: dict[str, Callable[[Piece, Reading], Iterator[str | BadRow]]] = {"text": _read_text, "json": _read_json}
    return readers[source](piece, reading)


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


def _encoding(head: bytes) -> str | None:
    """What a file is encoded in by its mark, if not in UTF-8."""
    return next((name for mark, name in _OTHER_MARKS.items() if head.startswith(mark)), None)


def _not_utf8(piece: Piece, encoding: str) -> BadRow:
    detail = f"the file is {encoding} by its byte order mark, not utf-8: convert it"
    return BadRow("not_utf8", piece.file, 1, detail, lost=piece.size)


def _damaged(file: str, line: int, damage: DamageError) -> BadRow:
    unknown = "; how much is missing is not known, so the whole file counts" if damage.lost is None else ""
    detail = f"the file cannot be read from here on ({damage}){unknown}"
    return BadRow(damage.cause, file, line, detail, lost=damage.lost)


def _read_all(opened: FileBytes, most: int = -1) -> tuple[bytes, DamageError | None]:
    """What can be read, up to a size, and what is wrong behind it."""
    found = bytearray()
    try:
        while (most < 0 or len(found) < most) and (content := opened.read1(1 << 20)):
            found += content
    except DamageError as damage:
        return bytes(found), damage
    return bytes(found if most < 0 else found[:most]), None


def _read_text(piece: Piece, reading: Reading) -> Iterator[str | BadRow]:
    try:
        with FileBytes(piece.file, piece.size) as opened:
            content, damage = _read_all(opened, reading.longest + len(_MARK) + 1)
    except DamageError as error:
        content, damage = b"", error
    if damage is not None and not damage.complete:  # half a document is none
        yield _damaged(piece.file, 1, damage)._replace(lost=None if damage.lost is None else piece.size)
        return
    yield _one_text(content.removeprefix(_MARK), piece, reading)
    if damage is not None:
        yield _damaged(piece.file, 1, damage)


def _one_text(content: bytes, piece: Piece, reading: Reading) -> str | BadRow:
    if (encoding := _encoding(content)) is not None:
        return _not_utf8(piece, encoding)
    if content.count(0) * 4 > len(content):
        detail = "the file is no text: it holds NUL bytes, as UTF-16 without a mark and binary files do"
        return BadRow("not_utf8", piece.file, 1, detail, lost=piece.size)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if error.start < reading.longest - 3:  # else a character may only have been cut
            line = content.count(b"\n", 0, error.start) + 1
            return BadRow("not_utf8", piece.file, line, f"the text is not UTF-8 ({error})", lost=piece.size)
    if len(content) > reading.longest:
        return too_long(piece.file, 1, reading)
    found = text_of(content, reading, piece.file, 1)
    return found.replace("\r\n", "\n").replace("\r", "\n") if isinstance(found, str) else found


def _read_json(piece: Piece, reading: Reading) -> Iterator[str | BadRow]:
    before, line = _Before(piece), 0
    try:
        with FileBytes(piece.file, piece.size if piece.stop < 0 else None) as opened:
            head = b"" if piece.start else opened.peek(64)
            if (encoding := _encoding(head)) is not None:
                yield _not_utf8(piece, encoding)
            elif _is_list(head):
                yield from _read_list(opened, piece, reading)
            else:
                for found in _lines(opened, piece, reading):
                    line += 1
                    # Lines are counted from the file's start only where one has to be named.
                    yield found._replace(line=before.lines + line) if isinstance(found, BadRow) else found
    except DamageError as damage:
        yield _damaged(piece.file, before.lines + line + 1, damage)


def _lines(opened: FileBytes, piece: Piece, reading: Reading) -> Iterator[str | BadRow]:
    """Rows of a piece, each with its line counted from 0."""
    if piece.start:
        opened.seek(piece.start - 1)
        opened.readline()  # the line that the start cuts belongs to the piece before
    place = opened.tell() if piece.stop >= 0 else 0
    while piece.stop < 0 or place < piece.stop:
        content, size = _read_line(opened, _LINE_PER_TEXT * reading.longest)
        if not size:
            if piece.stop >= 0:
                raise DamageError("truncated_file", "the file became shorter while it was read", piece.stop - place)
            return
        place += size
        row = _parse(content, reading, piece.file) if content is not None else too_long(piece.file, 0, reading)
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


def _parse(content: bytes, reading: Reading, file: str) -> str | BadRow:
    """The text of a line; a bad row where there is none, without its number."""
    content = content.removeprefix(_MARK)  # also where files with marks were joined
    if not content.strip():
        return BadRow("empty", file, 0, "the line is empty")
    try:
        row = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        encoding = error.reason if isinstance(error, UnicodeDecodeError) else None
        if not content.endswith(b"\n") and encoding in (None, "unexpected end of data"):
            detail = (
                f"the file ends within a line, so the whole file counts: more may be missing; it is not JSON ({error})"
            )
            return BadRow("truncated_file", file, 0, detail, lost=None)
        if encoding is not None:
            return BadRow("not_utf8", file, 0, f"the line is not UTF-8 ({encoding})")
        return BadRow("broken_json", file, 0, f"the line is not JSON ({error})")
    return _column_of(row, reading, file, 0)


def _column_of(row: Any, reading: Reading, file: str, line: int) -> str | BadRow:
    if not isinstance(row, dict):
        return BadRow("broken_json", file, line, f"the row is {type(row).__name__}, not an object")
    try:
        value = find(row, reading.column)
    except KeyError:
        return missing(list(row), reading, file, line)
    return text_of(value, reading, file, line)


def _read_list(opened: FileBytes, piece: Piece, reading: Reading) -> Iterator[str | BadRow]:
    """Rows of one list, up to where it is broken."""
    content, damage = _read_all(opened)
    try:
        text = content.removeprefix(_MARK).decode(errors="strict" if damage is None else "ignore")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield BadRow("not_utf8", piece.file, line, f"the file is not UTF-8 ({error})", lost=piece.size)
        return
    number, place, decoder = 0, text.index("[") + 1, json.JSONDecoder()
    try:
        while (place := _behind_space(text, place)) < len(text) and text[place] != "]":
            row, place = decoder.raw_decode(text, place)
            number += 1
            yield _column_of(row, reading, piece.file, number)
            place = _behind_space(text, place)
            if text[place : place + 1] == ",":
                place += 1
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        if place == len(text):
            raise json.JSONDecodeError("Expecting ']'", text, place)
        if (place := _behind_space(text, place + 1)) != len(text):
            raise json.JSONDecodeError("Expecting the end of the file", text, place)
    except (ValueError, RecursionError) as error:
        if damage is None:
            cut = not text.rstrip().endswith("]")
            damage = DamageError(
                "truncated_file" if cut else "broken_json",
                f"it is not JSON: {error}",
                None if cut else -(-piece.size * (len(text) - place) // len(text)),
            )
    if damage is not None:
        yield _damaged(piece.file, number + 1, damage)


def _behind_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()
