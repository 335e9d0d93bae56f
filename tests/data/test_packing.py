"""Packed rows hold every token exactly once, documents ended by eos, from the cache as well as without."""

import numpy as np
import pytest

from mega_scale.data import tokens
from mega_scale.data.packing import MISSING, PackedDataset
from mega_scale.data.sources import Documents
from mega_scale.data.tokenizer import load_tokenizer

TEXTS = ["first", "the second, longer document", "", "é😀", "x" * 100]
STREAM = [token for text in TEXTS for token in [*(byte + 3 for byte in text.encode()), 2]]


def documents(texts: list[str]) -> Documents:
    return Documents(lambda order: iter(texts))


def pack(texts: Documents, tokenizer, length: int, cache) -> PackedDataset:
    return PackedDataset(tokens.tokenise(texts, tokenizer, cache), length)


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
