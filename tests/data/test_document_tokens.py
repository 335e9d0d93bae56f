"""What surrounds documents is one rule, for training, prompts and the tokenizer that goes with the model."""

import json

import numpy as np
import pytest
from tokenizers_at_hand import TEXTS, bert_like, byte_level, word_level
from transformers import AutoTokenizer

from mega_scale.data import DataConfig, as_trained, load_datasets, load_tokenizer, prompt_ids, unlike_training
from mega_scale.data.prepare import Preparation, run
from mega_scale.data.tokenizer import (
    adds_bos,
    document_start,
    encode,
    end_ids,
    own_tokens,
    separator_id,
    token_type,
    tokenizer_digest,
    vocabulary_size,
)
from mega_scale.data.tokens import read_manifest

HOLES = {"a": 0, "b": 17, "<unk>": 3, "</s>": 5000}


def documents(tokenizer, add_bos, texts=("a b", "b")):
    tokens, ends = zip(*((piece.tokens, piece.ends) for piece in encode(texts, tokenizer, add_bos)), strict=True)
    return [part.tolist() for part in np.split(np.concatenate(tokens), np.concatenate(ends)[:-1])]


KINDS = {  # a tokenizer, what its own call puts before and behind a text
    "bytes": (lambda: load_tokenizer("byte"), [], []),
    "nothing": (lambda: byte_level("$A"), [], []),
    "bos": (lambda: byte_level("<s> $A"), [0], []),
    "eos": (lambda: byte_level("$A </s>"), [], [2]),
    "both": (lambda: byte_level("<s> $A </s>"), [0], [2]),
    "cls and sep": (bert_like, [2], [3]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_bos", [False, True])
def test_the_models_tokenizer_prompts_as_documents_began(kind, add_bos, tmp_path):
    make, before, behind = KINDS[kind]
    tokenizer = make()
    assert own_tokens(tokenizer) == (before, behind)
    start = (before or [tokenizer.bos_token_id]) if add_bos else []
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a b", "b")]
    end = separator_id(tokenizer)
    assert documents(tokenizer, add_bos) == [[*start, *ids, end] for ids in plain]
    as_trained(tokenizer, add_bos).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("a b")["input_ids"] == prompt_ids(loaded, "a b") == [*start, *plain[0]]
    assert prompt_ids(loaded, "") == (start or [end])
    assert (adds_bos(loaded), loaded.eos_token_id) == (add_bos, end)
    assert own_tokens(tokenizer) == (before, behind)  # it stays as it is
    # What is made again of it is the same.
    assert as_trained(loaded, adds_bos(loaded))("b")["input_ids"] == [*start, *plain[1]]


def test_what_training_leaves_out_is_said():
    assert unlike_training(load_tokenizer("byte"), False) is None
    assert unlike_training(byte_level("$A </s>"), False) is None  # every document ends with it
    assert unlike_training(byte_level("<s> $A </s>"), True) is None
    line = unlike_training(byte_level("<s> $A </s>"), False)
    assert "adds <s> to a text" in line and "data.add_bos=true" in line
    assert "adds [CLS] to a text" in unlike_training(bert_like(), False)
    assert "adds </s> </s> to" in unlike_training(byte_level("$A </s> </s>"), True)


def test_a_start_that_a_tokenizer_lacks_is_refused():
    with pytest.raises(ValueError, match=r"data\.add_bos=True.*no bos"):
        document_start(word_level(HOLES, eos_token="</s>"), True)


@pytest.mark.parametrize("special", [{}, {"bos_token": "a"}, {"pad_token": "a"}])
def test_no_end_is_refused(special):
    with pytest.raises(ValueError, match="neither an eos nor a sep token"):
        separator_id(word_level({"a": 0, "<unk>": 1}, **special))


def test_an_end_that_the_vocabulary_lacks_gets_an_id_of_its_own_or_is_refused(tmp_path):
    made = word_level({"a": 0, "b": 1}, eos_token="</s>")
    assert separator_id(made) == 2 and vocabulary_size(made) == 3  # transformers adds it
    for taken in ({"a": 0, "b": 17, "c": 3}, {"a": 0, "b": 50, "c": 4, "d": 9}):  # and gives it an id that is in use
        word_level(taken, eos_token="</s>").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"ends documents with '</s>', whose id [34] is that of 'c'"):
            load_tokenizer(str(tmp_path))


def test_ids_with_holes_count_to_the_largest(tmp_path):
    small, large = word_level(HOLES, eos_token="</s>"), word_level({"a": 0, "b": 70_000, "</s>": 5}, eos_token="</s>")
    assert (len(small), vocabulary_size(small), token_type(small)) == (4, 5001, "<u2")
    assert (vocabulary_size(large), token_type(large)) == (70_001, "<u4")
    assert documents(large, False) == [[0, 70_000, 5], [70_000, 5]]
    small.add_tokens(["c", "d"])
    small.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert vocabulary_size(loaded) == 1 + max(loaded.get_vocab().values()) >= 5001


def test_several_ends_stay_where_the_tokenizers_is_one_of_them():
    tokenizer = load_tokenizer("byte")
    assert [end_ids(tokenizer, given) for given in (None, 7, [2, 7], [7, 8])] == [2, 2, [2, 7], 2]


def test_prompts_that_cannot_be_read_are_refused():
    for text in ("\ud800", "no such words"):
        with pytest.raises(ValueError, match="cannot read the prompt"):
            prompt_ids(word_level({"a": 0, "</s>": 1}, eos_token="</s>"), text)
    assert prompt_ids(word_level(HOLES, eos_token="</s>"), "  ") == [5000]


def test_prepared_data_says_how_documents_begin(tmp_path):
    tokenizer, text = byte_level("<s> $A"), tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS * 4))
    found = {}
    for add_bos in (False, True):
        folder = tmp_path / f"prepared-{add_bos}"
        config = DataConfig("json", [str(text)], validation_fraction=0, add_bos=add_bos)
        preparation = Preparation(folder, config, tokenizer, shard_bytes=10**6)
        list(run(preparation, 1, 1.0))
        preparation.finish()
        assert read_manifest(folder).add_bos == add_bos
        reading = {"sequence_length": 16, "validation_fraction": 0, "cache_dir": str(tmp_path / "cache")}
        direct, _ = load_datasets(DataConfig("json", [str(text)], add_bos=add_bos, **reading), tokenizer)
        opened, _ = load_datasets(DataConfig("prepared", [str(folder)], add_bos=add_bos, **reading), tokenizer)
        np.testing.assert_array_equal(opened.rows(np.arange(3)), direct.rows(np.arange(3)))
        found[add_bos] = opened.fingerprint
        wrong = DataConfig("prepared", [str(folder)], add_bos=not add_bos, **reading)
        with pytest.raises(ValueError, match=rf"data\.add_bos={not add_bos}.*prepared with data\.add_bos={add_bos}"):
            load_datasets(wrong, tokenizer)
    assert found[False] != found[True]
    assert tokenizer_digest(tokenizer) != tokenizer_digest(tokenizer, True)
