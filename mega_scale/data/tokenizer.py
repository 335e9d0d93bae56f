"""Tokenizers: loading or training one, the special tokens around documents, and from documents to tokens."""

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mega_scale.data.config import find_on_hub

_ENCODED_AT_ONCE = 1 << 20  # characters
# The ids that MegaConfig has for them by default; in the built-in tokenizer, the byte b is the token b + 3.
_SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
_PROBE = "a"
_ADDS_BOS = "add_bos"  # in tokenizer_config.json; `add_bos_token` is transformers' own, which it does not save


# Making and loading them


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can end a document: the built-in "byte", one in a folder, or one of the hub.

    Raises ValueError where there is none of that name, or no eos or sep token with an id of its own.
    """
    if name == "byte":
        return byte_tokenizer()
    name = os.path.expanduser(name)
    found = "folder" if os.path.isdir(name) else find_on_hub(name, "model")
    if found == "absent":
        raise ValueError(f"data.tokenizer={name!r}: neither a folder nor a name on the hub; correct it")
    remedy = {
        "folder": "it holds no tokenizer that transformers can load",
        "unreachable": "no such folder, and the hub cannot be reached; give an existing folder",
        "there": "the hub has no tokenizer there that transformers can load; name another one",
    }[found]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=found != "there", trust_remote_code=False)
    except Exception as error:  # every format and the hub have errors of their own
        cause = str(error).partition("\n")[0]
        raise ValueError(f'data.tokenizer={name!r}: {remedy}, or "byte" ({cause})') from None
    end, token = separator_id(tokenizer), str(tokenizer.eos_token or tokenizer.sep_token)
    same = [other for other, number in tokenizer.get_vocab().items() if number == end and other != token]
    if same:
        # transformers numbers a token that the vocabulary lacks by the count of tokens, which ids with holes may have.
        raise ValueError(
            f"data.tokenizer={tokenizer.name_or_path!r} ends documents with {token!r}, whose id {end} is that of "
            f"{same[0]!r}: give it an id of its own and save it again, or name another tokenizer"
        )
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make the built-in tokenizer: bos 0, pad 1, eos 2, then the 256 bytes.

    It adds nothing to a text, and reads "</s>" in it as characters. Its `save_pretrained` folder loads with
    AutoTokenizer alone.
    """
    # The letter that `tokenizers` has for each byte: itself where it can be printed, else one from U+0100 on.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = (letter for letter in letters if ord(letter) > 255)
    of_bytes = (chr(byte) if chr(byte) in letters else next(others) for byte in range(256))
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL.values(), *of_bytes))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_level(tokenizer)


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of three special tokens, the 256 bytes, and merges: at most `vocab_size` ids.

    It adds nothing to a text, and reads "</s>" in it as characters. Raises ValueError where the ids are too few for the
    bytes.
    """
    least = len(_SPECIAL) + 256
    if vocab_size < least:
        raise ValueError(f"a vocabulary of {vocab_size} ids has no place for special tokens and bytes: give {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(batched(documents), trainer)
    return _byte_level(tokenizer)


def _byte_level(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_SPECIAL,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


# What they are


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the ids that a model needs: one more than the largest, if the tokens leave some out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def token_type(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the smallest integer type that holds every token, as numpy writes it: "<u2" or "<u4"."""
    return "<u2" if vocabulary_size(tokenizer) <= 1 << 16 else "<u4"


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is the built-in one, also when it comes from a folder."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    return tokenizer.split_special_tokens and _definition(tokenizer) == _definition(byte_tokenizer())


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, add_bos: bool = False) -> str:
    """Hash all that decides which tokens a text becomes (32 hexadecimal digits), alike before and after saving."""
    total, start = hashlib.blake2b(digest_size=16), document_start(tokenizer, add_bos)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        separator = separator_id(tokenizer)
        described = [_definition(tokenizer), bool(tokenizer.split_special_tokens), separator, *start]
        total.update(json.dumps(described, sort_keys=True).encode())
        return total.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            total.update(f"{file.relative_to(folder).as_posix()} {len(content)} ".encode() + content)
    total.update(" ".join(map(str, start)).encode())
    return total.hexdigest()


