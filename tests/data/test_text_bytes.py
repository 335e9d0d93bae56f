"""Tokens for a byte of the text that some rows hold, by which a loss a token becomes bits a byte."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from stores import store_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mega_scale.data import PackedDataset, load_tokenizer, text_size
from mega_scale.data.tokenizer import encode
from mega_scale.data.tokens import Shard, ShardWriter, TokenStore

# Parts of very different length in tokens, in documents and within one.
TEXTS = ["la" * 400, "zq xv jk é€" * 9, "la" * 100 + "qzü" * 70 + "la" * 90, "x", "naïve " * 30, "la" * 60]


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
    rows_of = dataset(bpe, TEXTS, length, packing, order)
    tokens = np.concatenate([pieces.tokens for pieces in encode(TEXTS, bpe)])
    sizes = np.array([len(bpe.convert_ids_to_tokens(int(t))) if t != bpe.eos_token_id else 0 for t in tokens])
    lengths = np.concatenate([np.diff(np.append(0, encoded.ends)) for encoded in encode(TEXTS, bpe)])
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
