"""Tokenizers by name, and from documents to pieces of tokens."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mega_scale.data.byte_tokenizer import build_byte_tokenizer, encode_bytes, fast_definition, is_byte_tokenizer
from mega_scale.data.config import find_on_hub
from mega_scale.data.special_tokens import document_start, require_end, separator_id

_ENCODED_AT_ONCE = 1 << 20  # characters


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can end a document.

    Args:
        name: "byte" for the built-in one, a folder, or a hub name.

    Returns:
        The tokenizer.

    Raises:
        ValueError: There is none of that name, it has no id, or neither an eos nor a sep token of its own.
    """
    if name == "byte":
        return build_byte_tokenizer()
    folder = Path(name).expanduser()
    if os.path.isdir(folder):
        tokenizer = _from_pretrained(str(folder), "it holds no tokenizer that transformers can load", local=True)
    else:
        reach = find_on_hub(name, "model")
        if reach == "absent":
            raise ValueError(f"data.tokenizer={name!r}: neither a folder nor a name on the hub; correct it")
        remedy = "no such folder, and the hub cannot be reached; give an existing folder"
        if reach == "there":
            remedy = "the hub has no tokenizer there that transformers can load; name another one"
        tokenizer = _from_pretrained(name, remedy, local=reach == "unreachable")
    require_end(tokenizer)
    return tokenizer


def _from_pretrained(name: str, remedy: str, *, local: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # every format and the hub have errors of their own
        cause = str(error).partition("\n")[0]
        raise ValueError(f'data.tokenizer={name!r}: {remedy}, or "byte" ({cause})') from None
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the ids that a model needs: one more than the largest, where the tokens leave some out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def token_type(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the smallest integer type that holds every token.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        "<u2" or "<u4", as numpy writes them.
    """
    return "<u2" if vocabulary_size(tokenizer) <= 1 << 16 else "<u4"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, add_bos: bool = False) -> str:
    """Hash everything that decides which tokens a text becomes.

    Args:
        tokenizer: Any tokenizer.
        add_bos: `data.add_bos`.

    Returns:
        32 hexadecimal digits; the same for a tokenizer that was saved and loaded again.
    """
    total, start = hashlib.blake2b(digest_size=16), document_start(tokenizer, add_bos)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        separator = separator_id(tokenizer)
        described = [fast_definition(tokenizer), bool(tokenizer.split_special_tokens), separator, *start]
        total.update(json.dumps(described, sort_keys=True).encode())
        return total.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            total.update(f"{file.relative_to(folder).as_posix()} {len(content)} ".encode() + content)
    total.update(" ".join(map(str, start)).encode())
    return total.hexdigest()


def text_size(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> int:
    """Count the UTF-8 bytes of some tokens' text: exact where tokens are bytes, even in the middle of a character.

    Special tokens are none of the text.

    Args:
        tokenizer: Any tokenizer.
        tokens: (n,) ids.
    """
    ids = tokens[~np.isin(tokens, tokenizer.all_special_ids)].tolist()
    if isinstance(tokenizer, PreTrainedTokenizerFast) and isinstance(
        tokenizer.backend_tokenizer.decoder, decoders.ByteLevel
    ):
        return sum(map(len, tokenizer.convert_ids_to_tokens(ids)))
    return len(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).encode(errors="replace"))


class Encoded(NamedTuple):
    """Whole documents as tokens, each with the tokens that begin and the one that ends it.

    Args:
        tokens: (T,) of all of them, of the type that `token_type` names.
        ends: (n,) int64, the place in `tokens` after each document's last.
        text_ends: (n,) int64, UTF-8 bytes of their text up to each one's end.
    """

    tokens: np.ndarray
    ends: np.ndarray
    text_ends: np.ndarray


def encode(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, add_bos: bool = False) -> Iterator[Encoded]:
    """Tokenise documents, and end each with the separator.

    Args:
        documents: Texts.
        tokenizer: Adds no special tokens of its own.
        add_bos: `data.add_bos`.

    Returns:
        Documents in order, many at once.
    """
    start, end, dtype = document_start(tokenizer, add_bos), separator_id(tokenizer), token_type(tokenizer)
    by_bytes = not start and is_byte_tokenizer(tokenizer)
    for texts in batched(documents):
        raw = [text.encode() for text in texts]
        sizes = np.fromiter(map(len, raw), dtype=np.int64, count=len(raw))
        if by_bytes:
            yield Encoded(encode_bytes(raw), np.cumsum(sizes + 1), np.cumsum(sizes))
            continue
        found = _token_lists(texts, tokenizer)
        lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found)) + len(start) + 1
        whole = chain.from_iterable((*start, *ids, end) for ids in found)
        tokens = np.fromiter(whole, dtype=dtype, count=lengths.sum())
        yield Encoded(tokens, np.cumsum(lengths), np.cumsum(sizes))


def _token_lists(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        # What a call would set and do, without where each token stands in the text: a fifth faster.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    found = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it would warn of texts that are longer than one sequence
    )
    return found["input_ids"]


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
