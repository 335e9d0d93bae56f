"""Embedding and loss over a vocabulary that is cut over the ranks of `tp`; logits of one token never meet on a rank.

Legend: B batch, L length, D channels, T ranks, V vocabulary.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mega_scale.parallel.collectives import Axis, reduce_scatter
from mega_scale.parallel.shards import TensorParallel


class CutVocabularyEmbedding(TensorParallel, nn.Embedding):
    """Word embeddings of this rank's ids; ranks sum what they found, each keeping its channels.

    Args:
        vocabulary: V, a multiple of T.
        channels: D.
        padding: id whose vector gets no gradient; may be none.
        axis: the ranks.
    """

    shards: ClassVar[dict[str, int]] = {"weight": 0}

    def __init__(self, vocabulary: int, channels: int, padding: int | None, axis: Axis) -> None:
        own = vocabulary // axis.size
        self._first = axis.rank * own
        mine = padding is not None and 0 <= padding - self._first < own
        super().__init__(own, channels, padding_idx=padding - self._first if mine and padding is not None else None)
        self.axis = axis

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 to (B, L, D / T)."""
        local = input_ids - self._first
        mine = (local >= 0) & (local < self.num_embeddings)
        found = F.embedding(local.where(mine, 0), self.weight, self.padding_idx) * mine[..., None]
        return reduce_scatter(found, self.axis)


class CutTokenTypes(TensorParallel, nn.Embedding):
    """Token type embeddings, of which every rank has its channels."""

    shards: ClassVar[dict[str, int]] = {"weight": 1}


class _CrossEntropy(torch.autograd.Function):
    """Summed over targets; forward and backward see this rank's columns of the logits only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, axis: Axis) -> Tensor:
        first = axis.rank * logits.shape[1]
        largest = logits.amax(1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=axis.group)
        shifted = logits - largest[:, None]
        local = targets - first
        mine = (local >= 0) & (local < logits.shape[1])
        place = local.where(mine, 0)[:, None]
        hit = shifted.gather(1, place)[:, 0] * mine
        sums = torch.stack([hit, shifted.exp_().sum(1)])
        dist.all_reduce(sums, group=axis.group)
        counted = targets != ignore_index
        ctx.save_for_backward(shifted.div_(sums[1][:, None]), place, mine, counted)
        return ((sums[1].log() - sums[0]) * counted).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, place, mine, counted = ctx.saved_tensors
        out = probabilities.clone()
        out.scatter_add_(1, place, -mine[:, None].to(out.dtype))
        return out * (counted * gradient)[:, None], None, None, None


def cut_cross_entropy(logits: Tensor, labels: Tensor, axis: Axis, ignore_index: int = -100) -> Tensor:
    """Cross-entropy summed over labels, in fp32; the same number on all ranks.

    Args:
        logits: (..., V / T), this rank's columns.
        labels: (...) int64; `ignore_index` does not count.
        axis: the ranks.
        ignore_index: label of a place without a target.

    Returns:
        A scalar, nats.
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return _CrossEntropy.apply(flat, labels.reshape(-1), ignore_index, axis)
