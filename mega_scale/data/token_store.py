"""A corpus of tokens: the documents of one or more shards as one sequence."""

from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from mega_scale.data.token_files import Shard

# Looking at one token maps 64 KiB into the process, which counts as its memory until it is given back.
_MAPPED_AT_ONCE = 1 << 16  # bytes
_RELEASED_AFTER = 1 << 24  # bytes


class TokenStore:
    """Tokens of a corpus, read by place.

    Args:
        shards: In order; none for a corpus without text.

    Attributes:
        tokens: Tokens of all documents and of what ends them.
        documents: Number of documents.
        bytes: UTF-8 bytes of the documents' text.
        fingerprint: Hash of all tokens and of where documents end, 32 hexadecimal digits.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = [shard for shard in shards if shard.record.tokens]
        records = [shard.record for shard in self._shards]
        self._starts = np.cumsum([0, *(record.tokens for record in records)])  # (shards + 1,)
        self._first_documents = np.cumsum([0, *(record.documents for record in records)])
        self._first_bytes = np.cumsum([0, *(record.bytes for record in records)])
        self.tokens, self.documents = int(self._starts[-1]), int(self._first_documents[-1])
        self.bytes = sum(record.bytes for record in records)
        total = xxhash.xxh3_128()
        for record in records:
            total.update(f"{record.tokens} {sorted(record.checksums.items())} ".encode())
        self.fingerprint = total.hexdigest()
        self._mapped = 0

    @classmethod
    def joined(cls, stores: Sequence["TokenStore"]) -> "TokenStore":
        """Put several behind one another."""
        return cls([shard for store in stores for shard in store._shards])

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy tokens into an array, which is the only time they are copied.

        Args:
            start: Place of the first, 0 to below `tokens`.
            stop: Place after the last.
            out: (stop - start,) of any integer type that holds them.
        """
        i = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while start + done < stop:
            first = start + done - int(self._starts[i])
            piece = self._shards[i].tokens(first, first + stop - start - done)
            out[done : done + len(piece)] = piece
            done += len(piece)
            i += 1
        self._count(out.nbytes)

    def ends(self, first: int, last: int) -> np.ndarray:
        """Say where documents end.

        Args:
            first: Number of the first document.
            last: Number after the last one, at most `documents`.

        Returns:
            (last - first,) int64: the place after each one's last token.
        """
        return self._of_documents(first, last, lambda shard: shard.ends, self._starts)

    def text_ends(self, first: int, last: int) -> np.ndarray:
        """Say how much text there is up to the end of documents; as `ends`, in UTF-8 bytes."""
        return self._of_documents(first, last, lambda shard: shard.text_ends, self._first_bytes)

    def document_at(self, place: int) -> int:
        """Find the document that has the token at a place (0 to below `tokens`)."""
        i = int(np.searchsorted(self._starts, place, side="right")) - 1
        self._count(_MAPPED_AT_ONCE)
        within = np.searchsorted(self._shards[i].ends, place - self._starts[i], side="right")
        return int(self._first_documents[i] + within)

    def first_documents(self, count: int | None) -> "TokenStore":
        """Keep only the first documents.

        Args:
            count: How many at most; None keeps all.

        Returns:
            Those documents; the tokens stay where they are.
        """
        if count is None or count >= self.documents:
            return self
        shards = zip(self._shards, self._first_documents.tolist(), strict=False)
        return TokenStore([shard.head(count - first) for shard, first in shards if first < count])

    def map(self) -> None:
        """Map all files now, so that they stay readable even if they are removed."""
        for shard in self._shards:
            shard.mapped  # noqa: B018

    def _of_documents(self, first: int, last: int, of: Callable[[Shard], np.ndarray], before: np.ndarray) -> np.ndarray:
        """Numbers that shards hold of their documents, counted from the start of the corpus."""
        pieces = [np.empty(0, np.int64)]
        i = int(np.searchsorted(self._first_documents, first, side="right")) - 1
        while first < last:
            within = first - int(self._first_documents[i])
            piece = of(self._shards[i])[within : within + last - first]
            pieces.append(piece + before[i])
            first += len(piece)
            i += 1
        self._count(sum(piece.nbytes for piece in pieces))
        return np.concatenate(pieces)

    def _count(self, size: int) -> None:
        self._mapped += max(size, _MAPPED_AT_ONCE)
        if self._mapped > _RELEASED_AFTER:
            self._mapped = 0
            for shard in self._shards:
                shard.release()
