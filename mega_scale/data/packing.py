"""From documents to rows of a fixed length: stored, of a stream, or of several datasets by weight.

A row has L + 1 places (L sequence length): 0..L-1 are read, 1..L are predicted. In order, the next row starts with the
last token of the one before, so that in an epoch every token but the first is predicted exactly once (with packing
"reset", every token but the first of its document). Places without a token hold `MISSING`.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from mega_scale.data.config import Packing, PackingOrder
from mega_scale.data.sources import Documents, Tally, shuffled
from mega_scale.data.tokenizer import encode
from mega_scale.data.tokens import TokenStore

MISSING = -1  # no token
_KEPT_SPANS = 1 << 18  # about, of 24 bytes each
_FINGERPRINTED = 64  # rows of a stream


# Rows of stored documents


class PackedDataset:
    """Rows of L + 1 tokens of a store; with packing "reset" a model is to keep the documents of a row apart.

    With `order` "best_fit" rows hold whole documents, see `_Windows`, that start at multiples of `alignment` tokens.
    `tally` counts the rows of text that the store was made from, `labels` the tokens that an epoch predicts; `tokens`,
    `bytes` and `fingerprint` are the store's. `parts` are the same documents in several datasets, by name, if any.
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
        parts: "Mapping[str, PackedDataset] | None" = None,
    ) -> None:
        self.parts = dict(parts or {})
        self._store, self._windows = store, None
        if order == "best_fit" or packing == "none":
            self._windows = _Windows(store, sequence_length, alignment, best_fit=order == "best_fit")
        self.sequence_length, self.packing, self.order, self.alignment = sequence_length, packing, order, alignment
        self.tokens, self.bytes, self.fingerprint = store.tokens, store.bytes, store.fingerprint
        self.labels = store.tokens - (min(1, store.documents) if packing == "concat" else store.documents)
        self.tally = tally or Tally()

    def __len__(self) -> int:
        in_order = -(-max(self.tokens - 1, 0) // self.sequence_length)
        return in_order if self._windows is None else int(self._windows.before[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Read rows (n,) by number: (n, L + 1) int64 tokens."""
        found = np.full((len(indices), self.sequence_length + 1), MISSING)
        for row, place, start, stop in self._spans(indices):
            self._store.read(start, stop, found[row, place : place + stop - start])
        return found

    def document_starts(self, indices: np.ndarray) -> np.ndarray:
        """Say where documents start in rows (n,), for a model that keeps them apart: (n, L + 1) bool.

        True where a document's first token stands, or that of what is left of one that was cut, packed behind others.
        A row that goes on with a document has False at its first place, and places without a token are False.
        """
        found = np.zeros((len(indices), self.sequence_length + 1), bool)
        for row, place, start, stop in self._spans(indices):
            # Documents end where the next one starts.
            starts = self._store.bounds(self._store.document_at(start), self._store.document_at(stop - 1))
            found[row, place + starts[starts >= start] - start] = True
            found[row, place] |= place > 0
        return found

    def tokens_per_byte(self, rows: int, text_size: Callable[[np.ndarray], int]) -> float:
        """Tokens, with what ends documents, divided by UTF-8 bytes of the text that the first `rows` rows hold.

        `text_size` gives the bytes of some tokens' text; it is asked of documents that the rows hold in part. Of whole
        ones, the size of the text that was tokenised is known.
        """
        if rows >= len(self):
            return self.tokens / self.bytes
        joined: list[list[int]] = []
        for start, stop in sorted((start, stop) for _, _, start, stop in self._spans(range(rows))):
            if joined and start <= joined[-1][1]:  # the next row begins with the last token of the one before
                joined[-1][1] = max(stop, joined[-1][1])
            else:
                joined.append([start, stop])
        size = 0
        for start, stop in joined:
            first, last = self._store.document_at(start), self._store.document_at(stop - 1)
            bounds = self._store.bounds(first, last + 1)
            sizes = np.diff(self._store.bounds(first, last + 1, "text_ends"))
            for i in {0, last - first}:  # only the first and the last document may be cut
                begin, end = max(int(bounds[i]), start), min(int(bounds[i + 1]), stop)
                if (begin, end) != (bounds[i], bounds[i + 1]):
                    tokens = np.empty(end - begin - (end == bounds[i + 1]), np.int64)  # without what ends the document
                    self._store.read(begin, begin + len(tokens), tokens)
                    sizes[i] = min(text_size(tokens), sizes[i])
            size += int(sizes.sum())
        return sum(stop - start for start, stop in joined) / max(size, 1)

    def _spans(self, indices: Iterable[int]) -> Iterator[tuple[int, int, int, int]]:
        """What lies in rows, from left to right: which of them, a place, and tokens start to below stop of the store.

        In each span but the first of a row, a document begins or goes on afresh.
        """
        for row, index in enumerate(indices):
            if self._windows is not None:
                for place, start, stop in self._windows.spans(index):
                    yield row, place, start, stop
            else:
                start = int(index) * self.sequence_length
                yield row, 0, start, min(start + self.sequence_length + 1, self.tokens)


class _Windows:
    """Rows of whole documents, packed in windows of consecutive ones: a pure function of the documents' lengths.

    A document of more than L + 1 tokens is cut, each part starting with the last token of the one before; one of one
    token predicts nothing, and is in no row. By best fit, the parts in a window are packed longest first, each into the
    row that it leaves least room in, or into a new one; else every part is a row.

    A window is packed again when one of its rows is asked for, unless it was among the last, so that memory does not
    grow with the corpus. It is about 64 rows of text, so that few rows are not full at its end.
    """

    def __init__(self, store: TokenStore, sequence_length: int, alignment: int, *, best_fit: bool) -> None:
        self._store, self._length, self._alignment, self._best_fit = store, sequence_length, alignment, best_fit
        # Units of `alignment` places in a row; the last place of a row is one more, which is predicted only.
        self._capacity = (sequence_length + 1) // alignment
        documents = (64 if best_fit else 1024) * sequence_length * store.documents // max(store.tokens, 1)
        self._documents = max(documents if best_fit else min(documents, 1024), 64)
        self._packed = lru_cache(max(1, _KEPT_SPANS // self._documents))(self._pack)
        counts = [self._fit(first)[2].max(initial=-1) + 1 for first in range(0, store.documents, self._documents)]
        self.before = np.cumsum([0, *counts])  # rows before each window, and all

    def spans(self, row: int) -> Any:
        number = int(np.searchsorted(self.before, row, side="right")) - 1
        spans, begins = self._packed(number)
        within = row - int(self.before[number])
        return spans[begins[within] : begins[within + 1]].tolist()

    def _pack(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Spans of a window row by row, (n, 3), and where those of each row begin, (rows + 1,)."""
        starts, stops, rows, units = self._fit(number * self._documents)
        # In a row, documents stand in the order of the corpus.
        order = rows.argsort(kind="stable")
        begins = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))
        filled = np.cumsum(units[order]) - units[order]
        places = (filled - filled[begins[:-1]][rows[order]]) * self._alignment
        return np.stack([places, starts[order], stops[order]], axis=1), begins

    def _fit(self, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Spans of a window's documents in their order: start, stop, row and units, (n,) each."""
        bounds = self._store.bounds(first, min(first + self._documents, self._store.documents))
        counts = -(-(np.diff(bounds) - 1) // self._length)
        which = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = bounds[which] + number * self._length
        stops = np.minimum(starts + self._length + 1, bounds[which + 1])
        units = np.minimum(-(-(stops - starts) // self._alignment), self._capacity)
        rows = np.array(fit(units, self._capacity), np.int64) if self._best_fit else np.arange(len(units))
        return starts, stops, rows, units


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


# Rows of a stream


class StreamedDataset:
    """Rows of L + 1 tokens, cut from documents that are read again at every epoch: those that packing would store.

    Rows are numbered over all epochs, without end. Ascending, they cost one pass over the text; going back, or resuming
    far from the start, reads it again from the epoch's start. `buffer` texts are held in memory to draw from when
    shuffling. `fingerprint` is a hash of the first rows' tokens in the corpus's own order, `tally` counts the rows of
    text that this process has read in this epoch.
    """

    tokens: None = None  # how many there are is not known
    order: PackingOrder = "in_order"
    alignment = 1

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        packing: Packing = "concat",
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer: int = 1,
        add_bos: bool = False,
    ) -> None:
        self._documents, self._tokenizer, self._add_bos = documents, tokenizer, add_bos
        self.sequence_length, self.packing = sequence_length, packing
        self.shuffle, self._seed, self._buffer = shuffle, seed, buffer
        self.tally = documents.tally
        self._epoch_rows: int | None = None  # known when the text has been read to its end
        first = list(islice(self._cut(documents), _FINGERPRINTED))
        if not first or (packing == "concat" and MISSING in first[0]):
            raise ValueError(
                f"the text to train on has less than one row of data.sequence_length={sequence_length} + 1 tokens: "
                "give more text, or a shorter sequence_length"
            )
        self.fingerprint = f"stream-{xxhash.xxh3_128_hexdigest(np.concatenate(first).data)}"
        self._start(0)

    def holds(self, count: int) -> bool:
        """Say whether an epoch has at least `count` rows; reads no further than those."""
        if self._epoch_rows is None:
            self._row(count - 1)
            # Begun anew: processes that are forked later must not share the place in an open file.
            self._start(0)
        return self._epoch_rows is None or self._epoch_rows >= count

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Read rows (n,) by number, over all epochs: (n, L + 1) int64 tokens, and MISSING behind the last one."""
        return np.stack([self._row(index) for index in np.asarray(indices).tolist()])

    def _row(self, index: int) -> np.ndarray:
        epoch, within = (0, index) if self._epoch_rows is None else divmod(index, self._epoch_rows)
        if epoch != self._epoch or within < self._cursor:
            self._start(epoch)
        for found in self._rows:
            self._cursor += 1
            if self._cursor > within:
                return found
        assert self._epoch_rows is None, "the text became shorter while it was read"
        self._epoch_rows = self._cursor
        return self._row(index)

    def _start(self, epoch: int) -> None:
        """Go to the first row of an epoch."""
        texts: Iterable[str] = self._documents
        if self.shuffle:
            texts = self._documents.shuffled(self._seed, epoch, self._buffer)
        self._epoch, self._cursor, self._rows = epoch, 0, self._cut(texts)

    def _cut(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        encoded = encode(texts, self._tokenizer, self._add_bos)
        if self.packing == "concat":
            return cut_rows((found.tokens for found in encoded), self.sequence_length)
        documents = (tokens for found in encoded for tokens in np.split(found.tokens, found.ends[:-1]))
        return chain.from_iterable(cut_rows([tokens], self.sequence_length) for tokens in documents)


def cut_rows(pieces: Iterable[np.ndarray], sequence_length: int) -> Iterator[np.ndarray]:
    """Cut tokens, end to end, into rows (L + 1,) int64, each starting with the last token of the one before."""
    rest = np.empty(0, np.int64)
    for piece in pieces:
        tokens = np.concatenate([rest, piece.astype(np.int64)])
        used = max(len(tokens) - 1, 0) // sequence_length * sequence_length
        for start in range(0, used, sequence_length):
            yield tokens[start : start + sequence_length + 1]
        rest = tokens[used:]
    if len(rest) > 1:
        yield np.pad(rest, (0, sequence_length + 1 - len(rest)), constant_values=MISSING)


# Rows of several datasets by weight

Dataset = PackedDataset | StreamedDataset


class Mixture:
    """Rows of one or more datasets of the same length, numbered over all epochs without end; each has its own epochs.

    `weights` are the shares of the rows by name, above 0. Which dataset a row comes from follows from its number alone,
    in exact arithmetic: after any number of rows every dataset is within a few rows of its share, and after as many as
    whole weights add up to, exactly at it. `tokens` counts an epoch of all datasets, None with a stream; `lengths` are
    the rows of an epoch by name, but for streams. `fingerprint` is of all datasets and their weights.
    """

    def __init__(self, datasets: Mapping[str, Dataset], weights: Mapping[str, Fraction | int] | None = None) -> None:
        self.datasets = dict(datasets)
        first, *others = self.datasets.values()
        self.sequence_length, self.packing, self.fingerprint = first.sequence_length, first.packing, first.fingerprint
        stored = ((name, dataset) for name, dataset in datasets.items() if isinstance(dataset, PackedDataset))
        self.lengths = {name: len(dataset) for name, dataset in stored}
        sizes = [dataset.tokens for dataset in (first, *others)]
        self.tokens = None if None in sizes else sum(size for size in sizes if size is not None)
        shares = [Fraction(1 if weights is None else weights[name]) for name in self.datasets]
        if others:
            named = zip(self.datasets.items(), shares, strict=True)
            described = " ".join(f"{name} {share} {dataset.fingerprint}" for (name, dataset), share in named)
            self.fingerprint = f"mixture-{xxhash.xxh3_128_hexdigest(described.encode())}"
        # Datasets are the leaves of a binary tree, in which light ones are joined first, as in a Huffman code. A node
        # has the number of its right child, and in the end the root that of the first split.
        whole = math.lcm(*(share.denominator for share in shares))
        heap = [(int(share * whole), i) for i, share in enumerate(shares)]
        heapq.heapify(heap)
        self._splits: list[tuple[int, int, int, int]] = []
        while len(heap) > 1:
            (right_weight, right), (left_weight, left) = heapq.heappop(heap), heapq.heappop(heap)
            self._splits.insert(0, (right, left, left_weight, left_weight + right_weight))
            heapq.heappush(heap, (left_weight + right_weight, right))

    def counts(self, rows: Any) -> list[Any]:
        """Count how many of the first `rows` of the run each dataset has; an integer, or an array of Python's.

        Of the first n rows of a node, its left child has floor(n w_left / w + 1/2).
        """
        found = [rows] * len(self.datasets)
        for right, left, left_weight, weight in self._splits:
            found[left] = (2 * found[right] * left_weight + weight) // (2 * weight)
            found[right] = found[right] - found[left]
        return found

    def read(self, first: int, count: int, seed: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Read `count` rows of the run (n, L + 1): int64 tokens, and MISSING where there is none.

        With packing "reset" also where documents start, bool, see `PackedDataset.document_starts`. Every epoch of a
        dataset has an order of its own, chosen by `seed`, unless `shuffle` is false; a stream has its own order.
        """
        found = np.empty((count, self.sequence_length + 1), np.int64)
        starts = np.empty(found.shape, bool) if self.packing == "reset" else None
        located = self.counts(np.array(range(first, first + count + 1), dtype=object))
        for (name, dataset), before in zip(self.datasets.items(), located, strict=True):
            at = np.flatnonzero(np.diff(before))
            indices = before[at].astype(np.int64)
            if length := self.lengths.get(name):
                epochs, indices = np.divmod(indices, length)
                for epoch in np.unique(epochs).tolist() if shuffle else ():
                    indices[epochs == epoch] = shuffled(indices[epochs == epoch], length, seed, epoch)
            if len(at):
                found[at] = dataset.rows(indices)
                if starts is not None and isinstance(dataset, PackedDataset):
                    starts[at] = dataset.document_starts(indices)
        return found, starts

    def tally(self) -> Tally:
        """Count the rows of text that were read, and the bad ones, as far as the text has been read."""
        total = Tally()
        for dataset in self.datasets.values():
            total.merge(dataset.tally)
        return total