def _definition(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """A fast tokenizer as plain JSON, without what its last call left behind."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: part for name, part in definition.items() if name not in ("padding", "truncation")}


def text_size(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> int:
    """Count the UTF-8 bytes of text of some tokens (n,), exactly where tokens are bytes; special ones are no text."""
    ids = tokens[~np.isin(tokens, tokenizer.all_special_ids)].tolist()
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    if fast and isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return sum(map(len, tokenizer.convert_ids_to_tokens(ids)))
    return len(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).encode(errors="replace"))


# Special tokens around documents


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Find the id that ends a document, and so stands before the next one: eos, else sep; ValueError without both."""
    found = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if found is None:
        raise ValueError(
            f"data.tokenizer={tokenizer.name_or_path!r} has neither an eos nor a sep token to end documents with; "
            "add one and save it again, or name another tokenizer"
        )
    return int(found)


def end_ids(tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None) -> int | list[int]:
    """Say what ends a generated text: the id that ends documents, or the configured ids if it is one of several."""
    end = separator_id(tokenizer)
    return configured if isinstance(configured, list) and end in configured else end


def own_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find the ids that a tokenizer's own call puts before a text, such as bos, and those after it."""
    plain, whole = (tokenizer(_PROBE, add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    # It knows no such text: what ends a document stands after it.
    end = separator_id(tokenizer)
    start = whole.index(end) if end in whole else len(whole)
    return whole[:start], whole[start:]


def document_start(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> list[int]:
    """Find the ids that a document begins with: with `add_bos` those of the tokenizer's own call, else its bos."""
    if not add_bos:
        return []
    if before := own_tokens(tokenizer)[0]:
        return before
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"data.add_bos=True: data.tokenizer={tokenizer.name_or_path!r} puts nothing before a text and has no bos "
            "token; set it to false, or name another tokenizer"
        )
    return [int(tokenizer.bos_token_id)]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a tokenizer comes from a run with `data.add_bos`."""
    return bool(tokenizer.init_kwargs.get(_ADDS_BOS))


def as_trained(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> PreTrainedTokenizerBase:
    """Make the tokenizer that goes with a model: its own call gives a prompt such as the documents trained on.

    The copy puts before a text what documents began with, nothing after it, and its eos is the token that ended them.
    A tokenizer written in Python still adds what it adds.
    """
    made = copy.deepcopy(tokenizer)
    made.init_kwargs.pop(_ADDS_BOS, None)
    if add_bos:
        made.init_kwargs[_ADDS_BOS] = True
    if made.eos_token is None:
        made.eos_token = made.sep_token
    start = document_start(tokenizer, add_bos)
    if isinstance(made, PreTrainedTokenizerFast) and own_tokens(tokenizer) != (start, []):
        piece = ["start:0"] if start else []
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[*piece, "$A:0"],
            pair=[*piece, "$A:0", "$B:1"],
            special_tokens=[{"id": "start", "ids": start, "tokens": tokenizer.convert_ids_to_tokens(start)}],
        )
    return made


def unlike_training(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> str | None:
    """Say in one line what a tokenizer adds to a text that documents are trained without, but for their end."""
    before, after = own_tokens(tokenizer)
    left_out = [] if add_bos else before
    left_out += after if after != [separator_id(tokenizer)] else []
    if not left_out:
        return None
    names = " ".join(tokenizer.convert_ids_to_tokens(left_out))
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    kept = "exports hold the tokenizer without them" if fast else "but the tokenizer of exports still adds them"
    remedy = "" if add_bos or not before else "; data.add_bos=true trains on what comes before a text"
    return f"data.tokenizer={tokenizer.name_or_path!r} adds {names} to a text: trained without, and {kept}{remedy}"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Give the ids that a model continues, by a tokenizer of `as_trained`: a document's beginning as it was trained on.

    In place of an empty text stands what ended the document before. Raises ValueError where there are no tokens for it.
    """
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # of any kind: half a surrogate, or no unk token
        raise ValueError(f"the tokenizer cannot read the prompt {text!r} ({error}): give another one") from None
    return [*document_start(tokenizer, adds_bos(tokenizer)), *ids] or [separator_id(tokenizer)]


# From documents to tokens


class Encoded(NamedTuple):
    """Whole documents as tokens (T,) of `token_type`, each with the tokens that begin and the one that ends it.

    `ends` (n,) int64 are the places after each document's last, `text_ends` the UTF-8 bytes of their text up to there.
    """

    tokens: np.ndarray
    ends: np.ndarray
    text_ends: np.ndarray


def encode(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, add_bos: bool = False) -> Iterator[Encoded]:
    """Tokenise documents in order, many at once, and end each; ValueError for a text that there are no tokens for."""
    start, end, dtype = document_start(tokenizer, add_bos), separator_id(tokenizer), token_type(tokenizer)
    by_bytes = not start and is_byte_tokenizer(tokenizer)
    for texts in batched(documents):
        raw = [text.encode() for text in texts]
        sizes = np.fromiter(map(len, raw), dtype=np.int64, count=len(raw))
        if by_bytes:
            yield Encoded(encode_bytes(raw), np.cumsum(sizes + 1), np.cumsum(sizes))
            continue
        try:
            if isinstance(tokenizer, PreTrainedTokenizerFast):
                # What a call would set and do, without where each token stands in the text: a fifth faster.
                backend = tokenizer.backend_tokenizer
                backend.no_truncation()
                backend.no_padding()
                backend.encode_special_tokens = tokenizer.split_special_tokens
                found = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
            else:  # not verbose, or it would warn of texts that are longer than one sequence
                plain = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
                found = tokenizer(texts, **plain, verbose=False)["input_ids"]
        except Exception as error:  # `tokenizers` raises nothing more special
            raise ValueError(
                f"data.tokenizer={tokenizer.name_or_path!r} cannot read the text ({error}): name a tokenizer that has "
                "tokens for all of it, such as one with an unk token"
            ) from None
        lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found)) + len(start) + 1
        whole = chain.from_iterable((*start, *ids, end) for ids in found)
        tokens = np.fromiter(whole, dtype=dtype, count=lengths.sum())
        yield Encoded(tokens, np.cumsum(lengths), np.cumsum(sizes))


def encode_bytes(texts: Sequence[bytes]) -> np.ndarray:
    """Do what the built-in tokenizer does with documents in UTF-8, some hundred times as fast: (T,) uint16."""
    end = list(_SPECIAL).index("eos_token")
    # The byte 0xff never occurs in UTF-8, so it can stand for the end of a document meanwhile.
    joined = np.frombuffer(b"".join(text + b"\xff" for text in texts), dtype=np.uint8)
    return np.where(joined == 0xFF, np.uint16(end), joined + np.uint16(len(_SPECIAL)))


def batched(documents: Iterable[str]) -> Iterator[list[str]]:
    """Collect documents up to a million characters, which bounds memory whether they are lines or books."""
    texts, characters = [], 0
    for text in documents:
        texts.append(text)
        characters += len(text)
        if characters >= _ENCODED_AT_ONCE:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts
