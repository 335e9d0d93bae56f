"""From configuration to the two datasets of a run, and what is refused on the way."""

import numpy as np
import pytest

from mega_scale.data import DataConfig, PackedDataset, StreamedDataset, load_datasets, load_tokenizer, load_whole


def text_config(folder, texts: dict[str, str], **keys) -> DataConfig:
    for name, text in texts.items():
        (folder / name).write_text(text)
    keys = {"validation_path": [str(folder / "valid.txt")]} | keys
    path = [str(folder / "train*.txt")]
    return DataConfig(source="text", path=path, sequence_length=16, cache_dir=str(folder / "cache"), **keys)


def test_default_corpus_is_split_and_packed(tmp_path):
    train, validation = load_datasets(DataConfig(cache_dir=str(tmp_path)), load_tokenizer("byte"))
    assert isinstance(train, PackedDataset) and validation is not None
    assert len(train) > 5_000 and len(validation) > 100
    assert 0.01 < validation.tokens / train.tokens < 0.15
    # One token a byte, and one a document.
    assert 0 < train.tokens - train.bytes < 1000
    first = load_tokenizer("byte").decode(train.rows(np.array([0]))[0])
    assert first.isprintable() or "\n" in first


def test_training_and_validation_text(tmp_path):
    config = text_config(tmp_path, {"train1.txt": "one " * 20, "train2.txt": "two " * 20, "valid.txt": "held " * 10})
    tokenizer = load_tokenizer("byte")
    train, validation = load_datasets(config, tokenizer)
    assert (train.tokens, train.bytes) == (162, 160)
    assert validation is not None and (validation.tokens, validation.bytes) == (51, 50)
    assert tokenizer.decode(validation.rows(np.array([0]))[0]) == ("held " * 10)[:17]
    config.streaming, config.shuffle = True, False
    train, _ = load_datasets(config, tokenizer)
    assert isinstance(train, StreamedDataset)
    config.validation_path, config.validation_fraction = None, 0.0
    assert load_datasets(config, tokenizer)[1] is None


def test_whole_text_holds_nothing_out(tmp_path):
    config = text_config(tmp_path, {"train1.txt": "one " * 20}, validation_path=None, validation_fraction=0.9)
    whole = load_whole(config, load_tokenizer("byte"))
    assert (whole.tokens, whole.bytes, len(whole)) == (81, 80, 5)
    (tmp_path / "train1.txt").write_text("short")
    whole = load_whole(config, load_tokenizer("byte"))
    assert (len(whole), whole.tokens) == (1, 6)


@pytest.mark.parametrize(
    ("texts", "keys", "named"),
    [
        ({"train.txt": "", "valid.txt": "x" * 99}, {}, ["1 of 1 rows", "1 empty", "train.txt, line 1"]),
        ({"train.txt": "short", "valid.txt": "x" * 99}, {}, ["to train on", "6 tokens", "data.path="]),
        ({"train.txt": "x" * 99, "valid.txt": "short"}, {}, ["to validate on", "6 tokens", "more validation text"]),
        (
            {"train.txt": "x" * 99},
            {"validation_path": None},
            ["to validate on", "0 tokens", "data.validation_fraction=0.05", "data.validation_path"],
        ),
        (
            {"train.txt": "x" * 99},
            {"validation_path": None, "validation_fraction": 0.999},
            ["to train on", "0 tokens", "data.validation_fraction=0.999"],
        ),
        ({}, {}, ["data.path=", "matches no file"]),
    ],
)
def test_too_little_text_is_refused(texts, keys, named, tmp_path):
    with pytest.raises(ValueError) as refusal:
        load_datasets(text_config(tmp_path, texts, **keys), load_tokenizer("byte"))
    for words in named:
        assert words in str(refusal.value)


def test_no_text_at_all_cannot_be_evaluated_on(tmp_path):
    config = text_config(tmp_path, {"train.txt": ""}, validation_path=None, max_bad_share=1.0)
    with pytest.raises(ValueError, match="holds no text"):
        load_whole(config, load_tokenizer("byte"))


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_file_of_json_is_refused(streaming, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    config = DataConfig(
        source="json",
        path=[str(tmp_path / "a.jsonl")],
        cache_dir=str(tmp_path / "cache"),
        streaming=streaming,
        shuffle=False,
        validation_fraction=0.0,
    )
    with pytest.raises(ValueError, match=r"the text to train on.* less than one row"):
        load_datasets(config, load_tokenizer("byte"))
