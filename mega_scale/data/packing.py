"""From documents to rows of a fixed length: tokens end to end, cut every L, with one token of overlap.

Shapes: L sequence length, n rows. A row has L + 1 tokens: positions 0..L-1 are read, positions 1..L are predicted. Rows
start L tokens apart, so every token but the first of all is predicted exactly once.
"""

import hashlib
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from mega_scale.data.cache import StoredTokens, fingerprint, open_tokens, write_tokens
from mega_scale.data.corpus import Documents
from mega_scale.data.tokenizer import encode, token_type, tokenizer_digest

_FORMAT = "mega_scale tokens 1"


class PackedDataset:
    """Rows of L + 1 tokens, cut from one array.

    Args:
        stored: All documents' tokens, each with the token that ends it.
        sequence_length: L, tokens.

    Attributes:
        sequence_length: L, tokens.
        tokens: Tokens of all documents and of what ends them.
        bytes: UTF-8 bytes of the documents' text.
        fingerprint: Hash of the tokens.
    """

    def __init__(self, stored: StoredTokens, sequence_length: int) -> None:
        self._tokens = stored.tokens
        self.sequence_length = sequence_length
        self.tokens = len(stored.tokens)
        self.bytes = stored.bytes
        self.fingerprint = stored.fingerprint

    def __len__(self) -> int:
        return max(self.tokens - 1, 0) // self.sequence_length

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Read rows.

        Args:
            indices: (n,) numbers of rows, 0 to below len(self).

        Returns:
            (n, L + 1) int64 tokens.
        """
        starts = np.asarray(indices, dtype=np.int64)[:, None] * self.sequence_length
        return self._tokens[starts + np.arange(self.sequence_length + 1)].astype(np.int64)

    def tail(self) -> np.ndarray:
        """Read what is left after the last whole row.

        Returns:
            (1 to L,) int64 tokens, the first of which is the last row's last; empty without any token.
        """
        return self._tokens[len(self) * self.sequence_length :].astype(np.int64)


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, sequence_length: int, cache: Path) -> PackedDataset:
    """Tokenise documents, or find their tokens in the cache, and cut them into rows.

    Args:
        documents: Texts.
        tokenizer: Ends every document with its eos or sep token.
        sequence_length: L, tokens.
        cache: Folder for tokens; several processes may use it at once.

    Returns:
        The rows; none where there is no text.

    Raises:
        ValueError: The text cannot be read, or the folder cannot be written.
    """
    parts = (_FORMAT, documents.digest(), tokenizer_digest(tokenizer))
    key = hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()
    dtype = token_type(tokenizer)
    stored = open_tokens(cache, key) or write_tokens(cache, key, encode(documents, tokenizer), dtype)
    if stored is None:
        nothing = np.empty(0, dtype=dtype)
        stored = StoredTokens(nothing, 0, fingerprint(nothing))
    return PackedDataset(stored, sequence_length)
