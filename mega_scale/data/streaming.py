"""The rows of a stream: cut while it is read, in its order, the same rows that packing would store."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from mega_scale.data.config import Packing
from mega_scale.data.packing import MISSING
from mega_scale.data.sources import Documents
from mega_scale.data.tokenizer import Encoded, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FINGERPRINTED = 64  # rows


class StreamedDataset:
    """Rows of L + 1 tokens, cut from documents that are read again at every epoch.

    Rows are numbered over all epochs, without end. Reading them in ascending order costs one pass over the text; going
    back, or resuming far from the start, reads the text again from the epoch's start.

    Args:
        documents: Texts, not read as a whole.
        tokenizer: Ends every document with its eos or sep token.
        sequence_length: L, tokens.
        packing: "concat" or "none", see `mega_scale.data.packing`.
        shuffle: Read every epoch in another order; False: in the corpus's own.
        seed: Chooses the orders.
        buffer: Texts held in memory to draw from when shuffling.
        add_bos: `data.add_bos`.

    Attributes:
        tokens: None: how many a stream has is not known.
        bytes: None.
        fingerprint: Hash of the first rows' tokens in the corpus's own order.
        tally: Rows of text that this process has read in this epoch, and the bad ones.

    Raises:
        ValueError: There are fewer than L + 1 tokens, or the text cannot be read.
    """

    tokens: None = None
    bytes: None = None

    def __init__(
        self,
        documents: Documents,
        tokenizer: "PreTrainedTokenizerBase",
        sequence_length: int,
        packing: Packing = "concat",
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer: int = 1,
        add_bos: bool = False,
    ) -> None:
        self._documents, self._tokenizer, self._add_bos = documents, tokenizer, add_bos
        self.sequence_length, self.packing = sequence_length, packing
        self.shuffle, self._seed, self._buffer = shuffle, seed, buffer
        self.tally = documents.tally
        self._rows: Iterator[np.ndarray] = iter(())
        self._epoch_rows: int | None = None  # known when the text has been read to its end
        first = list(islice(self._cut(documents), _FINGERPRINTED))
        if not first or (packing == "concat" and MISSING in first[0]):
            raise ValueError(
                f"the text to train on has less than one row of data.sequence_length={sequence_length} + 1 tokens: "
                "give more text, or a shorter sequence_length"
            )
        self.fingerprint = f"stream-{xxhash.xxh3_128_hexdigest(np.concatenate(first).data)}"
        self._start(0)

    def holds(self, count: int) -> bool:
        """Say whether an epoch has at least `count` rows; reads no further than those."""
        if self._epoch_rows is None:
            self._start(0)
            found = sum(1 for _ in islice(self._rows, count))
            if found < count:
                self._epoch_rows = found
            # Begun anew: processes that are forked later must not share the place in an open file.
            self._start(0)
        return self._epoch_rows is None or self._epoch_rows >= count

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Read rows (n,) by number, over all epochs: (n, L + 1) int64 tokens, and MISSING behind the last one.

        Numbers ascend, or the text is read again.
        """
        return np.stack([self._row(index) for index in np.asarray(indices).tolist()])

    def _start(self, epoch: int) -> None:
        """Go to the first row of an epoch."""
        texts: Iterable[str] = self._documents
        if self.shuffle:
            texts = self._documents.shuffled(self._seed, epoch, self._buffer)
        self._epoch, self._cursor, self._rows = epoch, 0, self._cut(texts)

    def _cut(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        cut = cut_rows if self.packing == "concat" else cut_documents
        return cut(encode(texts, self._tokenizer, self._add_bos), self.sequence_length)

    def _row(self, index: int) -> np.ndarray:
        if self._epoch_rows is None and index >= self._cursor and self._epoch == 0:
            found = self._skip_to(index)
            if found is not None:
                return found
            self._epoch_rows = self._cursor
        if self._epoch_rows is None:  # the first epoch was left before its end was seen
            self._start(0)
            return self._row(index)
        epoch, within = divmod(index, self._epoch_rows)
        if epoch != self._epoch or within < self._cursor:
            self._start(epoch)
        found = self._skip_to(within)
        assert found is not None, "the text became shorter while it was read"
        return found

    def _skip_to(self, row: int) -> np.ndarray | None:
        for found in self._rows:
            self._cursor += 1
            if self._cursor > row:
                return found
        return None


def cut_rows(documents: Iterable[Encoded], sequence_length: int) -> Iterator[np.ndarray]:
    """Cut documents end to end into rows (L + 1,) int64, each starting with the last token of the one before.

    The last one has MISSING behind its tokens.
    """
    rest = np.empty(0, np.int64)
    for encoded in documents:
        tokens = np.concatenate([rest, encoded.tokens.astype(np.int64)])
        used = max(len(tokens) - 1, 0) // sequence_length * sequence_length
        for start in range(0, used, sequence_length):
            yield tokens[start : start + sequence_length + 1]
        rest = tokens[used:]
    if len(rest) > 1:
        yield _filled(rest, sequence_length)


def cut_documents(documents: Iterable[Encoded], sequence_length: int) -> Iterator[np.ndarray]:
    """Cut each document alone into rows (L + 1,) int64, with MISSING behind its last token."""
    for encoded in documents:
        for document in np.split(encoded.tokens.astype(np.int64), encoded.ends[:-1]):
            for start in range(0, len(document) - 1, sequence_length):
                yield _filled(document[start : start + sequence_length + 1], sequence_length)


def _filled(tokens: np.ndarray, sequence_length: int) -> np.ndarray:
    return np.concatenate([tokens, np.full(sequence_length + 1 - len(tokens), MISSING)])
