"""Rows hold every token once, documents end to end or whole, and know how much text they hold."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from stores import store_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mega_scale.data import DataConfig, tokens
from mega_scale.data.packing import MISSING, PackedDataset, fit
from mega_scale.data.sources import Documents
from mega_scale.data.tokenizer import encode, load_tokenizer, text_size
from mega_scale.data.tokens import Shard, ShardRecord, ShardWriter, TokenStore

TEXTS = ["first", "the second, longer document", "", "é😀", "x" * 100]
STREAM = [token for text in TEXTS for token in [*(byte + 3 for byte in text.encode()), 2]]


def documents(texts: list[str]) -> Documents:
    return Documents(lambda order: iter(texts))


def pack(texts: Documents, tokenizer, length: int, cache) -> PackedDataset:
    return PackedDataset(tokens.tokenise(texts, tokenizer, DataConfig(cache_dir=str(cache)), "name"), length)


@pytest.mark.parametrize("length", [2, 3, 7, 64, len(STREAM) - 1])
def test_every_token_is_predicted_exactly_once(length, tmp_path):
    dataset = pack(documents(TEXTS), load_tokenizer("byte"), length, tmp_path)
    assert len(dataset) == -(-(len(STREAM) - 1) // length)
    rows = dataset.rows(np.arange(len(dataset)))
    assert rows.shape == (len(dataset), length + 1) and rows.dtype == np.int64
    missing = [MISSING] * (len(dataset) * length + 1 - len(STREAM))
    assert len(missing) < length and dataset.labels == len(STREAM) - 1
    assert rows[:, 1:].ravel().tolist() == STREAM[1:] + missing
    assert [*rows[:, :-1].ravel(), rows[-1, -1]] == STREAM + missing


def test_rows_come_in_the_order_asked_for(tmp_path):
    dataset = pack(documents(TEXTS), load_tokenizer("byte"), 7, tmp_path)
    whole = dataset.rows(np.arange(len(dataset)))
    np.testing.assert_array_equal(dataset.rows(np.array([5, 0, 5])), whole[[5, 0, 5]])
    assert dataset.rows(np.array([], dtype=np.int64)).shape == (0, 8)


def test_totals_count_tokens_with_their_ends_and_bytes_of_text(tmp_path):
    dataset = pack(documents(TEXTS), load_tokenizer("byte"), 7, tmp_path)
    assert dataset.tokens == len(STREAM)
    assert dataset.bytes == sum(len(text.encode()) for text in TEXTS) == len(STREAM) - len(TEXTS)


def test_second_time_nothing_is_tokenised(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("byte")
    first = pack(documents(TEXTS), tokenizer, 7, tmp_path)

    def refuse(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "encode", refuse)
    again = pack(documents(TEXTS), tokenizer, 5, tmp_path)  # another length needs no other tokens
    assert (again.fingerprint, again.tokens, again.bytes) == (first.fingerprint, first.tokens, first.bytes)
    assert again.rows(np.array([0])).tolist() == [STREAM[:6]]
    with pytest.raises(AssertionError, match="tokenised again"):
        pack(documents([*TEXTS, "more"]), tokenizer, 7, tmp_path)
    tokenizer.add_tokens(["document"])
    with pytest.raises(AssertionError, match="tokenised again"):
        pack(documents(TEXTS), tokenizer, 7, tmp_path)


def test_fingerprint_is_of_the_tokens(tmp_path):
    def fingerprint(*texts: str) -> str:
        return pack(documents(list(texts)), load_tokenizer("byte"), 2, tmp_path).fingerprint

    assert fingerprint("ab", "c") == fingerprint("ab", "c")
    assert len({fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("c", "ab")}) == 3


def test_no_text_makes_no_rows(tmp_path):
    dataset = pack(documents([]), load_tokenizer("byte"), 7, tmp_path)
    assert (len(dataset), dataset.tokens, dataset.bytes, dataset.labels) == (0, 0, 0, 0)
    assert len(pack(documents(["short"]), load_tokenizer("byte"), 7, tmp_path)) == 1


LENGTH = 64


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    """Mostly short documents and some of several rows, as text has them; every length from 1 to 300 occurs."""
    drawn = np.random.default_rng(seed).lognormal(3, 1, count).astype(int) + 1
    drawn[:300] = np.arange(1, 301)
    return drawn


def best_fit(lengths: np.ndarray, alignment: int = 1, cuts: tuple[int, ...] = ()) -> PackedDataset:
    """A token is its document's number times 4096 plus its offset."""
    tokens = np.concatenate([4096 * i + np.arange(length) for i, length in enumerate(lengths)])
    return PackedDataset(store_of(tokens, lengths, cuts), LENGTH, "reset", order="best_fit", alignment=alignment)


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
    data = best_fit(lengths, alignment, cuts=(500, 501, 2500))
    indices = np.arange(len(data))
    rows, starts = data.rows(indices), data.document_starts(indices)
    assert rows.shape == starts.shape == (len(data), LENGTH + 1)
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
    assert ((begun + heads)[lengths <= LENGTH + 1] == (lengths > 1)[lengths <= LENGTH + 1]).all()


