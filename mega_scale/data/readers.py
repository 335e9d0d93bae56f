"""Read local files and data sets of the hub range by range: texts and unusable rows in order.

A damage costs as few rows as the format, or pyarrow, allows.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mega_scale.data.compression import DamageError, FileBytes, file_kind
from mega_scale.data.config import Damage, DataConfig, FileRange, cache_folder, expand_paths, find_on_hub
from mega_scale.files import reason

Cause = Damage | Literal["not_utf8", "missing_column", "not_text", "empty", "too_long", "broken_json"]

_BROKEN = (EOFError, OSError, UnicodeError, pa.ArrowException)  # from pyarrow, where a file or column is damaged
_LINE_PER_TEXT = 8  # JSON writes a byte of text as six characters at most, and a row may have other columns
_NAMED_COLUMNS = 20
_MARK = "\ufeff".encode()
_OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_SPACE = re.compile(r"[ \t\n\r]*")
_SEPARATOR = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|(?=]))")
_ROWS_AT_ONCE = 256
_HUB_ROWS_AT_ONCE = 64
# pyarrow's words for a file that was cut
_CUT = (
    "truncated", "end-of-stream", "expected to be able to read", "expected to read", "or length 0", "size is 0 bytes",
)  # fmt: skip


class BadRow(NamedTuple):
    """One row, or several with the same cause, that cannot be used.

    `line` is the line, or the number of the row, from 1, and 0 until it is known, as `file` is "". `lost` are the bytes
    of the file that could not be read, None if nobody knows, as the file was cut.
    """

    cause: Cause
    detail: str
    line: int = 0
    rows: int = 1
    lost: int | None = 0
    file: str = ""

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.detail}"


Rows: TypeAlias = Iterator[str | BadRow]


class TextColumn(NamedTuple):
    """The column that holds the text, and the longest text in UTF-8 bytes.

    Dots in the name lead into columns of columns, unless a column has the whole name.
    """

    name: str
    max_bytes: int

    def text(self, value: Any) -> str | BadRow:
        """Take a value of the column as text, without a byte order mark; an exception stands for a corrupt row."""
        if isinstance(value, Exception):
            return BadRow("corrupt", f"the row cannot be read ({reason(value)})")
        if not isinstance(value, str | bytes | None):
            return BadRow("not_text", f"data.text_column={self.name!r} holds {type(value).__name__}, not text")
        value = value or ""
        if len(value) > self.max_bytes + 3:
            return self.too_long()
        try:
            # A str may hold half a surrogate pair, which no UTF-8 has; encoding finds it.
            text = (value.decode() if isinstance(value, bytes) else value).removeprefix("\ufeff")
            size = len(text.encode())
        except UnicodeError as error:
            return BadRow("not_utf8", f"the text is not UTF-8 ({error})")
        if not text:
            return BadRow("empty", "the text is empty")
        return text if size <= self.max_bytes else self.too_long()

    def too_long(self) -> BadRow:
        return BadRow("too_long", f"the text is longer than data.max_document_bytes={self.max_bytes}")

    def missing(self, columns: Sequence[str]) -> BadRow:
        """A row that lacks the column, or that has several of its name."""
        names = ", ".join(columns[:_NAMED_COLUMNS]).encode(errors="backslashreplace").decode() or "none"
        if len(columns) > _NAMED_COLUMNS:
            names += f" and {len(columns) - _NAMED_COLUMNS} more"
        detail = f"there is no column data.text_column={self.name!r}, only {names}"
        if (same := columns.count(self.name)) > 1:
            detail = f"{same} columns have the name data.text_column={self.name!r}, of {names}: rename all but one"
        return BadRow("missing_column", detail)

    def of_object(self, row: Any) -> str | BadRow:
        """The text of a JSON value that should be an object with this column."""
        if not isinstance(row, Mapping):
            return BadRow("broken_json", f"the row is {type(row).__name__}, not an object")
        value: Any = row
        for name in [self.name] if self.name in row else self.name.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return self.missing(list(row))
            value = value[name]
        return self.text(value)


def _other_encoding(head: bytes) -> str | None:
    """What is wrong with a file by its byte order mark, unless it is that of UTF-8."""
    name = next((name for mark, name in _OTHER_MARKS.items() if head.startswith(mark)), None)
    return name and f"the file is {name} by its byte order mark, not utf-8: convert it"


def _read_all(part: FileRange, most: int | None = None) -> tuple[bytes, DamageError | None]:
    """What can be read of a whole file, up to `most` bytes, and what is wrong after it."""
    found = bytearray()
    try:
        with FileBytes(part.file, part.size) as opened:
            while (most is None or len(found) < most) and (content := opened.read1(1 << 20)):
                found += content
    except DamageError as damage:
        return bytes(found), damage
    return bytes(found[:most]), None


# Text: one document a file


def _read_text(part: FileRange, column: TextColumn) -> Rows:
    content, damage = _read_all(part, column.max_bytes + len(_MARK) + 1)
    if damage is not None and not damage.complete:  # half a document is none
        damage.lost = None if damage.lost is None else part.size
        raise damage
    content, line, wrong = content.removeprefix(_MARK), 1, _other_encoding(content)
    if wrong is None and content.count(0) * 4 > len(content):
        wrong = "the file is no text: it holds NUL bytes, as UTF-16 without a mark and binary files do"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if wrong is None and error.start < column.max_bytes - 3:  # else a character may only have been cut
            line, wrong = content.count(b"\n", 0, error.start) + 1, f"the text is not UTF-8 ({error})"
    found = column.text(content) if len(content) <= column.max_bytes else column.too_long()
    if wrong is not None:
        found = BadRow("not_utf8", wrong, line, lost=part.size)
    yield found.replace("\r\n", "\n").replace("\r", "\n") if isinstance(found, str) else found._replace(line=line)
    if damage is not None:
        raise damage


# JSON: one object a line, or a list of objects


def _is_list(head: bytes) -> bool:
    return head.removeprefix(_MARK).lstrip()[:1] == b"["


def _read_json(part: FileRange, column: TextColumn) -> Rows:
    with FileBytes(part.file, part.size if part.stop < 0 else None) as opened:
        head = b"" if part.start else opened.peek(64)
        if (wrong := _other_encoding(head)) is not None:
            yield BadRow("not_utf8", wrong, lost=part.size)
        elif _is_list(head):
            yield from _read_list(part, column)
        else:
            yield from _read_lines(opened, part, column)


def _read_lines(opened: FileBytes, part: FileRange, column: TextColumn) -> Rows:
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
            row = _parse(content, column)
        else:  # not kept in memory
            while not content.endswith(b"\n") and (content := opened.readline(longest)):
                size += len(content)
            row = column.too_long()
        place += size
        if isinstance(row, BadRow) and row.cause in ("broken_json", "not_utf8"):
            row = row._replace(lost=opened.on_disk(size))
        yield row


def _lines_before(part: FileRange) -> int:
    """How many lines of a file begin before a range; 0 if it is gone."""
    found, last, left = 0, b"\n", part.start
    with contextlib.suppress(OSError), open(part.file, "rb") as opened:
        while left and (content := opened.read(min(1 << 20, left))):
            found, last, left = found + content.count(b"\n"), content[-1:], left - len(content)
    return found + (last != b"\n")


def _parse(content: bytes, column: TextColumn) -> str | BadRow:
    content = content.removeprefix(_MARK)  # also where files with marks were joined
    if not content.strip():
        return BadRow("empty", "the line is empty")
    try:
        row = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        encoding = error.reason if isinstance(error, UnicodeDecodeError) else None
        if not content.endswith(b"\n") and encoding in (None, "unexpected end of data"):
            detail = "the file ends within a line, so the whole file counts: more may be missing"
            return BadRow("truncated_file", f"{detail}; it is not JSON ({error})", lost=None)
        if encoding is not None:
            return BadRow("not_utf8", f"the line is not UTF-8 ({encoding})")
        return BadRow("broken_json", f"the line is not JSON ({error})")
    return column.of_object(row)


def _read_list(part: FileRange, column: TextColumn) -> Rows:
    """Rows of one list, up to where it is broken."""
    content, damage = _read_all(part)
    try:
        text = content.removeprefix(_MARK).decode(errors="strict" if damage is None else "ignore")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield BadRow("not_utf8", f"the file is not UTF-8 ({error})", line, lost=part.size)
        return
    place, decoder = next(_SPACE.finditer(text, text.index("[") + 1)).end(), json.JSONDecoder()
    try:
        while text[place : place + 1] != "]":
            row, place = decoder.raw_decode(text, place)
            yield column.of_object(row)
            if (found := _SEPARATOR.match(text, place)) is None:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
            place = found.end()
        place += 1
        if text[place:].strip(" \t\n\r"):
            raise json.JSONDecodeError("Expecting the end of the file", text, place)
    except (ValueError, RecursionError) as error:
        if damage is None:
            cut = not text.rstrip().endswith("]")
            lost = None if cut else -(-part.size * (len(text) - place) // len(text))
            damage = DamageError("truncated_file" if cut else "broken_json", f"it is not JSON: {error}", lost)
    if damage is not None:
        raise damage


# Parquet and arrow


def _read_parquet(part: FileRange, column: TextColumn) -> Rows:
    try:
        mapped = pa.memory_map(part.file)
        opened = pq.ParquetFile(mapped, page_checksum_verification=True)
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        found = _flat(opened.schema_arrow.empty_table(), column).column_names.count(column.name)
    except _BROKEN as error:
        raise _broken_file(part.file, error, magic=b"PAR1") from None
    with opened:
        for group in range(part.start, part.stop if part.stop >= 0 else len(sizes)):
            row, end = sum(sizes[:group]), sum(sizes[: group + 1])
            if found != 1:
                yield column.missing(opened.schema_arrow.names)._replace(line=row + 1, rows=end - row)
                continue
            words = "fewer rows than the file says"
            for at_once in (_ROWS_AT_ONCE, 1):  # one by one up to the damage, if there is one
                number = sum(sizes[:group])
                try:
                    for batch in opened.iter_batches(at_once, row_groups=[group], columns=[column.name]):
                        number += batch.num_rows
                        if number > row:
                            yield from _texts(batch, column, row)
                            row = number
                    break
                except _BROKEN as error:
                    words = reason(error)
            if row < end:
                detail = f"the rows cannot be read from here on ({words})"
                yield BadRow("corrupt", detail, row + 1, end - row, mapped.size() * (end - row) // sum(sizes))


def _read_arrow(part: FileRange, column: TextColumn) -> Rows:
    """Rows of an arrow file, or of a stream, in which `datasets` keeps its own."""
    row = place = 0
    try:
        mapped = pa.memory_map(part.file)
        is_file, opened = mapped.read(6) == b"ARROW1", None
        if is_file:
            with contextlib.suppress(pa.ArrowInvalid):  # cut, so that its index is missing: all before is a stream
                opened = pa.ipc.open_file(mapped)
        if opened is None:
            mapped.seek(8 if is_file else 0)
            stream = pa.ipc.open_stream(mapped)
            while True:
                place = mapped.tell()
                batch = stream.read_next_batch()
                yield from _texts(batch, column, row)
                row += batch.num_rows
    except StopIteration:
        return
    except _BROKEN as error:
        raise _broken_file(part.file, error, place) from None
    count = opened.num_record_batches
    for number in range(part.stop if part.stop >= 0 else count):  # those before the range have rows, too
        try:
            batch = opened.get_batch(number)
        except _BROKEN as error:
            if number >= part.start:
                detail = f"a record batch cannot be read ({reason(error)})"
                yield BadRow("corrupt", detail, row + 1, lost=mapped.size() // count)
            continue
        if number >= part.start:
            yield from _texts(batch, column, row)
        row += batch.num_rows


def _flat(table: Any, column: TextColumn) -> Any:
    """A table whose columns of columns have become columns of joined names, as far as needed to find the column."""
    while column.name not in table.column_names and any(map(pa.types.is_struct, table.schema.types)):
        table = table.flatten()
    return table


def _texts(batch: Any, column: TextColumn, row: int) -> Rows:
    """Rows of a batch, of which the first is number `row`, counted from 0."""
    table = _flat(pa.Table.from_batches([batch]), column)
    if table.column_names.count(column.name) != 1:
        yield column.missing(batch.schema.names)._replace(line=row + 1, rows=batch.num_rows)
        return
    array = table.column(column.name).chunk(0)
    try:
        values = _plain_values(array)
    except _BROKEN:
        values = []
        for i in range(len(array)):
            try:
                values += _plain_values(array.slice(i, 1))
            except _BROKEN as error:
                values.append(error)
    for number, value in enumerate(values, row + 1):
        found = column.text(value)
        yield found if isinstance(found, str) else found._replace(line=number)


def _plain_values(column: Any) -> list[Any]:
    """Values of an array: texts as bytes, which may not be UTF-8, others as they are."""
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


def _broken_file(file: str, error: Exception, place: int = 0, magic: bytes = b"") -> DamageError:
    """A file that cannot be read from byte `place` on; one that begins, but does not end, with its `magic` was cut."""
    size, kind, cut = 0, None, any(words in str(error).lower() for words in _CUT)
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        head = opened.read(512)
        size = opened.seek(0, 2)
        opened.seek(max(size - len(magic), 0))
        cut = cut or bool(magic and head.startswith(magic) and opened.read() != magic)
        kind = file_kind(head)
    if not place and kind not in (None, "parquet" if magic else "arrow"):
        return DamageError("unreadable", f"it is a {kind} file", size)
    if cut:
        return DamageError("truncated_file", reason(error), None)
    cause: Damage = "unreadable" if getattr(error, "errno", None) else "corrupt"
    return DamageError(cause, reason(error), size - place if size else None)


# Files and data sets of the hub


class FileSource:
    """Local files, by absolute names; `kind` is text, json, parquet or arrow."""

    def __init__(self, files: Sequence[str], kind: str, column: TextColumn) -> None:
        self._files, self._kind, self._column = files, kind, column

    def ranges(self, size: int | None) -> list[FileRange]:
        """Split the files into ranges of about `size` bytes, in order; None splits none."""
        return [part for file in self._files for part in self._split(file, size)]

    def read(self, part: FileRange) -> Rows:
        """Read the rows of a range in order; a file that was cut counts as a whole, at least as one of mean size."""
        before = functools.cache(lambda: _lines_before(part) if self._kind == "json" else 0)
        number = counted = 0
        for row in _rows(part, self._kind, self._column):
            if isinstance(row, str):
                number += 1
                yield row
                continue
            lost, most = row.lost, part.size
            if lost is None:
                lost = most = max(_size(part.file), self._mean_size)
            lost = min(lost, most - counted)
            counted += lost
            yield row._replace(file=part.file, line=row.line or before() + number + 1, lost=lost)
            number += row.rows

    def _split(self, file: str, size: int | None) -> list[FileRange]:
        total = _size(file)
        if size is None or total <= size or self._kind == "text":
            return [FileRange(file, 0, -1, total)]
        try:
            if self._kind == "parquet":
                count = pq.ParquetFile(file).num_row_groups
            elif self._kind == "arrow":
                with pa.memory_map(file) as mapped:
                    count = pa.ipc.open_file(mapped).num_record_batches
            else:
                with FileBytes(file) as opened:
                    head = opened.read(64)
                    count = 0 if opened.kind or _other_encoding(head) or _is_list(head) else total
        except (DamageError, *_BROKEN):
            count = 0
        if not count:
            return [FileRange(file, 0, -1, total)]
        step = max(1, count * size // total)
        return [
            FileRange(file, i, min(i + step, count), total * min(step, count - i) // count)
            for i in range(0, count, step)
        ]

    @functools.cached_property
    def _mean_size(self) -> int:
        return sum(map(_size, self._files)) // len(self._files)


def _rows(part: FileRange, kind: str, column: TextColumn) -> Rows:
    """Rows of a range, and one that says from where on it cannot be read."""
    read = {"text": _read_text, "json": _read_json, "parquet": _read_parquet, "arrow": _read_arrow}[kind]
    try:
        yield from read(part, column)
    except DamageError as damage:
        unknown = "; how much is missing is not known, so the whole file counts" if damage.lost is None else ""
        could_not_open = damage.lost == 0 and not damage.complete
        detail = f"the file cannot be read from here on ({damage}){unknown}"
        yield BadRow(damage.cause, detail, lost=part.size if could_not_open else damage.lost)


def _size(file: str) -> int:
    """Bytes of a file; 0 if it cannot be asked: reading it will say what is wrong."""
    try:
        return os.path.getsize(file)
    except OSError:
        return 0


class HubSource:
    """A `datasets.Dataset` or `datasets.IterableDataset`; a stream is one range."""

    def __init__(self, dataset: Any, name: str, column: TextColumn, *, streaming: bool) -> None:
        self._dataset, self._name, self._column, self._streaming = dataset, name, column, streaming

    def ranges(self, size: int | None) -> list[FileRange]:
        if self._streaming or not len(self._dataset):
            return [FileRange(self._name, 0, -1, 0)]
        count, total = len(self._dataset), self._dataset.size_in_bytes or 0
        step = count if size is None else max(1, min(count, count * size // max(total, 1)))
        starts = range(0, count, step)
        return [FileRange(self._name, i, min(i + step, count), total * step // count) for i in starts]

    def read(self, part: FileRange) -> Rows:
        for row in self._read_stream() if self._streaming else self._read_stored(part):
            yield row if isinstance(row, str) else row._replace(file=self._name)

    def _read_stored(self, part: FileRange) -> Rows:
        table, row = self._dataset.with_format("arrow")[part.start : max(part.stop, 0)], part.start
        for batch in table.to_batches(max_chunksize=_HUB_ROWS_AT_ONCE):
            yield from _texts(batch, self._column, row)
            row += batch.num_rows

    def _read_stream(self) -> Rows:
        number = 0
        try:
            for number, row in enumerate(self._dataset, 1):
                found = self._column.of_object(row)
                yield found if isinstance(found, str) else found._replace(line=number)
        except Exception as error:
            raise ValueError(
                f"{self._name} cannot be read behind row {number} ({_cause(error)}): repair it, or set "
                "data.streaming=false, which reads around bad rows"
            ) from None


def open_files(config: DataConfig, held_out: bool) -> FileSource | HubSource:
    """Open `path` or `hub_split`, or with `held_out` `validation_path` or `validation_split`; reads no text."""
    column = TextColumn("text" if config.source == "text" else config.text_column, config.max_document_bytes)
    if config.source != "hub":
        key, paths = ("validation_path", config.validation_path) if held_out else ("path", config.path)
        return FileSource(expand_paths(paths or [], key), config.source, column)
    import datasets  # noqa: PLC0415  half a second

    assert config.hub_name is not None
    cache = {} if config.cache_dir is None else {"cache_dir": str(cache_folder(config.cache_dir) / "datasets")}
    key, split = ("validation_split", config.validation_split) if held_out else ("hub_split", config.hub_split)
    name, is_folder = f"data.hub_name={config.hub_name!r}", Path(config.hub_name).is_dir()
    if not is_folder and not datasets.config.HF_HUB_OFFLINE:
        found = find_on_hub(config.hub_name, "dataset")
        if found == "absent":
            raise ValueError(f"{name}: the hub has no such data set, or needs a log-in for it; correct the name")
        if found == "unreachable":
            remedy = "set HF_HUB_OFFLINE=1 to use what was fetched before, or give files with another data.source"
            raise ValueError(f"{name}: the hub cannot be reached; {remedy}")
    try:
        builder = datasets.load_dataset_builder(config.hub_name, config.hub_config, **cache)
        # `datasets` gives up a whole data set for one bad row; the readers here do not.
        if is_folder and (source := _files_of(builder, split, column)) is not None:
            return source
        try:
            dataset = datasets.load_dataset(
                config.hub_name, config.hub_config, split=split, streaming=config.streaming, **cache
            )
        except datasets.exceptions.DatasetGenerationError:
            if (source := _files_of(builder, split, column)) is None:
                raise
            return source
    except Exception as error:
        raise ValueError(
            f"{name} with data.hub_config={config.hub_config!r}, data.{key}={split!r} cannot be loaded: "
            f"{_cause(error)}; correct these keys, or fetch it while the hub can be reached"
        ) from None
    return HubSource(dataset, f"{name} ({split})", column, streaming=config.streaming)


def _files_of(builder: Any, split: str | None, column: TextColumn) -> FileSource | None:
    """The files of a split, fetched if need be, if they hold rows as they are."""
    from datasets import DownloadManager  # noqa: PLC0415

    kind, files = type(builder).__module__.rpartition(".")[2], (builder.config.data_files or {}).get(split)
    if kind not in ("json", "parquet", "arrow") or not files or getattr(builder.config, "field", None):
        return None
    return FileSource(DownloadManager().download(list(files)), kind, column)


def _cause(error: BaseException) -> str:
    """The first error in one line; `datasets` wraps it in words that do not name it."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return reason(error)
