"""Tokens of texts that were not prepared: made once, and found in the cache by the next run."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mega_scale.data.cache import open_tokens, write_tokens
from mega_scale.data.prepared import FORMAT, write_json
from mega_scale.data.rows import Tally
from mega_scale.data.sources import Documents, TextsHash
from mega_scale.data.token_store import TokenStore
from mega_scale.data.tokenizer import encode, token_type, tokenizer_digest
from mega_scale.files import FileLock, LockedError

_LOOK_S = 0.2


def tokenise(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    add_bos: bool = False,
    name: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> TokenStore:
    """Tokenise documents, or find their tokens in the cache.

    Args:
        documents: Texts; they are read once to see whether they are known.
        tokenizer: Ends every document with its eos or sep token.
        cache: Folder for tokens; several processes may use it at once.
        add_bos: `data.add_bos`.
        name: What the documents are called. Of processes that want those of one name at the same time, one reads and
            tokenises them, and the others wait for it; None: this one does.
        say: Called with one line, if this one waits.

    Returns:
        The tokens; none where there is no text.

    Raises:
        ValueError: The text cannot be read, by whichever process does it, or the folder cannot be written.
    """
    if name is None:
        return _tokenise(documents, tokenizer, cache, add_bos)[0]
    lock, note, seen = FileLock(cache / f"{name}.lock"), cache / f"{name}.json", set[str]()
    while True:
        found = _read_note(note)
        if found.get("by") in seen and (store := _taken(found, documents, cache)) is not None:
            return store
        try:
            cache.mkdir(parents=True, exist_ok=True)
            if lock.attempt():
                break
        except LockedError:
            if not seen:
                say(f"waits for the text to be tokenised by another process ({lock.owner})")
            seen.add(lock.owner)
        except OSError:  # a folder that is only read may have the tokens
            return _tokenise(documents, tokenizer, cache, add_bos)[0]
        time.sleep(_LOOK_S)
    try:
        outcome: dict[str, Any] = {"by": lock.owner}
        try:
            store, outcome["key"] = _tokenise(documents, tokenizer, cache, add_bos)
            outcome["rows"] = documents.tally.to_json()
        except ValueError as error:
            outcome["error"] = str(error)
            raise
        finally:
            if len(outcome) > 1:
                write_json(note, outcome)
        return store
    finally:
        lock.release()


def _read_note(note: Path) -> dict[str, Any]:
    """What the last process left for those that wait for it."""
    try:
        return dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _taken(found: dict[str, Any], documents: Documents, cache: Path) -> TokenStore | None:
    if "error" in found:
        raise ValueError(found["error"])
    store = open_tokens(cache, found["key"])
    documents.tally.clear()
    documents.tally.merge(Tally.from_json(found["rows"]))
    return store


def _tokenise(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, cache: Path, add_bos: bool
) -> tuple[TokenStore, str]:
    """The tokens, and the key that they have in the cache."""
    parts = (FORMAT, documents.digest(), tokenizer_digest(tokenizer, add_bos))
    key = hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()
    store = open_tokens(cache, key)
    if store is None:
        texts = encode(_unchanged(documents, parts[1]), tokenizer, add_bos)
        store = write_tokens(cache, key, texts, token_type(tokenizer))
    return store, key


def _unchanged(documents: Documents, digest: str) -> Iterator[str]:
    """The same texts once more; others than those that were hashed must not be stored under their name."""
    total = TextsHash()
    for text in documents:
        total.add(text)
        yield text
    if total.digest() != digest:
        raise ValueError("the text changed while it was read: start again when nobody writes to its files")
