"""Tensor parallelism: this rank's part of the modules of a model, and of its vocabulary.

The residual stream is sharded over channels. The moving average, norms, gates and the stream itself then need only a
statistic a token; a block gathers the channels of its stream for values, of its average for gates, queries and keys,
and of its stream again for the feed-forward network, and sums its two outputs over ranks: five large collectives.
Queries and keys are computed by every rank, but each sees only what its own values made of them; so the gradient of a
parameter that every rank holds is a sum over ranks. Logits of one token never meet on a rank in training.

Legend: B batch, L length, D channels of the residual stream, E width of values, F of the feed-forward network, W any
width inside a layer, T ranks, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mega_scale.model import MegaConfig, MegaForCausalLM, MegaPreTrainedModel
from mega_scale.model.layers import (
    MegaEmbeddings,
    MegaLinear,
    MegaNormalizedFeedForwardNetwork,
    MegaRMSNorm,
    MegaRotaryRelativePositionalBias,
    MegaScaleNorm,
    MegaSequenceNorm,
    MegaSimpleRelativePositionalBias,
    check_ids,
)
from mega_scale.model.modeling_mega import LanguageModelHead
from mega_scale.ops import autocast_dtype, once_differentiable
from mega_scale.ops.linear import VocabularyPart, linear, linear_cross_entropy
from mega_scale.parallel.mesh import check_tensor_parallel
from mega_scale.parallel.sequence_parallel import SequenceParallelEma
from mega_scale.parallel.shard import (
    SegmentedAttention,
    SegmentedLinear,
    ShardedModule,
    on_meta,
    replace_modules,
    shard_length,
)
from mega_scale.parallel.world import Axis, Gather, gather_replicated, reduce_scatter, start_gather, sum_gradient


class TensorParallel(ShardedModule):
    """A module whose parameters are this rank's shards; reading one gives what the module's arithmetic needs."""

    # A parameter that every rank holds needs its gradient summed between its use and the engine's reduction. FSDP2 and
    # ZeRO-3 gather parameters just before the forward and have no hook there, and torch's parametrizations would rename
    # them: hence on reading, which leaves the forward of the module that this is mixed into as it is.

    axis: Axis

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if name not in self.__dict__["_parameters"] or value is None:
            return value
        axis: Axis | None = self.__dict__.get("axis")
        if axis is None or name in self.shard_dims or isinstance(value, DTensor):
            return value  # a DTensor is sharded by FSDP, which reads it in this way too; nobody computes with it
        return sum_gradient(value, axis)


def _along(axis: Axis, kind: type[TensorParallel], *args: Any, **kwargs: Any) -> Any:
    """Make a module on the meta device, and tell it the ranks that share it."""
    module = on_meta(kind, *args, **kwargs)
    module.axis = axis
    return module


class ColumnParallelLinear(TensorParallel, MegaLinear):
    """A linear layer of which a rank has some outputs, and all inputs: (B, L, D) to (B, L, W / T)."""

    shard_dims: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}

    def __init__(self, inputs: int, outputs: int, axis: Axis, bias: bool = True) -> None:
        super().__init__(inputs, shard_length(outputs, axis.size), bias)
        self.axis = axis


class _Gathering:
    """Gathers the channels of an input, (B, L, D / T) to (B, L, D), from when they are known until they are needed."""

    axis: Axis
    _coming: Gather | None = None

    def expect(self, x: Tensor) -> None:
        """Start before the layer is called with x."""
        # As a matrix product will see it, so that under autocast only 16 bits of a number travel.
        self._coming = Gather(x.to(autocast_dtype(x.device) or x.dtype), self.axis)

    def gathered(self, x: Tensor) -> Tensor:
        """All channels of x, which is what was given to `expect` if anything was."""
        if self._coming is None:
            self.expect(x)
        coming, self._coming = self._coming, None
        assert coming is not None
        return coming.wait()


class GatherLinear(_Gathering, ColumnParallelLinear):
    """`ColumnParallelLinear` of an input whose channels are sharded: (B, L, D / T) to (B, L, W / T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gathered(x))


