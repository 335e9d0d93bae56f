"""Documents that share a row: where a block forgets what came before, and which keys a query does not see.

Chunks are the row's: a document that begins inside a chunk has its first chunk border where the row has it, and sees
in that chunk, and counts, its own tokens only.

Legend: B batch, L new tokens, C chunk, K chunks, M remembered keys of the open chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mega_scale.model.cache import MegaCache
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.ops.attention import ChunkDocuments


@dataclass(frozen=True)
class DocumentBorders:
    """What blocks need to keep documents apart; no tuple, so that engines hand it on as it is.

    Args:
        starts: (B, L) bool, true where a document begins.
        chunks: of the keys as attention lays them out, (B, K, C), or (B, 1, remembered + L) where one chunk has all.
    """

    starts: Tensor
    chunks: ChunkDocuments

    def between(self, begin: int, end: int) -> "DocumentBorders":
        """Of the tokens from `begin` to before `end`, where chunks begin; of rows without remembered keys."""
        chunk = self.chunks.numbers.shape[2]
        numbers = self.chunks.numbers[:, begin // chunk : -(-end // chunk)]
        # One chunk of a few tokens is no wider than they are.
        numbers = numbers[..., : end - begin] if end - begin < chunk else numbers
        return DocumentBorders(self.starts[:, begin:end], ChunkDocuments.of(numbers))


def document_borders(
    starts: Tensor | None, config: MegaConfig, cache: MegaCache | None, pads: Tensor | None, x: Tensor
) -> DocumentBorders | None:
    """Lay out the documents of new tokens as attention lays out its keys, and note in the cache what goes on.

    Args:
        starts: (B, L) bool, true where a document begins; none: nowhere.
        config: of the model.
        cache: of the tokens before; changed in place.
        pads: padding before each row's first token, which documents exclude; none where no row has any.
        x: the new tokens, (B, L, D).

    Returns:
        What blocks need; none where every row holds one document.

    Raises:
        ValueError: the starts do not fit x, or the model or the batch cannot keep documents apart.
    """
    shape = tuple(x.shape[:2])
    if starts is None:
        if cache is None or cache.documents is None:
            return None
        starts = torch.zeros(shape, dtype=torch.bool, device=x.device)
    if starts.dtype != torch.bool or starts.shape != shape:
        raise ValueError(
            f"document_starts is {starts.dtype} {tuple(starts.shape)}: expected bool {shape}, one for each new token"
        )
    if pads is not None:
        raise ValueError("document_starts with rows that are padded on the left: pad rows on the right")
    if config.truncation is not None or config.add_cross_attention:
        key = "add_cross_attention" if config.truncation is None else "truncation"
        raise ValueError(
            f"document_starts with {key}={getattr(config, key)}: a truncated moving average cannot begin anew inside a "
            "row, and an encoder's output belongs to a whole row; give each document a row"
        )
    chunk = config.chunk_size if config.use_chunking else None
    numbers = starts.cumsum(1)
    if cache is not None:
        seen = cache.get_seq_length()
        remembered = cache.documents
        if remembered is None:
            remembered = numbers.new_zeros(shape[0], seen % chunk if chunk else seen)
        before = remembered[:, -1:] if remembered.shape[1] else 0
        numbers = torch.cat([remembered, numbers + before], 1)
        kept = numbers if chunk is None else numbers[:, numbers.shape[1] // chunk * chunk :]
        cache.documents = kept if bool((kept != kept[:, -1:]).any()) else None
    return DocumentBorders(starts, ChunkDocuments.of(_in_chunks(numbers, chunk)))


def _in_chunks(numbers: Tensor, chunk: int | None) -> Tensor:
    """Numbers (B, M + L) as attention lays out keys, (B, K, C); what fills the last chunk is of its last document."""
    total = numbers.shape[1]
    if chunk is None or total <= chunk:
        return numbers[:, None]
    return torch.cat([numbers, numbers[:, -1:].expand(-1, -total % chunk)], 1).unflatten(1, (-1, chunk))
