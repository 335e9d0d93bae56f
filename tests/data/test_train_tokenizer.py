"""A trained tokenizer loses nothing, needs fewer tokens than bytes, and is the same for the same text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mega_scale.data import DataConfig, load_datasets, load_tokenizer
from mega_scale.data.sources import stdlib_documents
from mega_scale.data.tokenizer import encode, is_byte_tokenizer, tokenizer_digest, train_bpe

ROOT = Path(__file__).parents[2]
HARD = ["", "plain", " two  spaces\n\n\tand tabs\r\n", "ünïcode 😀 \x00\x7f", "</s><s>", "日本語" * 50, "a" * 3000]


@pytest.fixture(scope="module")
def texts():
    return [text for _, text in zip(range(60), stdlib_documents(), strict=False)]


def test_texts_come_back_and_are_shorter(texts, tmp_path):
    trained = train_bpe(texts, 1000)
    trained.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == 1000 and tokenizer_digest(tokenizer) == tokenizer_digest(trained)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert not is_byte_tokenizer(tokenizer)
    for text in [*HARD, *texts[:10]]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    pieces = list(encode(texts, tokenizer))
    tokens = np.concatenate([piece.tokens for piece in pieces])
    assert tokens.dtype == np.uint16 and (tokens == 2).sum() == len(texts)
    assert len(tokens) < 0.5 * sum(piece.text_ends[-1] for piece in pieces)


def test_same_text_gives_the_same_tokenizer(texts):
    digests = [tokenizer_digest(train_bpe(part, 500)) for part in (texts[:20], texts[:20], texts[20:40])]
    assert digests[0] == digests[1] != digests[2]


def test_vocabulary_must_hold_the_bytes():
    with pytest.raises(ValueError, match=r"258 ids.*give 259"):
        train_bpe(["text"], 258)
    assert len(train_bpe(["ab"], 300)) == 260  # there is one pair to merge


@pytest.mark.launch
def test_command_makes_what_training_loads(texts, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:30]))
    keys = ["data.source=json", f"data.path={tmp_path / 'text.jsonl'}"]
    command = [sys.executable, str(ROOT / "launch/train_tokenizer.py"), str(tmp_path / "made"), "--vocab-size", "400"]
    done = subprocess.run([*command, *keys], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"vocab_size": 400, "rows": 30}
    config = DataConfig("json", [str(tmp_path / "text.jsonl")], cache_dir=str(tmp_path / "cache"))
    train, _ = load_datasets(config, load_tokenizer(str(tmp_path / "made")))
    assert train.rows(np.array([0])).max() < 400
    again = subprocess.run([*command, *keys], capture_output=True, text=True, check=False)
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("error: ") and "not empty" in again.stderr
