"""Where the tokens of the blocked EMA lie: in blocks, and in slices of blocks that are worked on at a time.

Legend: B batch, L length, D channels, c tokens per block, M blocks per sequence; X = B M blocks of all sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Numbers of a slice: it should stay in a core's cache, hardly count beside whole tensors, and still be worth a matrix
# product a channel.
_SLICE = 2**18
# A GPU needs large products.
_GPU_SLICE = 2**26


class Slice(NamedTuple):
    """Blocks that are worked on at a time, and their tokens, counted over all sequences."""

    blocks: slice
    tokens: slice


class BlockLayout(NamedTuple):
    """A document begins a block of its own, so no block holds two documents.

    Tensors "in blocks" are flat: slice after slice, each channel by channel, so that a slice is (D, its blocks, c).
    """

    length: int  # L
    c: int
    blocks: int  # M, the same for every sequence
    last_block: Tensor  # (B,): the block of the last token
    last_filled: Tensor  # (B,): tokens in that block, 1 to c
    slices: tuple[Slice, ...]
    places: Tensor | None = None  # (B L,): block * c + place in the block, over all sequences; none: tokens fill blocks
    keep: Tensor | None = None  # (B, M): 0 where a block begins a document and forgets the state, else 1

    @classmethod
    def of(cls, x: Tensor, resets: Tensor | None, c: int) -> "BlockLayout":
        """The layout for tokens x (B, L, D) with documents that begin where resets (B, L) are true."""
        batch, length, channels = x.shape
        sequence = torch.arange(batch, device=x.device)[:, None]
        position = torch.arange(length, device=x.device).expand(batch, length)
        if resets is None:
            blocks = -(-length // c)
            last_block = torch.full((batch,), blocks - 1, device=x.device)
            last_filled = torch.full_like(last_block, length - (blocks - 1) * c)
            places = None if length % c == 0 else (sequence * blocks * c + position).flatten()
            edges = _edges(batch * blocks, c * channels, x.is_cuda)
            # Sequence after sequence, its tokens fill its first places.
            tokens = [edge // blocks * length + min(edge % blocks * c, length) for edge in edges]
            return cls(length, c, blocks, last_block, last_filled, _slices(edges, tokens), places)
        document_start = torch.where(resets, position, 0).cummax(1).values
        opens = (position - document_start) % c == 0
        block = opens.cumsum(1) - 1
        place = position - torch.where(opens, position, 0).cummax(1).values
        blocks = int(block[:, -1].max()) + 1
        keep = x.new_ones(batch, blocks).scatter_reduce(1, block, (~resets).to(x.dtype), "amin")
        places = ((sequence * blocks + block) * c + place).flatten()
        edges = _edges(batch * blocks, c * channels, x.is_cuda)
        tokens = torch.searchsorted(places, torch.tensor(edges, device=x.device) * c).tolist()
        return cls(length, c, blocks, block[:, -1], place[:, -1] + 1, _slices(edges, tokens), places, keep)

    def empty(self, x: Tensor) -> Tensor:
        """Room for tokens like x (B, L, D) in blocks."""
        return x.new_empty(len(x) * self.blocks * self.c * x.shape[2])

    def slice_of(self, in_blocks: Tensor, channels: int, part: Slice) -> Tensor:
        """A slice (D, blocks, c) of a tensor in blocks, which it shares its memory with."""
        block = self.c * channels
        flat = in_blocks[part.blocks.start * block : part.blocks.stop * block]
        return flat.view(channels, -1, self.c)

    def take(self, x: Tensor, part: Slice, out: Tensor | None = None) -> Tensor:
        """A slice (D, blocks, c) of tokens x (B, L, D), new or in `out`; places that no token fills are zero."""
        rows = x.reshape(-1, x.shape[2])[part.tokens]
        if self.places is not None:
            first, end = part.blocks.start * self.c, part.blocks.stop * self.c
            rows = rows.new_zeros(end - first, x.shape[2]).index_copy(0, self.places[part.tokens] - first, rows)
        if out is None:
            out = rows.new_empty(x.shape[2], len(rows) // self.c, self.c)
        out.view(x.shape[2], -1).copy_(rows.t())
        return out

    def put(self, values: Tensor, into: Tensor, part: Slice) -> None:
        """Write a slice (D, blocks, c) to its tokens of a contiguous (B, L, D)."""
        rows = values.reshape(len(values), -1).t()
        if self.places is not None:
            places = self.places[part.tokens] - part.blocks.start * self.c
            rows = rows.contiguous().index_select(0, places)
        into.view(-1, len(values))[part.tokens].copy_(rows)


def _edges(blocks: int, numbers: int, on_gpu: bool) -> list[int]:
    """Where slices of about as many blocks begin, and where the last one ends."""
    size = max((_GPU_SLICE if on_gpu else _SLICE) // numbers, 1)
    count = -(-blocks // size)
    return [blocks * i // count for i in range(count + 1)]


def _slices(edges: list[int], tokens: list[int]) -> tuple[Slice, ...]:
    starts, ends = zip(edges[:-1], tokens[:-1], strict=True), zip(edges[1:], tokens[1:], strict=True)
    return tuple(
        Slice(slice(block, last), slice(token, end)) for (block, token), (last, end) in zip(starts, ends, strict=True)
    )
