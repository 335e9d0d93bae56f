"""Best fit: whole documents in few rows, each token once, the same rows from the lengths alone."""

import numpy as np
import psutil
import pytest
from stores import store_of

from mega_scale.data import PackedDataset
from mega_scale.data.packing import MISSING, fit
from mega_scale.data.tokens import Shard, ShardRecord, TokenStore

L = 64


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    """Mostly short documents and some of several rows, as text has them; every length from 1 to 300 occurs."""
    drawn = np.random.default_rng(seed).lognormal(3, 1, count).astype(int) + 1
    drawn[:300] = np.arange(1, 301)
    return drawn


def dataset(lengths: np.ndarray, alignment: int = 1, cuts: tuple[int, ...] = ()) -> PackedDataset:
    """A token is its document's number times 4096 plus its offset."""
    tokens = np.concatenate([4096 * i + np.arange(length) for i, length in enumerate(lengths)])
    return PackedDataset(store_of(tokens, lengths, cuts), L, "reset", order="best_fit", alignment=alignment)


def test_fits_where_least_room_is_left():
    # Longest first: 7, 6, 5, 4, 3, 3, 2; then 3 goes to the 7, the next 3 has no room beside 6 (4 is there).
    assert fit(np.array([3, 7, 4, 6, 3, 2, 5]), 10) == [0, 0, 1, 1, 2, 2, 2]
    assert fit(np.array([10, 10]), 10) == [0, 1] and fit(np.array([], np.int64), 10) == []
    sizes = np.random.default_rng(1).integers(1, 100, 5000)
    rows = np.array(fit(sizes, 100))
    filled = np.bincount(rows, sizes)
    assert filled.max() <= 100 and filled.mean() > 99


@pytest.mark.parametrize("alignment", [1, 8, 64])
def test_every_document_is_whole_or_fills_rows_and_every_token_is_predicted_once(alignment):
    lengths = lengths_of(3000)
    data = dataset(lengths, alignment, cuts=(500, 501, 2500))
    indices = np.arange(len(data))
    rows, starts = data.rows(indices), data.document_starts(indices)
    assert rows.shape == starts.shape == (len(data), L + 1)
    there = rows != MISSING
    assert not (starts & ~there).any()
    assert (np.argwhere(starts)[:, 1] % alignment == 0).all()
    # A label counts where its input is there, of the same document, one before it.
    documents, offsets = rows // 4096, rows % 4096
    predicted = there[:, 1:] & there[:, :-1] & ~starts[:, 1:]
    assert (documents[:, 1:] == documents[:, :-1])[predicted].all()
    assert (offsets[:, 1:] == offsets[:, :-1] + 1)[predicted].all()
    # Behind a document comes a start, or nothing.
    assert (starts[:, 1:] | ~there[:, 1:])[there[:, :-1] & ~predicted].all()
    seen = sorted(rows[:, 1:][predicted].tolist())
    assert seen == [4096 * i + offset for i, length in enumerate(lengths) for offset in range(1, length)]
    assert data.labels == len(seen)
    # Only a document longer than a row is cut: others start once.
    heads = np.bincount(documents[:, 0][~starts[:, 0]], minlength=3000)
    begun = np.bincount(documents[starts], minlength=3000)
    assert ((begun + heads)[lengths <= L + 1] == (lengths > 1)[lengths <= L + 1]).all()


def test_few_places_are_left_empty_and_alignment_costs_what_it_must():
    lengths = lengths_of(20_000, seed=3)
    shares = {}
    for alignment in (1, 8):
        data = dataset(lengths, alignment)
        rows = data.rows(np.arange(len(data)))
        shares[alignment] = float((rows[:, :-1] == MISSING).mean())
    assert shares[1] < 0.02
    assert 0.02 < shares[8] < 0.25


def test_rows_depend_on_lengths_alone():
    lengths = lengths_of(2000)
    one, other = dataset(lengths), dataset(lengths, cuts=(3, 700))
    order = np.random.default_rng(0).permutation(len(one))
    np.testing.assert_array_equal(one.rows(order), other.rows(np.arange(len(other)))[order])


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    documents = 750_000  # of 1,000 tokens, all 0, which take no room on disk
    with (tmp_path / "sparse.tokens").open("wb") as file:
        file.truncate(documents * 1000 * 2)
    for suffix in ("ends", "text_ends"):
        (np.arange(1, documents + 1, dtype="<i8") * 1000).tofile(tmp_path / f"sparse.{suffix}")
    record = ShardRecord("sparse", documents * 1000, documents, documents * 1000, {})
    before = psutil.Process().memory_info().rss
    data = PackedDataset(TokenStore([Shard(tmp_path, record, "<u2")]), 2048, "reset", order="best_fit")
    assert 375_000 <= len(data) < 1.01 * 375_000
    for index in np.random.default_rng(0).integers(len(data), size=500):
        assert data.document_starts(np.array([index])).nonzero()[1].tolist() in ([0, 1000], [0])
        data.rows(np.array([index]))
    assert psutil.Process().memory_info().rss - before < 50 * 2**20
