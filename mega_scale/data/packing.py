"""From documents to rows of a fixed length.

Shapes: L sequence length, n rows. A row has L + 1 places: 0..L-1 are read, 1..L are predicted. In order, the next row
starts with the last token of the one before, so that in an epoch every token but the first is predicted exactly once
(with packing "reset", every token but the first of its document). Places without a token hold `MISSING`.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from mega_scale.data.config import Packing, PackingOrder
from mega_scale.data.rows import Tally
from mega_scale.data.tokens import TokenStore

MISSING = -1  # no token
_INDEXED_DOCUMENTS = 1024
_ROWS_OF_WINDOW = 64
_LEAST_DOCUMENTS = 64
_KEPT_SPANS = 1 << 18  # of 24 bytes each


class Span(NamedTuple):
    """Tokens `start` to below `stop` of the store, of which the first stands at `place` in a row."""

    place: int
    start: int
    stop: int


class RowIndex(Protocol):
    """Which tokens each row has."""

    def __len__(self) -> int:
        """Number of rows of an epoch."""

    def spans(self, row: int) -> list[Span]:
        """What lies in a row, from left to right; in each span but the first, a document begins or goes on afresh."""


class Concatenated:
    """All documents end to end, cut every L tokens."""

    def __init__(self, store: TokenStore, sequence_length: int) -> None:
        self._tokens, self._length = store.tokens, sequence_length

    def __len__(self) -> int:
        return int(row_count(self._tokens, self._length))

    def spans(self, row: int) -> list[Span]:
        """See RowIndex."""
        start = row * self._length
        return [Span(0, start, min(start + self._length + 1, self._tokens))]


class Separate:
    """Every document alone, in one row or, if it is longer, in several of its own."""

    def __init__(self, store: TokenStore, sequence_length: int) -> None:
        self._store, self._length = store, sequence_length
        # Rows before every 1024th document: the index stays small, and the rest is looked up in the store.
        counts = [int(self._rows_of(first)[-1]) for first in range(0, store.documents, _INDEXED_DOCUMENTS)]
        self._before = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._before[-1])

    def spans(self, row: int) -> list[Span]:
        """See RowIndex."""
        block = int(np.searchsorted(self._before, row, side="right")) - 1
        first = block * _INDEXED_DOCUMENTS
        rows, within = self._rows_of(first), row - int(self._before[block])
        i = int(np.searchsorted(rows, within, side="right")) - 1
        start, end = self._bounds(first)[i : i + 2].tolist()
        start += (within - int(rows[i])) * self._length
        return [Span(0, start, min(start + self._length + 1, end))]

    def _bounds(self, first: int) -> np.ndarray:
        return self._store.bounds(first, min(first + _INDEXED_DOCUMENTS, self._store.documents))

    def _rows_of(self, first: int) -> np.ndarray:
        """Rows of these documents up to each one's start, and up to the last one's end."""
        return np.cumsum(np.concatenate([[0], row_count(np.diff(self._bounds(first)), self._length)]))


class _Window(NamedTuple):
    """Rows of some documents: spans (n,) in the order of rows, and where each row's begin, (rows + 1,)."""

    place: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray


