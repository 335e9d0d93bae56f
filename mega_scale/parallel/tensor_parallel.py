"""Tensor parallelism: the parts of which `plans` builds this rank's share of a model, and of its vocabulary.

The residual stream is sharded over channels; norms, gates and the stream itself then need only a statistic a token. A
block gathers the channels of its normed stream twice, for attention and for the feed-forward network, and sums its two
outputs over ranks: four large collectives, and backward the same four. Every rank computes the moving average of all
channels, at the speed of its memory, as both the average and its input are then whole where products read them; the
gradients of both, of which each rank has a share, go back through one sum.
A parameter that every rank holds sees only what the rank's own part made of it; so its gradient is a sum over ranks.
Logits of one token never meet on a rank in training.

Legend: B batch, L length, D channels of the residual stream, E width of values, F of the feed-forward network, W any
width inside a layer, T ranks, V vocabulary.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mega_scale.model.basic_layers import LanguageModelHead, MegaLinear, check_ids, linear_layers
from mega_scale.model.megalodon_layers import MegalodonLayerNorm
from mega_scale.ops import autocast_dtype, once_differentiable, opaque
from mega_scale.ops.linear import VocabularyPart, linear, linear_cross_entropy
from mega_scale.parallel.overlap import gathered_products, overlaps, scattered_product
from mega_scale.parallel.shard import on_meta, shard_length
from mega_scale.parallel.world import Axis, collective, gather, gather_replicated, reduce_scatter, sum_gradients


class TensorParallel(nn.Module):
    """A module whose parameters are this rank's shards; reading one gives what the module's arithmetic needs."""

    # A parameter that every rank holds needs its gradient summed between its use and the engine's reduction. FSDP2 and
    # ZeRO-3 gather parameters just before the forward and have no hook there, and torch's parametrizations would rename
    # them: hence on reading, which leaves the forward of the module that this is mixed into as it is.

    axis: Axis
    shard_dims: Mapping[str, int] = {}  # along which a parameter is sharded, by its name; others are whole
    length: int | None = None  # of that dimension in the whole, where ranks need not divide it
    needed: Mapping[str, tuple[int, int, int]] = {}  # of what every rank holds, by name: dimension, first and length

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if name not in self.__dict__["_parameters"] or value is None:
            return value
        axis: Axis | None = self.__dict__.get("axis")
        if axis is None or name in self.shard_dims or isinstance(value, DTensor):
            return value  # a DTensor is sharded by FSDP, which reads it in this way too; nobody computes with it
        (value,) = sum_gradients(axis, value)
        # Outside the module's forward ZeRO-3 leaves nothing of it, and prints modules.
        return value.narrow(*self.needed[name]) if name in self.needed and value.numel() else value


@cache  # one class a kind, as blocks of one class share a compiled graph
def _sharded_kind(kind: Any) -> Any:
    return type(kind.__name__, (TensorParallel, kind), {})


def sharded(kind: Any, axis: Axis, dims: Mapping[str, int], *args: Any) -> Any:
    """Make a module of a kind on the meta device; its parameters in `dims` are shards, every rank has its others."""
    module: Any = on_meta(_sharded_kind(kind), *args)
    module.axis, module.shard_dims = axis, dims
    return module


def gather_channels(x: Tensor, axis: Axis) -> Tensor:
    """All channels of a tensor of which every rank has some, (B, L, D / T) to (B, L, D), for the products that read it.

    In the dtype that those see, so that under autocast only 16 bits of a number travel.
    """
    return gather(_as_multiplied(x), axis)


def gather_for(x: Tensor, *layers: "ColumnParallelLinear", axis: Axis) -> tuple[Tensor, ...]:
    """`gather_channels`, and what layers make of all channels: (B, L, D), and (B, L, W / T) a layer."""
    if overlaps(axis):
        return _products(x, *layers, axis=axis)
    whole = gather_channels(x, axis)
    return whole, *linear_layers(whole, *layers)


def _products(x: Tensor, *layers: "ColumnParallelLinear", axis: Axis) -> tuple[Tensor, ...]:
    x = _as_multiplied(x)
    whole, *outs = gathered_products(axis, x, *(layer.weight.to(x.dtype) for layer in layers))
    biased = (
        out if layer.bias is None else out + layer.bias.to(out.dtype) for out, layer in zip(outs, layers, strict=True)
    )
    return whole, *biased


def _as_multiplied(x: Tensor) -> Tensor:
    return x.to(autocast_dtype(x.device) or x.dtype)


class ColumnParallelLinear(TensorParallel, MegaLinear):
    """A linear layer of which a rank has some outputs, and all inputs: (B, L, D) to (B, L, W / T)."""

    def __init__(self, whole: nn.Linear, axis: Axis) -> None:
        super().__init__(whole.in_features, shard_length(whole.out_features, axis.size), whole.bias is not None)
        self.axis, self.shard_dims = axis, {"weight": 0, "bias": 0}


class GatheringLinear(ColumnParallelLinear):
    """The same of an input whose channels are sharded, (B, L, D / T), and that no other layer reads."""

    def forward(self, x: Tensor) -> Tensor:
        if overlaps(self.axis):
            return _products(x, self, axis=self.axis)[1]
        return super().forward(gather_channels(x, self.axis))


class RowParallelLinear(TensorParallel, MegaLinear):
    """A linear layer whose inputs are sharded: ranks sum their outputs, each keeping its channels: W / T to D / T."""

    def __init__(self, whole: nn.Linear, axis: Axis) -> None:
        super().__init__(whole.in_features // axis.size, whole.out_features, bias=False)
        self.axis, self.shard_dims = axis, {"weight": 1, "bias": 0}
        if whole.bias is not None:
            self.bias = nn.Parameter(torch.empty(whole.out_features // axis.size, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if overlaps(self.axis):
            x = _as_multiplied(x)
            out = scattered_product(self.axis, x, self.weight.to(x.dtype))
        else:
            out = reduce_scatter(linear(x, self.weight), self.axis)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Normalize(torch.autograd.Function):
    """x over its root mean square, after subtracting its mean if `center`, over the channels of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, center: bool, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))

        if center:
            mean = wide.mean(-1)
            own = torch.stack([mean, (wide - mean[..., None]).square().mean(-1)])
            mean, variance = collective(own, axis, "join moments")
            wide = wide - mean[..., None]
        else:
            variance = collective(wide.square().mean(-1), axis, "sum") / axis.size
        scale = torch.rsqrt(variance + eps)[..., None]
        out = wide * scale
        ctx.axis, ctx.center, ctx.dtype = axis, center, x.dtype
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        out, scale = ctx.saved_tensors
        along = (gradient * out).mean(-1)
        sums = torch.stack([along, gradient.mean(-1)]) if ctx.center else along[None]
        sums = (collective(sums, ctx.axis, "sum", forward=False) / ctx.axis.size)[..., None]
        moved = gradient - out * sums[0]
        return ((moved - sums[1] if ctx.center else moved) * scale).to(ctx.dtype), None, None, None