def test_few_places_are_left_empty_and_alignment_costs_what_it_must():
    lengths = lengths_of(20_000, seed=3)
    shares = {}
    for alignment in (1, 8):
        data = best_fit(lengths, alignment)
        rows = data.rows(np.arange(len(data)))
        shares[alignment] = float((rows[:, :-1] == MISSING).mean())
    assert shares[1] < 0.02
    assert 0.02 < shares[8] < 0.25


def test_rows_depend_on_lengths_alone():
    lengths = lengths_of(2000)
    one, other = best_fit(lengths), best_fit(lengths, cuts=(3, 700))
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


# Parts of very different length in tokens, in documents and within one.
UNEVEN = ["la" * 400, "zq xv jk é€" * 9, "la" * 100 + "qzü" * 70 + "la" * 90, "x", "naïve " * 30, "la" * 60]


@pytest.fixture(scope="module")
def bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["</s>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(["la" * 64], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def dataset(tokenizer, texts, length, packing="concat", order="in_order"):
    with tempfile.TemporaryDirectory() as folder:
        shards = []
        for i, part in enumerate((texts[:2], texts[2:])):
            writer = ShardWriter(Path(folder), f"{i:05}", "<u2")
            for pieces in encode(part, tokenizer):
                writer.add(pieces)
            shards.append(Shard(Path(folder), writer.close(), "<u2"))
        store = TokenStore(shards)
        store.map()
    return PackedDataset(store, length, packing, order=order)


@pytest.mark.parametrize(
    "packing,order", [("concat", "in_order"), ("reset", "in_order"), ("reset", "best_fit"), ("none", "in_order")]
)
@pytest.mark.parametrize("length", [8, 64])
def test_bytes_are_those_of_the_rows_wherever_they_are_cut(bpe, packing, order, length):
    rows_of = dataset(bpe, UNEVEN, length, packing, order)
    tokens = np.concatenate([pieces.tokens for pieces in encode(UNEVEN, bpe)])
    sizes = np.array([len(bpe.convert_ids_to_tokens(int(t))) if t != bpe.eos_token_id else 0 for t in tokens])
    lengths = np.concatenate([np.diff(np.append(0, encoded.ends)) for encoded in encode(UNEVEN, bpe)])
    places_of = PackedDataset(store_of(np.arange(len(tokens)), lengths), length, packing, order=order)
    found = set()
    for rows in range(1, len(rows_of)):
        places = np.zeros(len(tokens), bool)
        found_places = places_of.rows(np.arange(rows))
        places[found_places[found_places >= 0]] = True
        expected = places.sum() / max(sizes[places].sum(), 1)
        assert rows_of.tokens_per_byte(rows, partial(text_size, bpe)) == pytest.approx(expected, rel=1e-12), rows
        found.add(round(expected, 3))
    assert len(found) > 1 and rows_of.tokens_per_byte(10**6, partial(text_size, bpe)) == rows_of.tokens / rows_of.bytes


def test_the_byte_tokenizer_is_exact_in_the_middle_of_a_character():
    byte = load_tokenizer("byte")
    rows = dataset(byte, ["é" * 50, "€" * 40], 33)
    assert rows.tokens_per_byte(1, partial(text_size, byte)) == 1.0


def test_of_another_kind_of_tokenizer_the_text_is_decoded():
    words = Tokenizer(models.WordLevel({"</s>": 0, "ab": 1, "longer": 2}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert text_size(tokenizer, np.array([1, 2, 1])) == len("ab longer ab")
