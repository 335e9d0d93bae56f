"""Tokens of texts that were not prepared: made once, and found in the cache by the next run."""

import hashlib
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mega_scale.data.cache import open_tokens, write_tokens
from mega_scale.data.corpus import Documents
from mega_scale.data.prepared import FORMAT
from mega_scale.data.token_store import TokenStore
from mega_scale.data.tokenizer import encode, token_type, tokenizer_digest


def tokenise(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, cache: Path, add_bos: bool = False
) -> TokenStore:
    """Tokenise documents, or find their tokens in the cache.

    Args:
        documents: Texts; they are read once to see whether they are known.
        tokenizer: Ends every document with its eos or sep token.
        cache: Folder for tokens; several processes may use it at once.
        add_bos: `data.add_bos`.

    Returns:
        The tokens; none where there is no text.

    Raises:
        ValueError: The text cannot be read, or the folder cannot be written.
    """
    parts = (FORMAT, documents.digest(), tokenizer_digest(tokenizer, add_bos))
    key = hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()
    return open_tokens(cache, key) or write_tokens(
        cache, key, encode(documents, tokenizer, add_bos), token_type(tokenizer)
    )
