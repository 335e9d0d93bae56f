"""Rows of whole documents: each document, or what is left of one that is longer than a row, where it fits best.

Documents are packed in windows of consecutive ones, longest first, each into the row that it leaves least room in, or
into a new one. A window is about 64 rows of text, so that the rows that are not full at its end are few; it is packed
again when one of its rows is asked for, unless it was among the last, so that memory does not grow with the corpus.

Legend: L sequence length, n pieces of documents in a window.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from mega_scale.data.token_store import TokenStore

_ROWS_OF_WINDOW = 64
_LEAST_DOCUMENTS = 64
_KEPT_PIECES = 1 << 18  # of 24 bytes each


class Piece(NamedTuple):
    """Tokens that lie together, in the store and in a row.

    Args:
        place: Of the first in the row.
        start: Of the first in the store.
        stop: In the store, after the last.
    """

    place: int
    start: int
    stop: int


class _Window(NamedTuple):
    """Rows of some documents: pieces (n,) in the order of rows, and where each row's begin, (rows + 1,)."""

    place: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray


class BestFit:
    """Which tokens each row has, a pure function of the documents' lengths.

    A document of more than L + 1 tokens fills rows of its own, each starting with the last token of the one before,
    and what is left of it is packed. A document of one token predicts nothing, and is in no row.

    Args:
        store: The documents.
        sequence_length: L, tokens.
        alignment: Documents start at multiples of this, tokens; divides L.
    """

    def __init__(self, store: TokenStore, sequence_length: int, alignment: int = 1) -> None:
        self._store, self._length, self._alignment = store, sequence_length, alignment
        of_window = _ROWS_OF_WINDOW * sequence_length * store.documents // max(store.tokens, 1)
        self._documents = max(of_window, _LEAST_DOCUMENTS)
        self._kept: dict[int, _Window] = {}  # the first was packed first
        self._pieces = 0
        counts = [self._rows_in(first) for first in range(0, store.documents, self._documents)]
        self._before = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._before[-1])

    def pieces(self, row: int) -> list[Piece]:
        """See `mega_scale.data.packing.Layout`."""
        number = int(np.searchsorted(self._before, row, side="right")) - 1
        window = self._kept.get(number)
        if window is None:
            window = self._kept[number] = self._pack(number * self._documents)
            self._pieces += len(window.place)
            while self._pieces > _KEPT_PIECES and len(self._kept) > 1:
                self._pieces -= len(self._kept.pop(next(iter(self._kept))).place)
        within = row - int(self._before[number])
        one = slice(int(window.first[within]), int(window.first[within + 1]))
        fields = (window.place[one].tolist(), window.start[one].tolist(), window.stop[one].tolist())
        return [Piece(*found) for found in zip(*fields, strict=True)]

    def _cut(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces of a window's documents in their order: starts and stops in the store, (n,) each."""
        last = min(first + self._documents, self._store.documents)
        ends = self._store.ends(max(first - 1, 0), last)
        bounds = np.concatenate([[0], ends]) if first == 0 else ends
        counts = -(-(np.diff(bounds) - 1) // self._length)
        which = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = bounds[which] + number * self._length
        return starts, np.minimum(starts + self._length + 1, bounds[which + 1])

    def _rows_in(self, first: int) -> int:
        starts, stops = self._cut(first)
        rows = fit(self._units(stops - starts), self._capacity)
        return max(rows, default=-1) + 1

    def _pack(self, first: int) -> _Window:
        starts, stops = self._cut(first)
        units = self._units(stops - starts)
        rows = np.array(fit(units, self._capacity), np.int64)
        # In a row, documents stand in the order of the corpus.
        order = rows.argsort(kind="stable")
        begins = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))
        before = np.cumsum(units[order]) - units[order]
        place = before - before[begins[:-1]][rows[order]]
        return _Window(place * self._alignment, starts[order], stops[order], begins)

    @property
    def _capacity(self) -> int:
        """Units of `alignment` places in a row; the last place of a row is one more, which is predicted only."""
        return (self._length + 1) // self._alignment

    def _units(self, tokens: np.ndarray) -> np.ndarray:
        return np.minimum(-(-tokens // self._alignment), self._capacity)


def fit(sizes: np.ndarray, capacity: int) -> list[int]:
    """Put pieces into as few rows as best fit, longest first, finds.

    Args:
        sizes: (n,) of the pieces, each from 1 to `capacity`.
        capacity: Of a row, in the same unit.

    Returns:
        (n,) number of each piece's row; of equal choices the first is taken.
    """
    rows, count = [0] * len(sizes), 0
    each = len(sizes) + 1  # a row with room is one number, room * each + row, in a sorted list
    open_rows: list[int] = []
    lengths = sizes.tolist()
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = lengths[i]
        at = bisect_left(open_rows, size * each)
        if at == len(open_rows):
            room, row = capacity, count
            count += 1
        else:
            room, row = divmod(open_rows.pop(at), each)
        rows[i] = row
        if room > size:
            insort(open_rows, (room - size) * each + row)
    return rows
