"""Chunks that hold tokens of several documents, in which a query sees keys of its own document only.

Legend: B batch, K chunks, I queries, J keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mega_scale.ops.modes import in_memory


@dataclass(frozen=True)
class ChunkDocuments:
    """Which document each key of a chunk is of; make it with `of`, once for all layers.

    Args:
        numbers: (B, K, J) int64: keys see each other where their numbers are equal.
        several: (M,) int64: the chunks, counted as b * K + k, that hold more than one document.
        single: (B K - M,) int64: the others.
        order: (B K,) int64: where each chunk stands when those of `single` come before those of `several`.
    """

    numbers: Tensor
    several: Tensor
    single: Tensor
    order: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> "ChunkDocuments":
        """Sort chunks by whether they need a mask; synchronises a GPU once. All get one where something reads along."""
        if not in_memory(numbers):
            every = torch.arange(numbers.shape[0] * numbers.shape[1], device=numbers.device)
            return cls(numbers, every, every[:0], every)
        mixed = (numbers != numbers[..., :1]).any(-1).flatten()
        order = mixed.to(torch.uint8).argsort(stable=True)
        single, several = order.tensor_split([int((~mixed).sum())])
        return cls(numbers, several, single, order.argsort())

    def of_several(self) -> "ChunkDocuments":
        """Those chunks alone that hold several documents, as one row: numbers (1, M, J)."""
        every = torch.arange(len(self.several), device=self.several.device)
        return ChunkDocuments(self.numbers.flatten(0, 1)[self.several][None], every, every[:0], every)

    def same(self, queries: int, offset: int) -> Tensor:
        """Whether each query, the first being key `offset`, is of the document of each key: (B, K, I, J) bool."""
        return self.numbers[..., offset : offset + queries, None] == self.numbers[..., None, :]


_Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, ChunkDocuments | None], tuple[Tensor, Tensor | None]]


def attend_apart(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, documents: ChunkDocuments, attend: _Attend
) -> Tensor:
    """Attend with a mask of their own in chunks of several documents, which alone pay for it, and without in others.

    Args:
        q: (B, K, I, Z).
        k: (B, K, J, Z).
        v: (B, K, J, E).
        key_mask: (B, K, J) bool, or none.
        documents: of the keys; some chunks hold one and some several.
        attend: q, k, v, key_mask and documents to the output, and weights that are not used.

    Returns:
        (B, K, I, E).
    """
    flat = [None if t is None else t.flatten(0, 1) for t in (q, k, v, key_mask)]

    def some(chunks: Tensor, documents: ChunkDocuments | None) -> Tensor:
        q, k, v, key_mask = (None if t is None else t[chunks][None] for t in flat)
        assert q is not None and k is not None and v is not None
        return attend(q, k, v, key_mask, documents)[0][0]

    parts = [some(documents.single, None), some(documents.several, documents.of_several())]
    return torch.cat(parts)[documents.order].view(*q.shape[:3], v.shape[-1])
