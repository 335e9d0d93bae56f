"""From a DataConfig to documents: which texts there are, and which of them are held out."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mega_scale.data.bad_rows import Tally, usable
from mega_scale.data.config import DataConfig
from mega_scale.data.permutation import shuffled
from mega_scale.data.readers import Piece
from mega_scale.data.sources import TextSource, open_source


class TextsHash:
    """Hash of texts and their order."""

    def __init__(self) -> None:
        self._total = hashlib.blake2b(digest_size=16)

    def add(self, text: str) -> None:
        """Append a text."""
        self._total.update(hashlib.blake2b(text.encode(), digest_size=16).digest())

    def digest(self) -> str:
        """32 hexadecimal digits."""
        return self._total.hexdigest()


class Documents:
    """Texts that can be read again and again, always the same ones in the same order.

    Args:
        read: Starts from the first text at every call; is told the seed and epoch of an order of pieces, or None for
            the corpus's own.
        tally: What the last reading found.
    """

    def __init__(self, read: Callable[[tuple[int, int] | None], Iterator[str]], tally: Tally | None = None) -> None:
        self._read = read
        self.tally = tally or Tally()

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Documents":
        """Take texts that are in memory."""
        return cls(lambda order: iter(texts))

    def __iter__(self) -> Iterator[str]:
        return self._read(None)

    def shuffled(self, seed: int, epoch: int, buffer: int) -> Iterator[str]:
        """Read the same texts in another order: the pieces are permuted, and texts drawn from a buffer.

        Args:
            seed: Chooses the orders of a run.
            epoch: Chooses one of them.
            buffer: Texts held in memory to draw from.

        Returns:
            The same order for the same arguments, on every machine.
        """
        return _through_buffer(self._read((seed, epoch)), random.Random(f"{seed} {epoch}"), buffer)

    def select(self, wanted: Callable[[str], bool]) -> "Documents":
        """Keep some texts, each by itself."""
        return Documents(lambda order: (text for text in self._read(order) if wanted(text)), self.tally)

    def first(self, count: int | None) -> "Documents":
        """Keep the first texts of the corpus's own order; None keeps all."""
        return self if count is None else Documents(lambda order: islice(self._read(None), count), self.tally)

    def digest(self) -> str:
        """Hash all texts and their order; reads them once.

        Returns:
            32 hexadecimal digits.
        """
        total = TextsHash()
        for text in self:
            total.add(text)
        return total.digest()


@dataclass(frozen=True)
class Corpus:
    """A run's documents.

    Args:
        train: What is trained on.
        validation: What is held out; None where the configuration holds out nothing.
    """

    train: Documents
    validation: Documents | None


def load_corpus(config: DataConfig) -> Corpus:
    """Find a run's documents; rows that cannot be used are left out and counted.

    Args:
        config: The keys under `data:`, validated.

    Returns:
        The part to train on and the part to validate on.

    Raises:
        ValueError: The source cannot be found, or has no such column.
    """
    everything = load_documents(config)
    if config.validation_path or config.validation_split:
        separate = _documents(open_source(config, held_out=True), config.max_bad_share)
        return Corpus(everything, separate.first(config.validation_documents))
    share = config.validation_fraction
    if not share:
        return Corpus(everything, None)
    validation = everything.select(lambda text: is_held_out(text, share))
    return Corpus(
        everything.select(lambda text: not is_held_out(text, share)), validation.first(config.validation_documents)
    )


def load_documents(config: DataConfig) -> Documents:
    """Find all documents of `data.path`, the hub's split or the default corpus, none held out.

    Args:
        config: The keys under `data:`, validated.

    Returns:
        The documents, at most `max_documents`.

    Raises:
        ValueError: The source cannot be found, or has no such column.
    """
    return _documents(open_source(config), config.max_bad_share).first(config.max_documents)


def is_held_out(text: str, share: float) -> bool:
    """Say whether a text belongs to the validation part, from its own hash only.

    Args:
        text: The document.
        share: Held-out share, 0 to 1.

    Returns:
        The same answer for the same text, on every machine.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _documents(source: TextSource, max_bad_share: float) -> Documents:
    pieces, tally = source.pieces(None), Tally()
    size = sum(piece.size for piece in pieces)

    def read(order: tuple[int, int] | None) -> Iterator[str]:
        tally.clear(size)
        rows = (row for piece in _ordered(pieces, order) for row in source.read(piece))
        return usable(rows, tally, max_bad_share)

    return Documents(read, tally)


def _ordered(pieces: list[Piece], order: tuple[int, int] | None) -> Iterable[Piece]:
    if order is None:
        return pieces
    return [pieces[i] for i in shuffled(np.arange(len(pieces)), len(pieces), *order)]


def _through_buffer(texts: Iterable[str], draw: random.Random, size: int) -> Iterator[str]:
    held: list[str] = []
    for text in texts:
        if len(held) < size:
            held.append(text)
            continue
        i = int(draw.random() * size)
        yield held[i]
        held[i] = text
    draw.shuffle(held)
    yield from held
