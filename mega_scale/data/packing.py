"""From documents to rows of a fixed length.

Shapes: L sequence length, n rows. A row has L + 1 places: 0..L-1 are read, 1..L are predicted. In order, the next row
starts with the last token of the one before, so that in an epoch every token but the first is predicted exactly once
(where documents are kept apart, every token but the first of its document). Places without a token hold `MISSING`.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from mega_scale.data.best_fit import BestFit, Piece
from mega_scale.data.config import Packing, PackingOrder
from mega_scale.data.rows import Tally
from mega_scale.data.token_store import TokenStore

MISSING = -1  # no token
_DOCUMENTS_AT_ONCE = 1024


class Layout(Protocol):
    """Which tokens each row has."""

    def __len__(self) -> int:
        """Number of rows of an epoch."""

    def pieces(self, row: int) -> list[Piece]:
        """What lies in a row, from left to right; in each piece but the first, a document begins or goes on afresh."""


class Concatenated:
    """All documents end to end, cut every L tokens.

    Args:
        store: The documents.
        sequence_length: L, tokens.
    """

    def __init__(self, store: TokenStore, sequence_length: int) -> None:
        self._tokens, self._length = store.tokens, sequence_length

    def __len__(self) -> int:
        return int(row_count(self._tokens, self._length))

    def pieces(self, row: int) -> list[Piece]:
        """See Layout."""
        start = row * self._length
        return [Piece(0, start, min(start + self._length + 1, self._tokens))]


class Separate:
    """Every document alone, in one row or, if it is longer, in several of its own.

    Args:
        store: The documents.
        sequence_length: L, tokens.
    """

    def __init__(self, store: TokenStore, sequence_length: int) -> None:
        self._store, self._length = store, sequence_length
        # Rows before every 1024th document: the index stays small, and the rest is looked up in the store.
        counts = [int(self._rows_of(first)[-1]) for first in range(0, store.documents, _DOCUMENTS_AT_ONCE)]
        self._before = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._before[-1])

    def pieces(self, row: int) -> list[Piece]:
        """See Layout."""
        block = int(np.searchsorted(self._before, row, side="right")) - 1
        first = block * _DOCUMENTS_AT_ONCE
        rows, within = self._rows_of(first), row - int(self._before[block])
        i = int(np.searchsorted(rows, within, side="right")) - 1
        start, end = self._bounds(first)[i : i + 2].tolist()
        start += (within - int(rows[i])) * self._length
        return [Piece(0, start, min(start + self._length + 1, end))]

    def _bounds(self, first: int) -> np.ndarray:
        """Starts of up to 1024 documents, and the last one's end."""
        last = min(first + _DOCUMENTS_AT_ONCE, self._store.documents)
        ends = self._store.ends(max(first - 1, 0), last)
        return np.concatenate([[0], ends]) if first == 0 else ends

    def _rows_of(self, first: int) -> np.ndarray:
        """Rows of these documents up to each one's start, and up to the last one's end."""
        return np.cumsum(np.concatenate([[0], row_count(np.diff(self._bounds(first)), self._length)]))


