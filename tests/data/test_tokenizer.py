"""The byte tokenizer loses nothing and stands on its own; other tokenizers load from folders or are refused quickly."""

import os
import random
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mega_scale.data.tokenizer import (
    encode,
    encode_bytes,
    is_byte_tokenizer,
    load_tokenizer,
    separator_id,
    token_type,
    tokenizer_digest,
)

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
