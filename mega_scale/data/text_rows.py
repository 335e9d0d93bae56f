"""From a value of a column to a text, or to what is wrong with it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mega_scale.data.bad_rows import BadRow

_NAMED = 20  # columns


class Reading(NamedTuple):
    """How rows become texts.

    Args:
        column: Name of the column that holds the text; dots lead into columns of columns, where none has such a name.
        longest: Longest text, UTF-8 bytes.
    """

    column: str
    longest: int


def text_of(value: Any, reading: Reading, file: str, line: int) -> str | BadRow:
    """Take a column's value for a text, or say why it is none.

    Args:
        value: What stands in the column; an exception, where it cannot be read.
        reading: How rows become texts.
        file: Name of the file.
        line: Line or row, from 1.

    Returns:
        The text, without a byte order mark before it.
    """
    if isinstance(value, Exception):
        return BadRow("corrupt", file, line, f"the row cannot be read ({type(value).__name__}: {value})")
    if value is None:
        return BadRow("empty", file, line, "the text is empty")
    if not isinstance(value, str | bytes):
        kind = type(value).__name__
        return BadRow("not_text", file, line, f"data.text_column={reading.column!r} holds {kind}, not text")
    if len(value) > reading.longest + 3:
        return too_long(file, line, reading)
    try:
        # A str may hold half a surrogate pair, which no UTF-8 has; encoding finds it.
        text = (value.decode() if isinstance(value, bytes) else value).removeprefix("\ufeff")
        size = len(text.encode())
    except UnicodeError as error:
        return BadRow("not_utf8", file, line, f"the text is not UTF-8 ({error})")
    if not text:
        return BadRow("empty", file, line, "the text is empty")
    return text if size <= reading.longest else too_long(file, line, reading)


def too_long(file: str, line: int, reading: Reading) -> BadRow:
    """A row with a text that is too long."""
    return BadRow("too_long", file, line, f"the text is longer than data.max_document_bytes={reading.longest}")


def missing(columns: Sequence[str], reading: Reading, file: str, line: int, count: int = 1) -> BadRow:
    """Rows without the column, or with several of its name."""
    same = columns.count(reading.column)
    names = ", ".join(columns[:_NAMED]) + (f" and {len(columns) - _NAMED} more" if len(columns) > _NAMED else "")
    detail = f"there is no column data.text_column={reading.column!r}, only {names or 'none'}"
    if same > 1:
        detail = f"{same} columns have the name data.text_column={reading.column!r}, of {names}: rename all but one"
    return BadRow("missing_column", file, line, detail, count)


def find(row: Mapping[str, Any], column: str) -> Any:
    """Look up a column of a row.

    Args:
        row: An object of JSON.
        column: Its name, or names joined by dots.

    Raises:
        KeyError: There is none.
    """
    if column in row:
        return row[column]
    found: Any = row
    for name in column.split("."):
        if not isinstance(found, Mapping):
            raise KeyError(column)
        found = found[name]
    return found
