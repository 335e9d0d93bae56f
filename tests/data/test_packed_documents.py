"""Packing reset: every token is predicted from its own document, once an epoch, in one order, at every length."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from stores import store_of

from mega_scale.data import LengthSchedule, Loader, Mixture, PackedDataset, validation_batches

L = 64
GLOBAL = 24
LENGTHS = np.random.default_rng(0).lognormal(3, 1, 3_000).astype(int) + 1
SPLIT = 2_000  # documents of the first source
STAGES = [[0, 16], [11, 32], [40, 64], [90, 16]]
WAYS = {
    "in_order": {},
    "best_fit": {"order": "best_fit"},
    "best_fit-aligned": {"order": "best_fit", "alignment": 16},
}


def mixture_of(way: str) -> Mixture:
    """Two sources, read once and twice; a token is its document's number times 4096 plus its offset."""
    tokens = np.concatenate([4096 * i + np.arange(length) for i, length in enumerate(LENGTHS)])
    place = int(LENGTHS[:SPLIT].sum())
    first = PackedDataset(store_of(tokens[:place], LENGTHS[:SPLIT], cuts=[300, 1800]), L, "reset", **WAYS[way])
    second = PackedDataset(store_of(tokens[place:], LENGTHS[SPLIT:]), L, "reset", **WAYS[way])
    return Mixture({"first": first, "second": second}, {"first": len(first), "second": 2 * len(second)})


