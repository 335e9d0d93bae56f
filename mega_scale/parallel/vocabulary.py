"""Embedding and loss over a vocabulary that is cut over the ranks of `tp`; logits of one token never meet on a rank.

Legend: B batch, L length, D channels, T ranks, V vocabulary.
"""

from typing import ClassVar, Literal

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mega_scale.model.losses import LanguageModelHead
from mega_scale.ops.cross_entropy import VocabularyPart, linear_cross_entropy
from mega_scale.parallel.collectives import Axis, Gather, reduce_scatter
from mega_scale.parallel.shards import TensorParallel, share
from mega_scale.parallel.tensor_layers import GatherLinear


class CutVocabularyEmbedding(TensorParallel, nn.Embedding):
    """Word embeddings of this rank's ids; ranks sum what they found, each keeping its channels.

    Args:
        vocabulary: V.
        channels: D.
        padding: id whose vector gets no gradient; may be none.
        axis: the ranks.
    """

    shards: ClassVar[dict[str, int]] = {"weight": 0}

    def __init__(self, vocabulary: int, channels: int, padding: int | None, axis: Axis) -> None:
        own = share(vocabulary, axis.size)
        self._first = axis.rank * own
        mine = padding is not None and 0 <= padding - self._first < own
        super().__init__(own, channels, padding_idx=padding - self._first if mine and padding is not None else None)
        self.axis, self.length = axis, vocabulary

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 to (B, L, D / T)."""
        local = input_ids - self._first
        mine = (local >= 0) & (local < self.num_embeddings)
        found = F.embedding(local.where(mine, 0), self.weight, self.padding_idx) * mine[..., None]
        return reduce_scatter(found, self.axis)


class CutTokenTypes(TensorParallel, nn.Embedding):
    """Token type embeddings, of which every rank has its channels."""

    shards: ClassVar[dict[str, int]] = {"weight": 1}


class CutLanguageModelHead(GatherLinear, LanguageModelHead):
    """See `LanguageModelHead`; of an input whose channels are cut, with this rank's words."""

    def __init__(self, inputs: int, outputs: int, axis: Axis, bias: bool) -> None:
        super().__init__(inputs, outputs, axis, bias)
        self.length: int = outputs

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x (B, L, D / T) to logits of all words, or with targets (B, L) to the loss, the same on all ranks.

        Logits are not for training: their gradient would count every rank's copy.
        """
        if targets is None:
            return Gather(super().forward(x), self.axis).wait()[..., : self.length]
        part = vocabulary_part(self.out_features, self.axis, self.length)
        return linear_cross_entropy(self.collected(x), self.weight, self.bias, targets, part=part)


def vocabulary_part(rows: int, axis: Axis, vocabulary: int | None = None) -> VocabularyPart:
    """This rank's words, for which all ranks of the axis have as many rows; V fills all of them if not given."""
    first = axis.rank * rows

    def reduce(tensor: Tensor, kind: Literal["max", "sum"]) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM, group=axis.group)

    return VocabularyPart(first, rows if vocabulary is None else min(max(vocabulary - first, 0), rows), reduce)