class RowParallelLinear(TensorParallel, MegaLinear):
    """A linear layer whose inputs are sharded: ranks sum their outputs, each keeping its channels: W / T to D / T."""

    shard_dims: ClassVar[dict[str, int]] = {"weight": 1, "bias": 0}

    def __init__(self, inputs: int, outputs: int, axis: Axis) -> None:
        super().__init__(inputs // axis.size, outputs)
        self.axis = axis
        self.bias = nn.Parameter(torch.empty(outputs // axis.size, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        out = reduce_scatter(linear(x, self.weight), self.axis)
        return out + self.bias.to(out.dtype)


class ReplicatedLinear(TensorParallel, MegaLinear):
    """A linear layer that every rank computes alike."""


class GatherSegments(_Gathering, SegmentedLinear):
    """`SegmentedLinear` of an input whose channels are sharded: they are gathered once for all segments."""

    def __init__(self, segments: dict[str, nn.Module], rows: Mapping[str, tuple[int, int]], axis: Axis) -> None:
        super().__init__(segments, rows)
        self.axis = axis


class TensorParallelEma(TensorParallel, SequenceParallelEma):
    """The moving average of this rank's channels: each channel has its own, so nothing travels."""

    shard_dims: ClassVar[dict[str, int]] = {
        "damping_factor": 0,
        "decay_factor": 0,
        "ema_expansion_matrix": 0,
        "kernel_projection_matrix": 0,
        "residual_weight": 0,
    }

    def __init__(self, config: MegaConfig, whole: SequenceParallelEma, axis: Axis) -> None:
        super().__init__(config, whole.row_slice, whole.exchange)
        self.axis = axis
        for name, parameter in list(self._parameters.items()):
            assert parameter is not None
            setattr(self, name, nn.Parameter(parameter.detach()[: parameter.shape[0] // axis.size]))


class TensorParallelAttention(TensorParallel, SegmentedAttention):
    """Gated attention with this rank's values; queries and keys are everyone's."""

    def __init__(self, config: MegaConfig, whole: SegmentedAttention, axis: Axis) -> None:
        super().__init__(config)
        self.axis = axis
        for name, module in whole.named_children():
            self.add_module(name, module)
        packed: Any = whole.mx_proj
        layers: dict[str, nn.Module] = {}
        for key, layer in packed.named_children():
            widths = layer.in_features, layer.out_features
            # Every rank computes queries and keys.
            shared = key == "shared"
            layers[key] = _along(axis, ReplicatedLinear, *widths) if shared else ColumnParallelLinear(*widths, axis)
        gathering = GatherSegments(layers, packed.rows, axis)
        self.add_module("mx_proj", gathering)
        self.v_proj = GatherLinear(whole.v_proj.in_features, whole.v_proj.out_features, axis)
        self.h_proj = RowParallelLinear(whole.h_proj.in_features, whole.h_proj.out_features, axis)
        average: Any = whole.ema_gate
        self.ema_gate = TensorParallelEma(config, average, axis)
        rotary = isinstance(whole.rel_pos_bias, MegaRotaryRelativePositionalBias)
        self.rel_pos_bias = _along(axis, ReplicatedRotaryBias if rotary else ReplicatedSimpleBias, config)
        # The stream's channels travel while the average is computed, the average's while values are.
        self.ema_gate.register_forward_pre_hook(lambda module, args: self.v_proj.expect(args[0]))
        self.ema_dropout.register_forward_hook(lambda module, args, output: gathering.expect(output))

    def project(self, averaged: Tensor) -> tuple[Tensor, ...]:
        """The average (B, L, D / T) to this rank's part of each segment."""
        segments: Any = self.mx_proj
        return super().project(segments.gathered(averaged))


class ReplicatedRotaryBias(TensorParallel, MegaRotaryRelativePositionalBias):
    """A positional bias that every rank holds."""


class ReplicatedSimpleBias(TensorParallel, MegaSimpleRelativePositionalBias):
    """A positional bias that every rank holds."""


class _Normalize(torch.autograd.Function):
    """x over its root mean square, after subtracting its mean if `center`, over the channels of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, center: bool, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if center:
            # Means and squared distances from them combine without cancellation, unlike sums of squares.
            mean = wide.mean(-1)
            squares = (wide - mean[..., None]).square().mean(-1)
            means, variances = start_gather(torch.stack([mean, squares]), axis).wait().unbind(1)
            total = means.mean(0)
            variance = variances.mean(0) + (means - total).square().mean(0)
            wide = wide - total[..., None]
        else:
            variance = wide.square().mean(-1)
            dist.all_reduce(variance, group=axis.group)
            variance /= axis.size
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
        dist.all_reduce(sums, group=ctx.axis.group)
        sums = (sums / ctx.axis.size)[..., None]
        moved = gradient - out * sums[0]
        return ((moved - sums[1] if ctx.center else moved) * scale).to(ctx.dtype), None, None, None


class _ChannelParallelNorm(TensorParallel):
    """A norm over channels that are sharded: one or two statistics a token travel."""

    center, gain = False, "weight"
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D / T); the gain is a number, or one a channel."""
        out = _Normalize.apply(x, self.axis, self.center, self.eps)
        gain, bias = getattr(self, self.gain), getattr(self, "bias", None)
        out = out if gain is None else out * gain
        out = out if bias is None else out + bias
        return out.to(x.dtype)


class ChannelParallelLayerNorm(_ChannelParallelNorm, nn.LayerNorm):
    """LayerNorm over sharded channels."""

    shard_dims: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}
    center = True


class ChannelParallelRMSNorm(_ChannelParallelNorm, MegaRMSNorm):
    """RMSNorm over sharded channels."""

    shard_dims: ClassVar[dict[str, int]] = {"weight": 0}


class ChannelParallelScaleNorm(_ChannelParallelNorm, MegaScaleNorm):
    """ScaleNorm over sharded channels; its one number is everyone's."""

    gain = "scalar"


def channel_parallel_norm(norm: nn.Module, axis: Axis) -> nn.Module:
    """The same norm over sharded channels, on the meta device."""
    if isinstance(norm, nn.LayerNorm):
        [channels] = norm.normalized_shape
        affine = norm.elementwise_affine
        return _along(axis, ChannelParallelLayerNorm, channels // axis.size, norm.eps, elementwise_affine=affine)
    if isinstance(norm, MegaRMSNorm):
        channels = norm.weight.shape[0] if norm.weight is not None else axis.size
        return _along(axis, ChannelParallelRMSNorm, channels // axis.size, norm.eps, norm.weight is not None)
    if isinstance(norm, MegaScaleNorm):
        return _along(axis, ChannelParallelScaleNorm, norm.eps, norm.scalar is not None)
    raise ValueError(
        f"parallel.tp={axis.size} shards channels, which {type(norm).__name__} does not support: "
        "choose model.normalization_type=layernorm, scalenorm or rmsnorm"
    )


class VocabularyParallelEmbedding(TensorParallel, nn.Embedding):
    """Word embeddings of this rank's ids; ranks sum what they found, each keeping its channels."""

    shard_dims: ClassVar[dict[str, int]] = {"weight": 0}

    def __init__(self, vocabulary: int, channels: int, padding: int | None, axis: Axis) -> None:
        own = shard_length(vocabulary, axis.size)
        self._first = axis.rank * own
        mine = padding is not None and 0 <= padding - self._first < own
        super().__init__(own, channels, padding_idx=padding - self._first if mine and padding is not None else None)
        self.axis = axis
        self.length: int = vocabulary

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 to (B, L, D / T); raises ValueError for ids outside the vocabulary on a CPU."""
        check_ids(input_ids, self.length, "input_ids", "vocab_size")
        local = input_ids - self._first
        mine = (local >= 0) & (local < self.num_embeddings)
        found = F.embedding(local.where(mine, 0), self.weight, self.padding_idx) * mine[..., None]
        return reduce_scatter(found, self.axis)


class ChannelParallelEmbedding(TensorParallel, nn.Embedding):
    """Token type embeddings, of which every rank has its channels."""

    shard_dims: ClassVar[dict[str, int]] = {"weight": 1}


class VocabularyParallelHead(GatherLinear, LanguageModelHead):
    """`LanguageModelHead` of an input whose channels are sharded, with this rank's words."""

    def __init__(self, inputs: int, outputs: int, axis: Axis, bias: bool) -> None:
        super().__init__(inputs, outputs, axis, bias)
        self.length: int = outputs

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x (B, L, D / T) to logits of all words, or with targets (B, L) to the loss, the same on all ranks."""
        if targets is None:
            return gather_replicated(super().forward(x), self.axis)[..., : self.length]
        part = vocabulary_part(self.out_features, self.axis, self.length)
        return linear_cross_entropy(self.gathered(x), self.weight, self.bias, targets, part=part)


def vocabulary_part(rows: int, axis: Axis, vocabulary: int | None = None) -> VocabularyPart:
    """This rank's words, for which all ranks of the axis have as many rows; V fills all of them if not given."""
    first = axis.rank * rows

    def reduce(tensor: Tensor, kind: Literal["max", "sum"]) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM, group=axis.group)

    return VocabularyPart(first, rows if vocabulary is None else min(max(vocabulary - first, 0), rows), reduce)


def apply_tensor_parallelism(model: MegaPreTrainedModel, axis: Axis) -> None:
    """Replace the modules of a model on the meta device, with separate segments, by this rank's part of them."""
    check_tensor_parallel(model.config, axis.size)

    def build(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, SegmentedAttention):
            return on_meta(TensorParallelAttention, model.config, module, axis)
        return None

    replace_modules(model, build)
    for module in list(model.modules()):
        if isinstance(module, MegaSequenceNorm):
            module.norm = channel_parallel_norm(module.norm, axis)
        elif isinstance(module, MegaNormalizedFeedForwardNetwork):
            module.fc1 = on_meta(GatherLinear, module.fc1.in_features, module.fc1.out_features, axis)
            module.fc2 = on_meta(RowParallelLinear, module.fc2.in_features, module.fc2.out_features, axis)
        elif isinstance(module, MegaEmbeddings):
            words, types = module.word_embeddings, module.token_type_embeddings
            module.word_embeddings = on_meta(
                VocabularyParallelEmbedding, words.num_embeddings, words.embedding_dim, words.padding_idx, axis
            )
            if types is not None:
                sizes = types.num_embeddings, types.embedding_dim // axis.size
                module.token_type_embeddings = _along(axis, ChannelParallelEmbedding, *sizes)
    if isinstance(model, MegaForCausalLM):
        head: Any = model.lm_head
        if model.dense is not None:
            has_bias = model.dense.bias is not None
            model.dense = on_meta(GatherLinear, model.dense.in_features, model.dense.out_features, axis, has_bias)
        model.lm_head = on_meta(
            VocabularyParallelHead, head.in_features, head.out_features, axis, head.bias is not None
        )
        if model.config.tie_word_embeddings:
            words = model.mega.embedding_layer.word_embeddings
            model.lm_head.register_parameter("weight", words._parameters["weight"])
