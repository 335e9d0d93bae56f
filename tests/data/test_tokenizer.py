"""Tokenizers lose nothing, load from folders or are refused quickly, and surround documents by one rule."""

import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers_at_hand import TEXTS, bert_like, byte_level, word_level
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from launch import train_tokenizer
from mega_scale.data import DataConfig, as_trained, load_datasets
from mega_scale.data.prepare import Preparation, run
from mega_scale.data.sources import stdlib_documents
from mega_scale.data.tokenizer import (
    adds_bos,
    document_start,
    encode,
    encode_bytes,
    end_ids,
    is_byte_tokenizer,
    load_tokenizer,
    own_tokens,
    prompt_ids,
    separator_id,
    token_type,
    tokenizer_digest,
    train_bpe,
    unlike_training,
    vocabulary_size,
)
from mega_scale.data.tokens import read_manifest

SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
HARD = [
    "",
    " ",
    "  two  spaces ,  . before points ? !",
    "\r\n\r\n\t\v\f\n",
    "".join(map(chr, range(0x180))),
    "\0\x7f\x80\x9f\u00ad\u2028\u2029\ufeff\ufffd\uffff",
    "e\u0301 é ﬁ \uff46\uff55\uff4c\uff4c Å \u212b",
    "😀 👩‍👩‍👧‍👦 🇩🇪 \U0010ffff",
    "日本語 العربية עברית ไทย हिन्दी",
    "<s> </s> <pad> <unk> [MASK] <|endoftext|> Ġ Ċ ▁",
    "do n't I 'm we 've 's",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    letters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) != "Cs"]
    return ["".join(rng.choices(letters, k=rng.randrange(60))) for _ in range(count)]


@pytest.fixture
def word_folder(tmp_path):
    """A tokenizer that somebody else made: BPE over words, with an eos token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<end>"], show_progress=False)
    tokenizer.train_from_iterator(["the way of a batch through the house", "the rows of the text"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    made.save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.mark.parametrize("text", HARD + random_texts(50))
def test_every_byte_is_a_token_and_comes_back(text):
    tokenizer = load_tokenizer("byte")
    ids = tokenizer(text)["input_ids"]
    assert ids == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(ids) == text


def test_vocabulary_fits_the_default_model():
    tokenizer = load_tokenizer("byte")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == tokenizer.vocab_size == 259
    assert {name: getattr(tokenizer, name) for name in SPECIAL} == SPECIAL
    assert tokenizer.decode([0, *tokenizer("text")["input_ids"], 2], skip_special_tokens=True) == "text"
    assert "\ufffd" in tokenizer.decode([0xF0 + 3, 0x9F + 3])  # half an emoji, as generation may end


def test_folder_loads_without_this_package(tmp_path):
    load_tokenizer("byte").save_pretrained(tmp_path)
    text = "".join(HARD)
    script = (
        "import sys; from transformers import AutoTokenizer; tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "text = sys.stdin.buffer.read().decode(); ids = tokenizer(text)['input_ids']; "
        "assert ids == [byte + 3 for byte in text.encode()] and tokenizer.decode(ids) == text; "
        "print(tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 'mega_scale' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    found = subprocess.run(command, input=text.encode(), capture_output=True, check=True, cwd=tmp_path)
    assert found.stdout.decode().split() == ["0", "1", "2", "False"]


def test_fast_path_equals_the_tokenizer():
    tokenizer = load_tokenizer("byte")
    texts = HARD + random_texts(300)
    expected = [token for text in texts for token in [*tokenizer(text)["input_ids"], 2]]
    np.testing.assert_array_equal(encode_bytes([text.encode() for text in texts]), np.array(expected, dtype=np.uint16))


def test_fast_path_is_for_the_byte_tokenizer_only(tmp_path, word_folder):
    tokenizer = load_tokenizer("byte")
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves settings behind in the tokenizer
    assert is_byte_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path / "byte")
    assert is_byte_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "byte"))
    assert not is_byte_tokenizer(AutoTokenizer.from_pretrained(word_folder))
    tokenizer.add_tokens(["the"])
    assert not is_byte_tokenizer(tokenizer)


def test_documents_end_with_the_separator(word_folder):
    tokenizer = load_tokenizer(word_folder)
    texts = ["the way of the text " * 60_000, "a batch", "the house"]  # the first is more than one batch holds
    pieces = list(encode(texts, tokenizer))
    tokens = np.concatenate([piece.tokens for piece in pieces])
    end = tokenizer.eos_token_id
    expected = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], end]]
    np.testing.assert_array_equal(tokens, expected)
    assert tokens.dtype == np.uint16 and len(pieces) > 1
    assert sum(piece.text_ends[-1] for piece in pieces) == sum(len(text.encode()) for text in texts)
    documents = [document for piece in pieces for document in np.split(piece.tokens, piece.ends[:-1])]
    assert len(documents) == 3 and all(document[-1] == end for document in documents)


def test_token_type_grows_with_the_vocabulary():
    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    large = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), eos_token="</s>")
    assert (token_type(load_tokenizer("byte")), token_type(large)) == ("<u2", "<u4")
    assert next(encode(["w69999"], large)).tokens.tolist() == [69_999, 70_000]


def test_separator_is_eos_else_sep_else_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[SEP]": 1}))
    assert separator_id(PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]")) == 1
    with pytest.raises(ValueError, match="neither an eos nor a sep token"):
        separator_id(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_digest_tells_tokenizers_apart(word_folder):
    digests = [tokenizer_digest(load_tokenizer(name)) for name in ("byte", "byte", word_folder)]
    assert digests[0] == digests[1] != digests[2]


def test_tokenizer_that_cannot_be_found_is_refused_at_once(tmp_path):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"data.tokenizer='owner/missing'.*no such folder.*cannot be reached"):
        load_tokenizer("owner/missing")
    with pytest.raises(ValueError, match=r"holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    assert time.perf_counter() - started < 10


def test_without_a_network_the_refusal_is_quick():
    """A client of its own would try again for most of a minute."""
    script = "from mega_scale.data import load_tokenizer; load_tokenizer('owner/missing')"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there
    started = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: data.tokenizer='owner/missing'" in found.stderr
    assert time.perf_counter() - started < 20


ROOT = Path(__file__).parents[2]
HARD_TO_TRAIN = [*HARD, "日本語" * 50, "a" * 3000]


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
    for text in [*HARD_TO_TRAIN, *texts[:10]]:
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
    config = DataConfig(
        "json", [str(tmp_path / "text.jsonl")], validation_fraction=0.0, cache_dir=str(tmp_path / "cache")
    )
    train, _ = load_datasets(config, load_tokenizer(str(tmp_path / "made")))
    assert train.rows(np.array([0])).max() < 400
    with pytest.raises(ValueError, match="not empty"):
        train_tokenizer.main([str(tmp_path / "made"), "--vocab-size", "400", *keys])


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


def test_text_that_the_tokenizer_has_no_tokens_for_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    (tmp_path / "text.txt").write_text("a b a")
    config = DataConfig(
        "text", [str(tmp_path / "text.txt")], validation_fraction=0.0, cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(ValueError, match=r"data\.tokenizer=.* cannot read the text .*unk token"):
        load_datasets(config, tokenizer)


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
        list(run(preparation, 1))
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