class PackedDataset:
    """Rows of L + 1 tokens of a store.

    Args:
        store: All documents' tokens, each with the token that ends it.
        sequence_length: L, tokens.
        packing: "concat", "reset" or "none", see `Concatenated` and `Separate`; with "reset" a model is to keep the
            documents of a row apart.
        tally: Rows of text that the store was made from, and the bad ones.
        order: "in_order", or for "reset" also "best_fit", see `mega_scale.data.best_fit`.
        alignment: Documents start at multiples of this, tokens; best fit only.

    Attributes:
        sequence_length: L, tokens.
        packing: How rows are made.
        order: As given.
        alignment: As given.
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
        self._layout: Layout
        if order == "best_fit":
            self._layout = BestFit(store, sequence_length, alignment)
        else:
            self._layout = (Separate if packing == "none" else Concatenated)(store, sequence_length)
        self.sequence_length, self.packing, self.order, self.alignment = sequence_length, packing, order, alignment
        self.tokens, self.bytes, self.fingerprint = store.tokens, store.bytes, store.fingerprint
        self.labels = store.tokens - (min(1, store.documents) if packing == "concat" else store.documents)
        self.tally = tally or Tally()

    def __len__(self) -> int:
        return len(self._layout)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Read rows.

        Args:
            indices: (n,) numbers of rows, 0 to below len(self).

        Returns:
            (n, L + 1) int64 tokens, and MISSING where there is none: behind the last one, or a document that the next
            one's alignment keeps a distance from.
        """
        found = np.full((len(indices), self.sequence_length + 1), MISSING)
        for row, index in zip(found, np.asarray(indices).tolist(), strict=True):
            for place, start, stop in self._layout.pieces(index):
                self._store.read(start, stop, row[place : place + stop - start])
        return found

    def document_starts(self, indices: np.ndarray) -> np.ndarray:
        """Say where documents start in rows, for a model that keeps them apart.

        Args:
            indices: (n,) numbers of rows, 0 to below len(self).

        Returns:
            (n, L + 1) bool: a document's first token stands there, or that of what is left of one that was cut, packed
            behind others. A row that goes on with a document has False at its first place, and places without a token
            are False.
        """
        found = np.zeros((len(indices), self.sequence_length + 1), dtype=bool)
        for row, index in zip(found, np.asarray(indices).tolist(), strict=True):
            for place, start, stop in self._layout.pieces(index):
                # Documents end where the next one starts.
                row[place + self._starts_between(start, stop) - start] = True
                row[place] |= place > 0
        return found

    def tokens_per_byte(self, rows: int, text_size: Callable[[np.ndarray], int]) -> float:
        """Say how many tokens stand for a byte of the text that the first rows hold.

        Args:
            rows: Number of rows; all where there are fewer.
            text_size: UTF-8 bytes of some tokens' text; asked of documents that the rows hold in part. Of whole ones,
                the size of the text that was tokenised is known.

        Returns:
            Tokens, with what ends documents, divided by UTF-8 bytes.
        """
        if rows >= len(self):
            return self.tokens / self.bytes
        spans: list[list[int]] = []
        for start, stop in sorted(piece[1:] for row in range(rows) for piece in self._layout.pieces(row)):
            if spans and start <= spans[-1][1]:  # the next row begins with the last token of the one before
                spans[-1][1] = max(stop, spans[-1][1])
            else:
                spans.append([start, stop])
        size = sum(self._bytes_between(start, stop, text_size) for start, stop in spans)
        return sum(stop - start for start, stop in spans) / max(size, 1)

    def _bytes_between(self, start: int, stop: int, text_size: Callable[[np.ndarray], int]) -> int:
        """UTF-8 bytes of the text from `start` to below `stop`, of which only the first and last document is cut."""
        first, last = self._store.document_at(start), self._store.document_at(stop - 1)
        before = max(first - 1, 0)
        ends, text_ends = self._store.ends(before, last + 1), self._store.text_ends(before, last + 1)
        if first == 0:
            ends, text_ends = np.append(0, ends), np.append(0, text_ends)
        sizes = np.diff(text_ends)
        for i in {0, last - first}:
            begin, end = max(int(ends[i]), start), min(int(ends[i + 1]), stop)
            if (begin, end) != (ends[i], ends[i + 1]):
                tokens = np.empty(end - begin - (end == ends[i + 1]), np.int64)  # without what ends the document
                self._store.read(begin, begin + len(tokens), tokens)
                sizes[i] = min(text_size(tokens), sizes[i])
        return int(sizes.sum())

    def _starts_between(self, start: int, stop: int) -> np.ndarray:
        """Places of documents' first tokens from `start` to below `stop`."""
        first, last = self._store.document_at(start), self._store.document_at(stop - 1)
        ends = self._store.ends(max(first - 1, 0), last)
        starts = np.concatenate([[0], ends]) if first == 0 else ends
        return starts[starts >= start]


def row_count(tokens: int | np.ndarray, sequence_length: int) -> np.ndarray:
    """Count the rows that so many tokens make, one number or many: every token but the first is predicted."""
    return -(-np.maximum(tokens - 1, 0) // sequence_length)