_normalize = opaque(_Normalize.apply)


class ChannelParallelNorm(TensorParallel):
    """Layer norm, RMS norm or ScaleNorm over sharded channels: one or two statistics a token travel."""

    def __init__(self, whole: Any, axis: Axis) -> None:
        super().__init__()
        self.axis, self.eps = axis, whole.eps
        self.center = isinstance(whole, nn.LayerNorm | MegalodonLayerNorm)
        self.added = 1.0 if isinstance(whole, MegalodonLayerNorm) else 0.0  # to the gain
        self.shard_dims = {"weight": 0, "bias": 0}  # the one number of ScaleNorm is everyone's
        for name, parameter in whole.named_parameters():
            own = parameter[: len(parameter) // axis.size] if name in self.shard_dims else parameter
            self.register_parameter(name, nn.Parameter(own.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D / T)."""
        out = _normalize(x, self.axis, self.center, self.eps)
        for name in self._parameters:  # the gain, a number or one a channel, and the bias
            out = out + self.bias if name == "bias" else out * (getattr(self, name).to(out.dtype) + self.added)
        return out.to(x.dtype)


class VocabularyParallelEmbedding(TensorParallel, nn.Embedding):
    """Word embeddings of this rank's ids; ranks sum what they found, each keeping its channels."""

    def __init__(self, whole: nn.Embedding, axis: Axis) -> None:
        own = shard_length(whole.num_embeddings, axis.size)
        self._first = axis.rank * own
        padding = -1 if whole.padding_idx is None else whole.padding_idx - self._first
        super().__init__(own, whole.embedding_dim, padding_idx=padding if 0 <= padding < own else None)
        self.axis, self.shard_dims = axis, {"weight": 0}
        self.length: int = whole.num_embeddings

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 to (B, L, D / T); raises ValueError for ids outside the vocabulary on a CPU."""
        check_ids(input_ids, self.length, "input_ids", "vocab_size")
        local = input_ids - self._first
        mine = (local >= 0) & (local < self.num_embeddings)
        found = F.embedding(local.where(mine, 0), self.weight, self.padding_idx) * mine[..., None]
        return reduce_scatter(found, self.axis)


class VocabularyParallelHead(ColumnParallelLinear, LanguageModelHead):
    """`LanguageModelHead` of an input whose channels are sharded, with this rank's words."""

    def __init__(self, whole: nn.Linear, axis: Axis) -> None:
        super().__init__(whole, axis)
        self.length: int = whole.out_features

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x (B, L, D / T) to logits of all words, or with targets (B, L) to the loss, the same on all ranks."""
        x = gather_channels(x, self.axis)
        if targets is None:
            return gather_replicated(super().forward(x), self.axis)[..., : self.length]
        part = vocabulary_part(self.out_features, self.axis, self.length)
        return linear_cross_entropy(x, self.weight, self.bias, targets, part=part)


def vocabulary_part(rows: int, axis: Axis, vocabulary: int) -> VocabularyPart:
    """This rank's words, for which all ranks of the axis have as many rows."""
    first = axis.rank * rows

    def reduce(tensor: Tensor, kind: Literal["max", "sum"]) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM, group=axis.group)

    return VocabularyPart(first, min(max(vocabulary - first, 0), rows), reduce)
