"""Rows of several sources by weight: which source has a row of the run, and which of its rows it is.

Both are computed from the number of the row alone, in exact arithmetic. Sources are the leaves of a binary tree; of the
first n rows of a node, its left child has floor(n w_left / w + 1/2). So after any number of rows every source is
within a few rows of its share, and after as many rows as the (whole) weights add up to, exactly at it.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from mega_scale.data.packing import PackedDataset
from mega_scale.data.rows import Tally
from mega_scale.data.sources import shuffled
from mega_scale.data.streaming import StreamedDataset
from mega_scale.data.token_files import hash_of

Dataset = PackedDataset | StreamedDataset


@dataclass(frozen=True)
class _Node:
    weight: int
    source: int = -1  # of a leaf
    children: "tuple[_Node, ...]" = ()  # two, or none

    def left(self, rows: int) -> int:
        """How many of the node's first rows its left child has."""
        return (2 * rows * self.children[0].weight + self.weight) // (2 * self.weight)


class Schedule:
    """Which source each row comes from.

    Args:
        weights: Shares of the rows, each above 0; they need not add up to 1.
    """

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        shares = [Fraction(weight) for weight in weights]
        whole = math.lcm(*(share.denominator for share in shares))
        # Light sources are joined first, as in a Huffman code: no source is far from the root for its weight.
        heap = [(int(share * whole), i, _Node(int(share * whole), i)) for i, share in enumerate(shares)]
        heapq.heapify(heap)
        while len(heap) > 1:
            light, order, right = heapq.heappop(heap)
            heavy, _, left = heapq.heappop(heap)
            heapq.heappush(heap, (light + heavy, order, _Node(light + heavy, children=(left, right))))
        self._root, self._sources = heap[0][2], len(shares)

    def locate(self, row: int) -> tuple[int, int]:
        """Find a row.

        Args:
            row: Its number in the run.

        Returns:
            The number of its source, and how many rows of that source come before it.
        """
        node = self._root
        while node.children:
            before = node.left(row)
            if node.left(row + 1) > before:
                node, row = node.children[0], before
            else:
                node, row = node.children[1], row - before
        return node.source, row

    def counts(self, rows: int) -> list[int]:
        """Count how many of the first rows each source has."""
        found = [0] * self._sources
        waiting = [(self._root, rows)]
        while waiting:
            node, count = waiting.pop()
            if not node.children:
                found[node.source] = count
            else:
                left = node.left(count)
                waiting += zip(node.children, (left, count - left), strict=True)
        return found


class Mixture:
    """Rows of one or more datasets, numbered over all epochs without end; each dataset has epochs of its own.

    Args:
        datasets: By name; all of the same sequence length.
        weights: Share of the rows by name; None where there is one dataset.

    Attributes:
        sequence_length: L, tokens.
        tokens: Tokens of an epoch of all datasets; None with a stream.
        fingerprint: Hash of all datasets and their weights; a single dataset's own.
    """

    def __init__(self, datasets: Mapping[str, Dataset], weights: Mapping[str, Fraction | int] | None = None) -> None:
        self.datasets = dict(datasets)
        shares = [1 if weights is None else weights[name] for name in self.datasets]
        self._schedule = Schedule(shares)
        found = list(self.datasets.values())
        self.sequence_length = found[0].sequence_length
        sizes = [dataset.tokens for dataset in found]
        self.tokens = None if None in sizes else sum(size for size in sizes if size is not None)
        self.fingerprint = found[0].fingerprint
        if len(found) > 1:
            described = " ".join(
                f"{name} {share} {dataset.fingerprint}"
                for (name, dataset), share in zip(self.datasets.items(), shares, strict=True)
            )
            self.fingerprint = f"mixture-{hash_of(np.frombuffer(described.encode(), np.uint8))}"

    def rows(self, numbers: Sequence[int], seed: int, shuffle: bool) -> np.ndarray:
        """Read rows.

        Args:
            numbers: (n,) numbers of rows of the run, ascending.
            seed: Chooses the orders of the epochs.
            shuffle: Order every epoch of a dataset anew; streams have their own order.

        Returns:
            (n, L + 1) int64 tokens, and MISSING behind a row's last one.
        """
        found = np.empty((len(numbers), self.sequence_length + 1), np.int64)
        for name, at, indices in self._by_dataset(numbers):
            dataset = self.datasets[name]
            found[at] = dataset.rows(places(dataset, indices, seed, shuffle))
        return found

    def document_starts(self, numbers: Sequence[int], seed: int, shuffle: bool) -> np.ndarray:
        """Say where documents start in rows, see `PackedDataset.document_starts`.

        Args:
            numbers: (n,) numbers of rows of the run.
            seed: As for `rows`.
            shuffle: As for `rows`.

        Returns:
            (n, L + 1) bool.

        Raises:
            ValueError: A dataset is a stream, which does not know them.
        """
        found = np.empty((len(numbers), self.sequence_length + 1), bool)
        for name, at, indices in self._by_dataset(numbers):
            dataset = self.datasets[name]
            if isinstance(dataset, StreamedDataset):
                raise ValueError("data.streaming=True: a stream does not keep where documents start; prepare the data")
            found[at] = dataset.document_starts(places(dataset, indices, seed, shuffle))
        return found

    def progress(self, rows: int) -> dict[str, dict[str, Any]]:
        """Say how far a run has read each dataset.

        Args:
            rows: Rows read before.

        Returns:
            By name: `rows`, `epochs` (a fraction; None for a stream) and `tokens` predicted, which is exact where an
            epoch ends and else that share of an epoch (None for a stream whose rows are not full).
        """
        found: dict[str, dict[str, Any]] = {}
        for (name, dataset), count in zip(self.datasets.items(), self._schedule.counts(rows), strict=True):
            if isinstance(dataset, StreamedDataset):
                tokens = count * self.sequence_length if dataset.packing == "concat" else None
                found[name] = {"rows": count, "epochs": None, "tokens": tokens}
            else:
                exact = Fraction(count * dataset.labels, len(dataset))
                found[name] = {"rows": count, "epochs": count / len(dataset), "tokens": round(exact)}
        return found

    def tally(self) -> Tally:
        """Count the rows of text that were read, and the bad ones, as far as the text has been read."""
        total = Tally()
        for dataset in self.datasets.values():
            total.merge(dataset.tally)
        return total

    def _by_dataset(self, numbers: Sequence[int]) -> list[tuple[str, list[int], np.ndarray]]:
        """Which of the rows each dataset has, and the numbers that they have there."""
        located = [self._schedule.locate(number) for number in numbers]
        found = []
        for i, name in enumerate(self.datasets):
            at = [k for k, (source, _) in enumerate(located) if source == i]
            if at:
                found.append((name, at, np.array([located[k][1] for k in at])))
        return found


def places(dataset: Dataset, indices: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
    """Find where rows that are numbered over all epochs stand in a dataset; a stream numbers its own without end."""
    if isinstance(dataset, StreamedDataset):
        return indices
    epochs, found = np.divmod(indices, len(dataset))
    if shuffle:
        for epoch in np.unique(epochs).tolist():
            found[epochs == epoch] = shuffled(found[epochs == epoch], len(dataset), seed, epoch)
    return found