class BestFit:
    """Rows of whole documents, each where it fits best: a pure function of the documents' lengths.

    Documents are packed in windows of consecutive ones, longest first, each into the row that it leaves least room in,
    or into a new one. A window is about 64 rows of text, so that the rows that are not full at its end are few; it is
    packed again when one of its rows is asked for, unless it was among the last, so that memory does not grow with the
    corpus. A document of more than L + 1 tokens fills rows of its own, each starting with the last token of the one
    before, and what is left of it is packed. A document of one token predicts nothing, and is in no row. Documents
    start at multiples of `alignment` tokens, which divides L.
    """

    def __init__(self, store: TokenStore, sequence_length: int, alignment: int = 1) -> None:
        self._store, self._length, self._alignment = store, sequence_length, alignment
        # Units of `alignment` places in a row; the last place of a row is one more, which is predicted only.
        self._capacity = (sequence_length + 1) // alignment
        of_window = _ROWS_OF_WINDOW * sequence_length * store.documents // max(store.tokens, 1)
        self._documents = max(of_window, _LEAST_DOCUMENTS)
        self._kept: dict[int, _Window] = {}  # the first was packed first
        self._spans = 0
        counts = [self._rows_in(first) for first in range(0, store.documents, self._documents)]
        self._before = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._before[-1])

    def spans(self, row: int) -> list[Span]:
        """See RowIndex."""
        number = int(np.searchsorted(self._before, row, side="right")) - 1
        window = self._kept.get(number)
        if window is None:
            window = self._kept[number] = self._pack(number * self._documents)
            self._spans += len(window.place)
            while self._spans > _KEPT_SPANS and len(self._kept) > 1:
                self._spans -= len(self._kept.pop(next(iter(self._kept))).place)
        within = row - int(self._before[number])
        one = slice(int(window.first[within]), int(window.first[within + 1]))
        fields = (window.place[one].tolist(), window.start[one].tolist(), window.stop[one].tolist())
        return [Span(*found) for found in zip(*fields, strict=True)]

    def _cut(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Spans of a window's documents in their order: starts and stops in the store, (n,) each."""
        bounds = self._store.bounds(first, min(first + self._documents, self._store.documents))
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

    def _units(self, tokens: np.ndarray) -> np.ndarray:
        return np.minimum(-(-tokens // self._alignment), self._capacity)


def fit(sizes: np.ndarray, capacity: int) -> list[int]:
    """Put spans into as few rows as best fit, longest first, finds; of equal choices the first is taken.

    Takes sizes (n,), each from 1 to the capacity of a row; gives the number of each one's row, (n,).
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


def row_count(tokens: int | np.ndarray, sequence_length: int) -> np.ndarray:
    """Count the rows that so many tokens make, one number or many: every token but the first is predicted."""
    return -(-np.maximum(tokens - 1, 0) // sequence_length)


class PackedDataset:
    """Rows of L + 1 tokens of a store.

    Args:
        store: All documents' tokens, each with the token that ends it.
        sequence_length: L, tokens.
        packing: "concat", "reset" or "none"; with "reset" a model is to keep the documents of a row apart.
        tally: Rows of text that the store was made from, and the bad ones.
        order: "in_order", or for "reset" also "best_fit", see `BestFit`.
        alignment: Documents start at multiples of this, tokens; best fit only.

    Attributes:
        tokens: Tokens of all documents and of what ends them.
        bytes: UTF-8 bytes of the documents' text.
        labels: Tokens that an epoch predicts.
        fingerprint: Hash of the tokens and of where documents end.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        packing: Packing = "concat",
        tally: Tally | None = None,
        *,
        order: PackingOrder = "in_order",
        alignment: int = 1,
    ) -> None:
        self._store = store
        self._index: RowIndex
        if order == "best_fit":
            self._index = BestFit(store, sequence_length, alignment)
        else:
            self._index = (Separate if packing == "none" else Concatenated)(store, sequence_length)
        self.sequence_length, self.packing, self.order, self.alignment = sequence_length, packing, order, alignment
        self.tokens, self.bytes, self.fingerprint = store.tokens, store.bytes, store.fingerprint
        self.labels = store.tokens - (min(1, store.documents) if packing == "concat" else store.documents)
        self.tally = tally or Tally()

    def __len__(self) -> int:
        return len(self._index)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Read rows (n,) by number: (n, L + 1) int64 tokens, and MISSING where there is none.

        None is behind the last token, or a document that the next one's alignment keeps a distance from.
        """
        found = np.full((len(indices), self.sequence_length + 1), MISSING)
        for row, index in zip(found, np.asarray(indices).tolist(), strict=True):
            for place, start, stop in self._index.spans(index):
                self._store.read(start, stop, row[place : place + stop - start])
        return found

    def document_starts(self, indices: np.ndarray) -> np.ndarray:
        """Say where documents start in rows (n,), for a model that keeps them apart: (n, L + 1) bool.

        True where a document's first token stands, or that of what is left of one that was cut, packed behind others.
        A row that goes on with a document has False at its first place, and places without a token are False.
        """
        found = np.zeros((len(indices), self.sequence_length + 1), dtype=bool)
        for row, index in zip(found, np.asarray(indices).tolist(), strict=True):
            for place, start, stop in self._index.spans(index):
                # Documents end where the next one starts.
                starts = self._store.bounds(self._store.document_at(start), self._store.document_at(stop - 1))
                row[place + starts[starts >= start] - start] = True
                row[place] |= place > 0
        return found

    def tokens_per_byte(self, rows: int, text_size: Callable[[np.ndarray], int]) -> float:
        """Tokens, with what ends documents, divided by UTF-8 bytes of the text that the first `rows` rows hold.

        `text_size` gives the bytes of some tokens' text; it is asked of documents that the rows hold in part. Of whole
        ones, the size of the text that was tokenised is known.
        """
        if rows >= len(self):
            return self.tokens / self.bytes
        spans: list[list[int]] = []
        for start, stop in sorted(span[1:] for row in range(rows) for span in self._index.spans(row)):
            if spans and start <= spans[-1][1]:  # the next row begins with the last token of the one before
                spans[-1][1] = max(stop, spans[-1][1])
            else:
                spans.append([start, stop])
        size = sum(self._bytes_between(start, stop, text_size) for start, stop in spans)
        return sum(stop - start for start, stop in spans) / max(size, 1)

    def _bytes_between(self, start: int, stop: int, text_size: Callable[[np.ndarray], int]) -> int:
        """UTF-8 bytes of the text from `start` to below `stop`, of which only the first and last document is cut."""
        first, last = self._store.document_at(start), self._store.document_at(stop - 1)
        bounds, text_ends = self._store.bounds(first, last + 1), self._store.text_ends(max(first - 1, 0), last + 1)
        sizes = np.diff(np.append(0, text_ends) if first == 0 else text_ends)
        for i in {0, last - first}:
            begin, end = max(int(bounds[i]), start), min(int(bounds[i + 1]), stop)
            if (begin, end) != (bounds[i], bounds[i + 1]):
                tokens = np.empty(end - begin - (end == bounds[i + 1]), np.int64)  # without what ends the document
                self._store.read(begin, begin + len(tokens), tokens)
                sizes[i] = min(text_size(tokens), sizes[i])
        return int(sizes.sum())
