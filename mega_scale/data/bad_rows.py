"""Rows that cannot be used: what was wrong with them, where they are, and how many are too many."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Cause = Literal[
    "not_utf8", "missing_column", "not_text", "empty", "too_long", "broken_json", "truncated_file", "corrupt"
]

_JUDGED_AS = 1000  # rows: a share of fewer says little before all have been read


class BadRow(NamedTuple):
    """One row, or several with the same cause, that cannot be used.

    Args:
        cause: What is wrong.
        file: File or data set that it is in.
        line: Line, or number of the row, from 1.
        detail: The cause in words.
        rows: Number of rows.
    """

    cause: Cause
    file: str
    line: int
    detail: str
    rows: int = 1

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.detail}"


@dataclass
class Tally:
    """Rows read so far, and the bad ones by file and cause.

    Args:
        rows: All rows, bad ones too.
        bad: Bad rows by cause, by file.
        last: The last bad row in words; empty without one.
    """

    rows: int = 0
    bad: dict[str, dict[str, int]] = field(default_factory=dict)
    last: str = ""

    def add(self, row: BadRow) -> None:
        """Count a bad row."""
        self.merge(Tally(row.rows, {row.file: {row.cause: row.rows}}, str(row)))

    def clear(self) -> None:
        """Begin to count anew."""
        self.rows, self.last = 0, ""
        self.bad.clear()

    def merge(self, other: "Tally") -> None:
        """Add what another part of the text had."""
        self.rows += other.rows
        self.last = other.last or self.last
        for file, causes in other.bad.items():
            mine = self.bad.setdefault(file, {})
            for cause, count in causes.items():
                mine[cause] = mine.get(cause, 0) + count

    def by_cause(self) -> dict[str, int]:
        """Bad rows of all files by cause."""
        found: dict[str, int] = {}
        for causes in self.bad.values():
            for cause, count in causes.items():
                found[cause] = found.get(cause, 0) + count
        return dict(sorted(found.items()))

    def lines(self, most: int = 20) -> list[str]:
        """Say in words what was left out, a line a file.

        Args:
            most: Files to name, those with the most bad rows first.
        """
        worst = sorted(self.bad, key=lambda file: (-sum(self.bad[file].values()), file))
        found = [
            f"left out of {file}: " + ", ".join(f"{count} {cause}" for cause, count in sorted(self.bad[file].items()))
            for file in worst[:most]
        ]
        if len(worst) > most:
            found.append(f"and rows of {len(worst) - most} more files")
        return found

    def check(self, share: float, *, ended: bool) -> None:
        """Refuse text with too many bad rows.

        Args:
            share: Largest share of bad rows.
            ended: Whether all rows have been read; before, a share is not judged by less than a thousand rows.

        Raises:
            ValueError: There are more; names the last one's file and line.
        """
        found = self.by_cause()
        bad = sum(found.values())
        if bad > share * (self.rows if ended else max(self.rows, _JUDGED_AS)):
            causes = ", ".join(f"{count} {cause}" for cause, count in found.items())
            raise ValueError(
                f"{bad} of {self.rows} rows cannot be used ({causes}), more than data.max_bad_share={share}; the last "
                f"one is {self.last}; repair them, or raise data.max_bad_share"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the same rows give the same."""
        bad = {file: dict(sorted(self.bad[file].items())) for file in sorted(self.bad)}
        return {"rows": self.rows, "bad": bad, "last": self.last}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Tally":
        """Read what `to_json` gave."""
        return cls(found["rows"], {file: dict(causes) for file, causes in found["bad"].items()}, found["last"])


def usable(rows: Iterable[str | BadRow], tally: Tally, share: float = 1.0) -> Iterator[str]:
    """Skip bad rows, and count them.

    Args:
        rows: Texts and bad rows.
        tally: Counts both.
        share: Largest share of bad rows; 1 leaves the judgement to the caller.

    Returns:
        The texts.

    Raises:
        ValueError: There are too many bad rows; names the last one's file and line.
    """
    for row in rows:
        if isinstance(row, BadRow):
            tally.add(row)
            tally.check(share, ended=False)
        else:
            tally.rows += 1
            yield row
    tally.check(share, ended=True)