def rows_of(mixture, world, workers, steps, schedule, state=None) -> dict[str, torch.Tensor]:
    """What all ranks read, in the order of the global batch, as pairs: input, label and start, each (tokens,)."""
    loaders = [
        Loader(
            mixture, global_batch_size=GLOBAL, micro_batch_size=GLOBAL // world // 2, rank=rank, world_size=world,
            seed=5, workers=workers, lengths=LengthSchedule(STAGES, L) if schedule else None,
        )
        for rank in range(world)
    ]  # fmt: skip
    found = {"input_ids": [], "shift_labels": [], "document_starts": []}
    for loader in loaders:
        if state is not None:
            loader.check(state)
    for step in steps:
        length = LengthSchedule(STAGES, L).at(step) if schedule else L
        for micro in zip(*(loader.batches(step) for loader in loaders), strict=True):
            for batch in micro:
                for name, parts in found.items():
                    assert batch[name].shape == (GLOBAL // world // 2 * (L // length), length)
                    parts.append(batch[name].flatten())
    for loader in loaders:
        loader.close()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.fixture(scope="module", params=WAYS)
def mixture(request) -> Mixture:
    return mixture_of(request.param)


def epoch_of(mixture: Mixture) -> int:
    return len(mixture.datasets["first"]) + 2 * len(mixture.datasets["second"])


@pytest.fixture(scope="module")
def reference(mixture) -> dict[str, torch.Tensor]:
    return rows_of(mixture, 1, 0, range(-(-2 * epoch_of(mixture) // GLOBAL)), schedule=False)


def test_two_epochs_predict_every_document_and_offset_as_often_as_weighted(mixture, reference):
    for epochs in (1, 2):
        places = epochs * epoch_of(mixture) * L
        inputs, labels = (reference[name][:places] for name in ("input_ids", "shift_labels"))
        predicted = labels != -100
        assert torch.equal(labels[predicted], inputs[predicted] + 1)  # of its own document
        expected = Counter()
        for i, length in enumerate(LENGTHS.tolist()):
            expected.update(dict.fromkeys(range(4096 * i + 1, 4096 * i + length), epochs * (1 if i < SPLIT else 2)))
        assert Counter(labels[predicted].tolist()) == expected
        assert int(predicted.sum()) == epochs * sum(
            (1, 2)[i] * data.labels for i, data in enumerate(mixture.datasets.values())
        )


def test_starts_are_where_the_input_does_not_follow_the_one_before(mixture, reference):
    inputs, starts = (reference[name].view(-1, L) for name in ("input_ids", "document_starts"))
    there = inputs[:, 1:] != 0  # document 0's first token aside
    follows = inputs[:, 1:] == inputs[:, :-1] + 1
    assert torch.equal(starts[:, 1:][there], ~follows[there])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 2)])
def test_ranks_workers_and_lengths_do_not_change_the_order(world, workers, schedule, mixture, reference):
    steps = range(110) if schedule else range(50)  # all stages
    found = rows_of(mixture, world, workers, steps, schedule)
    for name, tensor in found.items():
        assert torch.equal(tensor, reference[name][: len(tensor)]), name


@pytest.mark.slow
def test_three_resumes_on_other_numbers_of_ranks_go_on_with_the_next_row(mixture, reference):
    steps, found, state = len(reference["input_ids"]) // (GLOBAL * L), [], None
    borders = [0, 12, steps // 2, steps // 2 + 1, steps]
    for world, workers, start, stop in zip((2, 4, 1, 3), (0, 2, 0, 0), borders, borders[1:], strict=False):
        found.append(rows_of(mixture, world, workers, range(start, stop), True, state))
        loader = Loader(mixture, global_batch_size=GLOBAL, micro_batch_size=GLOBAL, rank=0, world_size=1, seed=5)
        state = json.loads(json.dumps(loader.state_dict(stop)))
    for name, tensor in reference.items():
        assert torch.equal(torch.cat([part[name] for part in found]), tensor), name


def test_progress_padding_and_length_are_reported(mixture):
    first, second = mixture.datasets["first"], mixture.datasets["second"]
    stages = LengthSchedule(STAGES, L)
    loader = Loader(mixture, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1, lengths=stages)
    steps = epoch_of(mixture)
    report = loader.report(steps)
    assert report["padding"] == pytest.approx(1 - (first.labels + 2 * second.labels) / (steps * L))
    assert (report["tokens/first"], report["epochs/second"], report["sequence_length"]) == (first.labels, 2.0, 16)
    assert [loader.report(step)["sequence_length"] for step in (0, 11, 12, 41)] == [16, 16, 32, 64]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"order": "in_order"}, "data.packing_order='in_order'.*'best_fit'"),
        ({"alignment": 8}, "data.document_alignment=8"),
    ],
)
def test_resuming_with_other_rows_is_refused(keys, named):
    tokens, lengths = np.arange(4000), [40] * 100
    same = {"order": "best_fit"}

    def loader(**keys) -> Loader:
        data = PackedDataset(store_of(tokens, lengths), L, "reset", **(same | keys))
        return Loader(data, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1)

    loader().check(loader().state_dict(2))
    with pytest.raises(ValueError, match=named):
        loader(**keys).check(loader().state_dict(2))


def test_a_checkpoint_from_before_these_keys_goes_on():
    data = PackedDataset(store_of(np.arange(4000), [40] * 100), L)
    loader = Loader(data, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1)
    state = loader.state_dict(2)
    del state["packing_order"], state["document_alignment"]
    loader.check(state)


@pytest.mark.parametrize("way", WAYS)
def test_validation_is_packed_alike(way):
    data = PackedDataset(store_of(np.arange(4000) + 1, [40] * 100), L, "reset", **WAYS[way])
    batches = [batch for rank in range(3) for batch in validation_batches(data, len(data), 2, rank, 3)]
    labels = torch.cat([batch["shift_labels"] for batch in batches])
    inputs = torch.cat([batch["input_ids"] for batch in batches])
    starts = torch.cat([batch["document_starts"] for batch in batches])
    counted = labels != -100
    assert sorted(labels[counted].tolist()) == [i + 1 for i in range(4000) if i % 40]
    assert torch.equal(labels[counted], inputs[counted] + 1)
    assert starts.dtype == torch.bool and starts.sum() >= len(data) and not starts[(inputs == 0)].any()


