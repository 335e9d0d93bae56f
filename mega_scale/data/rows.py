"""Rows of text and rows that cannot be used: what is wrong with them, where they are, and how many are too many."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

Cause = Literal[
    "not_utf8", "missing_column", "not_text", "empty", "too_long", "broken_json", "truncated_file", "corrupt",
    "unreadable",
]  # fmt: skip
# These cost a part of a file, in which nobody can count the rows.
_FILE_DAMAGE = {"truncated_file", "corrupt", "unreadable"}

_MIN_JUDGED = 1000  # rows: the share of fewer says little before all have been read
_NAMED_COLUMNS = 20


class BadRow(NamedTuple):
    """One row, or several with the same cause, that cannot be used.

    Args:
        cause: What is wrong.
        file: File or data set that it is in.
        line: Line, or number of the row, from 1.
        detail: The cause in words.
        rows: Number of rows.
        lost: Bytes of the file that could not be read; None if nobody knows, as the file was cut.
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
            return BadRow("corrupt", file, line, f"the row cannot be read ({type(value).__name__}: {value})")
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
        if self.name in row:
            return self.text(row[self.name], file, line)
        value: Any = row
        for name in self.name.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return self.missing(list(row), file, line)
            value = value[name]
        return self.text(value, file, line)


@dataclass
class Tally:
    """Rows read so far, the bad ones by file and cause, and what could not be read.

    Args:
        rows: All rows, bad ones too.
        bad: Bad rows by cause, by file.
        last: The last bad row in words; empty without one.
        lost: Bytes on disk that could not be read, by file.
        bytes: Bytes on disk of all files, read or yet to be read; 0 if unknown.
    """

    rows: int = 0
    bad: dict[str, dict[str, int]] = field(default_factory=dict)
    last: str = ""
    lost: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    def add(self, row: BadRow) -> None:
        """Count a bad row."""
        lost = {row.file: row.lost} if row.lost else {}
        self.merge(Tally(row.rows, {row.file: {row.cause: row.rows}}, str(row), lost))

    def clear(self, size: int = 0) -> None:
        """Count anew, in files of `size` bytes."""
        self.rows, self.last, self.bytes = 0, "", size
        self.bad.clear()
        self.lost.clear()

    def merge(self, other: "Tally") -> None:
        """Add the counts of another part of the text."""
        self.rows += other.rows
        self.last = other.last or self.last
        for file, causes in other.bad.items():
            mine = self.bad.setdefault(file, {})
            for cause, count in causes.items():
                mine[cause] = mine.get(cause, 0) + count
        for file, lost in other.lost.items():
            self.lost[file] = self.lost.get(file, 0) + lost
        self.bytes += other.bytes

    def by_cause(self) -> dict[str, int]:
        """Bad rows of all files by cause."""
        found: dict[str, int] = {}
        for causes in self.bad.values():
            for cause, count in causes.items():
                found[cause] = found.get(cause, 0) + count
        return dict(sorted(found.items()))

    def figures(self) -> dict[str, int]:
        """What a run logs: `bad_rows/CAUSE`, and `lost_bytes` if something could not be read."""
        found = {f"bad_rows/{cause}": count for cause, count in self.by_cause().items()}
        return found | ({"lost_bytes": sum(self.lost.values())} if self.lost else {})

    def lines(self, most: int = 20) -> list[str]:
        """Say what was left out, one line a file, for the `most` files with the most bad rows."""
        worst = sorted(self.bad, key=lambda file: (-sum(self.bad[file].values()), file))
        found = []
        for file in worst[:most]:
            line = ", ".join(f"{count} {cause}" for cause, count in sorted(self.bad[file].items()))
            if file in self.lost and _FILE_DAMAGE & self.bad[file].keys():
                line += f", {self.lost[file]:,} bytes lost"
            found.append(f"left out of {file}: {line}")
        if len(worst) > most:
            found.append(f"and rows of {len(worst) - most} more files")
        return found

    def check(self, share: float, *, ended: bool) -> None:
        """Refuse text of which too much cannot be used.

        Args:
            share: Largest share of bad rows, and of lost bytes.
            ended: Whether all rows have been read. Before, rows count as at least a thousand, and bytes only where a
                part of a file was lost.

        Raises:
            ValueError: There is more; names the last bad row's file and line.
        """
        found = self.by_cause()
        bad, lost = sum(found.values()), min(sum(self.lost.values()), self.bytes)
        # Quotients, rounded as the share itself was: 0.29 * 100 is less than 29.
        if bad / max(self.rows, 1 if ended else _MIN_JUDGED) > share:
            what = f"{bad} of {self.rows} rows"
        elif lost / max(self.bytes, 1) > share and (ended or _FILE_DAMAGE & found.keys()):
            what = f"{lost:,} of {self.bytes:,} bytes"
        else:
            return
        causes = ", ".join(f"{count} {cause}" for cause, count in found.items())
        raise ValueError(
            f"{what} cannot be used ({causes}), more than data.max_bad_share={share}; the last one is {self.last}; "
            "repair them, or raise data.max_bad_share"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the same rows give the same."""
        bad = {file: dict(sorted(self.bad[file].items())) for file in sorted(self.bad)}
        found: dict[str, Any] = {"rows": self.rows, "bad": bad, "last": self.last}
        return found | ({"lost": dict(sorted(self.lost.items())), "bytes": self.bytes} if self.lost else {})

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Tally":
        """Read what `to_json` gave; older tallies do not count bytes."""
        bad = {file: dict(causes) for file, causes in found["bad"].items()}
        return cls(found["rows"], bad, found["last"], dict(found.get("lost", {})), found.get("bytes", 0))

    def copy(self) -> "Tally":
        """The counts so far, which do not change when reading goes on."""
        return Tally.from_json(self.to_json())


def usable(rows: Iterable[str | BadRow], tally: Tally, share: float = 1.0) -> Iterator[str]:
    """Yield the texts, and count them and the bad rows in `tally`.

    Raises:
        ValueError: More than `share` cannot be used; names the last bad row's file and line.
    """
    for row in rows:
        if isinstance(row, BadRow):
            tally.add(row)
            tally.check(share, ended=False)
        else:
            tally.rows += 1
            yield row
    tally.check(share, ended=True)
