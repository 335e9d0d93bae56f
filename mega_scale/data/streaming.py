"""The rows of a stream: cut while it is read, in its own order, the same rows that packing would store."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from mega_scale.data.cache import fingerprint
from mega_scale.data.corpus import Documents
from mega_scale.data.tokenizer import encode

_FINGERPRINTED = 64  # rows


class StreamedDataset:
    """Rows of L + 1 tokens, cut from documents that are read again at every epoch.

    Rows are numbered over all epochs, without end. Reading them in ascending order costs one pass over the text; going
    back, or resuming far from the start, reads the text again from its start.

    Args:
        documents: Texts, not read as a whole.
        tokenizer: Ends every document with its eos or sep token.
        sequence_length: L, tokens.

    Attributes:
        sequence_length: L, tokens.
        tokens: None: how many a stream has is not known.
        bytes: None.
        fingerprint: Hash of the first rows' tokens.

    Raises:
        ValueError: There are fewer than L + 1 tokens, or the text cannot be read.
    """

    tokens: None = None
    bytes: None = None

    def __init__(self, documents: Documents, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        self._documents, self._tokenizer = documents, tokenizer
        self.sequence_length = sequence_length
        self._epoch_rows: int | None = None  # known when the text has been read to its end
        first = self._start(_FINGERPRINTED)
        if not first:
            raise ValueError(
                f"the text to train on has less than one row of data.sequence_length={sequence_length} + 1 tokens: "
                "give more text, or a shorter sequence_length"
            )
        self.fingerprint = f"stream-{fingerprint(np.concatenate(first))}"

    def holds(self, count: int) -> bool:
        """Say whether an epoch has at least so many rows; reads no further than those.

        Args:
            count: Number of rows.
        """
        if self._epoch_rows is None:
            self._start(count)
        return self._epoch_rows is None or self._epoch_rows >= count

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Read rows.

        Args:
            indices: (n,) numbers of rows, counted over all epochs; ascending, or the text is read again.

        Returns:
            (n, L + 1) int64 tokens.
        """
        return np.stack([self._row(index) for index in np.asarray(indices).tolist()]).astype(np.int64)

    def _start(self, ahead: int) -> list[np.ndarray]:
        """Go to the first row, and look at so many."""
        pieces = (tokens for tokens, _ in encode(self._documents, self._tokenizer))
        rows = cut_rows(pieces, self.sequence_length)
        first = list(islice(rows, ahead))
        if len(first) < ahead:
            self._epoch_rows = len(first)
        self._cursor, self._rows = 0, chain(first, rows)
        return first

    def _row(self, index: int) -> np.ndarray:
        if self._epoch_rows is not None:
            index %= self._epoch_rows
        if index < self._cursor:
            self._start(0)
        for row in self._rows:
            self._cursor += 1
            if self._cursor > index:
                return row
        self._epoch_rows = self._cursor
        return self._row(index)  # which now wraps around


def cut_rows(pieces: Iterable[np.ndarray], sequence_length: int) -> Iterator[np.ndarray]:
    """Cut tokens that arrive in pieces into rows, each starting with the last token of the one before.

    Args:
        pieces: Arrays of tokens (any length,).
        sequence_length: L, tokens.

    Returns:
        Rows (L + 1,); the tail that is shorter is left out.
    """
    rest: list[np.ndarray] = []
    held = 0
    for piece in pieces:
        rest.append(piece)
        held += len(piece)
        if held <= sequence_length:
            continue
        tokens = np.concatenate(rest)
        used = (held - 1) // sequence_length * sequence_length
        for start in range(0, used, sequence_length):
            yield tokens[start : start + sequence_length + 1]
        rest, held = [tokens[used:]], held - used