SHORT = 8
# Ends on, before and after the borders of rows, documents of one and two tokens, and one longer than three rows.
CUT_LENGTHS = [8, 7, 1, 9, 2, 2, 30, 5, 8, 8, 1, 1, 15]


def naive_rows(lengths: list[int], packing: str) -> list[list[tuple[int, int]]]:
    """(document, offset) of every place of every row."""
    documents = [[(i, offset) for offset in range(length)] for i, length in enumerate(lengths)]
    streams = documents if packing == "none" else [[place for document in documents for place in document]]
    return [stream[start : start + SHORT + 1] for stream in streams for start in range(0, len(stream) - 1, SHORT)]


def batches(packing: str, cuts: list[int]) -> list[tuple[dict, torch.Tensor]]:
    tokens = np.concatenate([100 * i + np.arange(length) for i, length in enumerate(CUT_LENGTHS)])
    dataset = PackedDataset(store_of(tokens, CUT_LENGTHS, cuts), SHORT, packing)
    loader = Loader(dataset, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1, shuffle=False)
    pairs = []
    for step in range(12):
        rows = [np.arange(first, first + 2) % len(dataset) for first in (4 * step, 4 * step + 2)]
        starts = [torch.from_numpy(dataset.document_starts(numbers)) for numbers in rows]
        pairs += zip(loader.batches(step), starts, strict=True)
    return pairs


@pytest.mark.parametrize("cuts", [[], [1], [3, 4, 9]])
@pytest.mark.parametrize("packing", ["concat", "none"])
def test_starts_are_where_documents_start(packing, cuts):
    rows = naive_rows(CUT_LENGTHS, packing)
    found = batches(packing, cuts)
    flat = [
        (row, starts) for batch, marks in found for row, starts in zip(batch["input_ids"], marks, strict=True)
    ]  # fmt: skip
    assert len(flat) > 2 * len(rows)
    for k, (row, starts) in enumerate(flat):
        expected = rows[k % len(rows)]
        assert row[: len(expected) - 1].tolist() == [100 * i + offset for i, offset in expected[: len(expected) - 1]]
        assert starts.tolist() == [offset == 0 for _, offset in expected] + [False] * (SHORT + 1 - len(expected))


def test_batches_keep_documents_apart():
    tokens = np.concatenate([100 * i + np.arange(length) for i, length in enumerate(CUT_LENGTHS)])
    dataset = PackedDataset(store_of(tokens, CUT_LENGTHS, [2, 7]), SHORT, "reset")
    loader = Loader(dataset, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1)
    for batch in [batch for step in range(12) for batch in loader.batches(step)]:
        inputs, labels, starts = batch["input_ids"], batch["shift_labels"], batch["document_starts"]
        there = inputs > 0
        assert torch.equal(starts[there], (inputs % 100 == 0)[there])
        # A label is of its input's document, and is its next token.
        kept = labels != -100
        assert torch.equal(labels[kept], inputs[kept] + 1)
        ends = torch.tensor([100 * i + length - 1 for i, length in enumerate(CUT_LENGTHS)])
        assert torch.equal(~kept[there], torch.isin(inputs, ends)[there])


def test_rows_of_separate_documents_are_counted_across_blocks():
    lengths = np.random.default_rng(1).integers(1, 40, size=3000)
    tokens = np.concatenate([64 * i + np.arange(length) for i, length in enumerate(lengths)])
    dataset = PackedDataset(store_of(tokens, lengths, [500, 2500]), SHORT, "none")
    assert len(dataset) == sum(-(-(length - 1) // SHORT) for length in lengths)
    assert dataset.labels == lengths.sum() - 3000
    rows = dataset.rows(np.arange(len(dataset)))
    labels = rows[:, 1:][rows[:, 1:] >= 0]
    assert labels.tolist() == [64 * i + offset for i, length in enumerate(lengths) for offset in range(1, length)]
