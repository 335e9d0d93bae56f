"""Rows that cannot be used: what was wrong with them, where they are, and how many or how many bytes are too many."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Cause = Literal[
    "not_utf8",
    "missing_column",
    "not_text",
    "empty",
    "too_long",
    "broken_json",
    "truncated_file",
    "corrupt",
    "unreadable",
]
# What costs a part of a file, in which nobody can count the rows.
_PARTS = {"truncated_file", "corrupt", "unreadable"}

_JUDGED_AS = 1000  # rows: a share of fewer says little before all have been read


class BadRow(NamedTuple):
    """One row, or several with the same cause, that cannot be used.

    Args:
        cause: What is wrong.
        file: File or data set that it is in.
        line: Line, or number of the row, from 1.
        detail: The cause in words.
        rows: Number of rows.
        lost: Bytes of the file that could not be read; None where nobody knows, as the file was cut.
    """

    cause: Cause
    file: str
    line: int
    detail: str
    rows: int = 1
    lost: int | None = 0

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.detail}"


@dataclass
class Tally:
    """Rows read so far, the bad ones by file and cause, and what could not be read.

    Args:
        rows: All rows, bad ones too.
        bad: Bad rows by cause, by file.
        last: The last bad row in words; empty without one.
        lost: Bytes on disk that could not be read, by file.
        bytes: Bytes on disk of all files, read or yet to be read; 0 where they are not known.
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
        """Begin to count anew, in files of so many bytes."""
        self.rows, self.last, self.bytes = 0, "", size
        self.bad.clear()
        self.lost.clear()

    def merge(self, other: "Tally") -> None:
        """Add what another part of the text had."""
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
        """What a run reports: `bad_rows/CAUSE`, and `lost_bytes` where something could not be read."""
        found = {f"bad_rows/{cause}": count for cause, count in self.by_cause().items()}
        return found | ({"lost_bytes": sum(self.lost.values())} if self.lost else {})

    def lines(self, most: int = 20) -> list[str]:
        """Say in words what was left out, a line a file.

        Args:
            most: Files to name, those with the most bad rows first.
        """
        worst = sorted(self.bad, key=lambda file: (-sum(self.bad[file].values()), file))
        found = [f"left out of {file}: {self._left_out(file)}" for file in worst[:most]]
        if len(worst) > most:
            found.append(f"and rows of {len(worst) - most} more files")
        return found

    def _left_out(self, file: str) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.bad[file].items()))
        parts = file in self.lost and _PARTS & self.bad[file].keys()
        return f"{causes}, {self.lost[file]:,} bytes lost" if parts else causes

    def check(self, share: float, *, ended: bool) -> None:
        """Refuse text of which too much cannot be used: a share of the rows, or of the files' bytes.

        Args:
            share: Largest share of either.
            ended: Whether all rows have been read; before, a share of rows is not judged by less than a thousand, and a
                share of bytes only where a part of a file was lost.

        Raises:
            ValueError: There is more; names the last bad row's file and line.
        """
        found = self.by_cause()
        bad, lost = sum(found.values()), min(sum(self.lost.values()), self.bytes)
        # Quotients, rounded as the share itself was: 0.29 * 100 is less than 29.
        if bad / max(self.rows, 1 if ended else _JUDGED_AS) > share:
            what = f"{bad} of {self.rows} rows"
        elif lost / max(self.bytes, 1) > share and (ended or _PARTS & found.keys()):
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
        """Read what `to_json` gave."""
        bad = {file: dict(causes) for file, causes in found["bad"].items()}
        # Older ones do not count bytes.
        return cls(found["rows"], bad, found["last"], dict(found.get("lost", {})), found.get("bytes", 0))


def usable(rows: Iterable[str | BadRow], tally: Tally, share: float = 1.0) -> Iterator[str]:
    """Skip bad rows, and count them.

    Args:
        rows: Texts and bad rows.
        tally: Counts both.
        share: Largest share of bad rows; 1 leaves the judgement to the caller.

    Returns:
        The texts.

    Raises:
        ValueError: Too much cannot be used; names the last bad row's file and line.
    """
    for row in rows:
        if isinstance(row, BadRow):
            tally.add(row)
            tally.check(share, ended=False)
        else:
            tally.rows += 1
            yield row
    tally.check(share, ended=True)
