"""Where documents start in the rows that a loader delivers, however rows and shards cut them."""

import numpy as np
import pytest
import torch
from stores import store_of

from mega_scale.data import Loader, PackedDataset

L = 8
# Ends on, before and after the borders of rows, documents of one and two tokens, and one longer than three rows.
LENGTHS = [8, 7, 1, 9, 2, 2, 30, 5, 8, 8, 1, 1, 15]


def naive_rows(lengths: list[int], packing: str) -> list[list[tuple[int, int]]]:
    """(document, offset) of every place of every row."""
    documents = [[(i, offset) for offset in range(length)] for i, length in enumerate(lengths)]
    streams = documents if packing == "none" else [[place for document in documents for place in document]]
    return [stream[start : start + L + 1] for stream in streams for start in range(0, len(stream) - 1, L)]


def batches(packing: str, cuts: list[int], shuffle: bool) -> list[tuple[dict, torch.Tensor]]:
    tokens = np.concatenate([100 * i + np.arange(length) for i, length in enumerate(LENGTHS)])
    dataset = PackedDataset(store_of(tokens, LENGTHS, cuts), L, packing)
    loader = Loader(dataset, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1, shuffle=shuffle)
    pairs = []
    for step in range(12):
        rows = [range(first, first + 2) for first in (4 * step, 4 * step + 2)]
        starts = [torch.from_numpy(loader.dataset.document_starts(numbers, 0, shuffle)) for numbers in rows]
        pairs += zip(loader.batches(step), starts, strict=True)
    return pairs


@pytest.mark.parametrize("cuts", [[], [1], [3, 4, 9]])
@pytest.mark.parametrize("packing", ["concat", "none"])
def test_starts_are_where_documents_start(packing, cuts):
    rows = naive_rows(LENGTHS, packing)
    found = batches(packing, cuts, shuffle=False)
    flat = [
        (row, starts) for batch, marks in found for row, starts in zip(batch["input_ids"], marks, strict=True)
    ]  # fmt: skip
    assert len(flat) > 2 * len(rows)
    for k, (row, starts) in enumerate(flat):
        expected = rows[k % len(rows)]
        assert row[: len(expected) - 1].tolist() == [100 * i + offset for i, offset in expected[: len(expected) - 1]]
        assert starts.tolist() == [offset == 0 for _, offset in expected] + [False] * (L + 1 - len(expected))


def test_batches_keep_documents_apart():
    tokens = np.concatenate([100 * i + np.arange(length) for i, length in enumerate(LENGTHS)])
    dataset = PackedDataset(store_of(tokens, LENGTHS, [2, 7]), L, "reset")
    loader = Loader(dataset, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1)
    for batch in [batch for step in range(12) for batch in loader.batches(step)]:
        inputs, labels, starts = batch["input_ids"], batch["shift_labels"], batch["document_starts"]
        there = inputs > 0
        assert torch.equal(starts[there], (inputs % 100 == 0)[there])
        # A label is of its input's document, and is its next token.
        kept = labels != -100
        assert torch.equal(labels[kept], inputs[kept] + 1)
        ends = torch.tensor([100 * i + length - 1 for i, length in enumerate(LENGTHS)])
        assert torch.equal(~kept[there], torch.isin(inputs, ends)[there])


def test_rows_of_separate_documents_are_counted_across_blocks():
    lengths = np.random.default_rng(1).integers(1, 40, size=3000)
    tokens = np.concatenate([64 * i + np.arange(length) for i, length in enumerate(lengths)])
    dataset = PackedDataset(store_of(tokens, lengths, [500, 2500]), L, "none")
    assert len(dataset) == sum(-(-(length - 1) // L) for length in lengths)
    assert dataset.labels == lengths.sum() - 3000
    rows = dataset.rows(np.arange(len(dataset)))
    labels = rows[:, 1:][rows[:, 1:] >= 0]
    assert labels.tolist() == [64 * i + offset for i, length in enumerate(lengths) for offset in range(1, length)]
