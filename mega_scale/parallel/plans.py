"""How the modules of each model family are computed in parts: one table by class of module, over one set of parts.

A module that is in no plan needs nothing: it computes its own tokens and channels, or its children do.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple, cast

from torch import nn

from mega_scale.model.basic_layers import LanguageModelHead, MegaLinear
from mega_scale.model.layers import (
    MegaEmbeddings,
    MegaMovingAverageGatedAttention,
    MegaMultiDimensionDampedEma,
    MegaNormalizedFeedForwardNetwork,
    MegaRMSNorm,
    MegaScaleNorm,
)
from mega_scale.model.modeling_mega import MegaForCausalLM
from mega_scale.parallel.sequence_parallel import MomentExchange, StateExchange
from mega_scale.parallel.shard import SegmentedLinear, on_meta
from mega_scale.parallel.tensor_parallel import (
    ChannelParallelNorm,
    ColumnParallelLinear,
    RowParallelLinear,
    VocabularyParallelEmbedding,
    VocabularyParallelHead,
    gather_inputs,
    sharded,
)
from mega_scale.parallel.world import Axis


class Plan(NamedTuple):
    """How modules of one class are computed in parts."""

    prepare: Callable[[Any], None] | None = None  # what every layout does, so that checkpoints bear the same names
    carry: type[StateExchange | MomentExchange] | None = None  # what brings a part of a row the state before it
    divide: Callable[[Any, Axis], nn.Module] | None = None  # this rank's part of its channels; None: its children's


def divide(module: nn.Module, axis: Axis) -> nn.Module:
    """This rank's part of a module on the meta device that is prepared, and of its children."""
    if (plan := PLANS.get(type(module))) is not None and plan.divide is not None:
        module = plan.divide(module, axis)
    for name, child in list(module.named_children()):
        module.add_module(name, divide(child, axis))
    return module


def _average(whole: Any, axis: Axis, config: Any) -> nn.Module:
    """A moving average of this rank's channels: each has its own, so nothing travels."""
    own = copy(config)
    own.hidden_size //= axis.size
    part = sharded(type(whole), axis, {name: 0 for name, _ in whole.named_parameters()}, own)
    part.carry = whole.carry
    return cast(nn.Module, part)


# Mega


def _separate_segments(attention: Any) -> None:
    attention.mx_proj = on_meta(SegmentedLinear, attention.config.hidden_size, attention.segments)


def _gated_attention(whole: Any, axis: Axis) -> nn.Module:
    """Gated attention with this rank's values; queries and keys, of one head, are everyone's."""
    config = whole.config
    attention = sharded(MegaMovingAverageGatedAttention, axis, {}, config)
    for name, module in whole.named_children():
        attention.add_module(name, module)
    segments = attention.mx_proj
    for name, layer in list(segments.named_children()):
        segments.add_module(name, on_meta(ColumnParallelLinear, layer, axis))
    segments.shared = sharded(MegaLinear, axis, {}, config.hidden_size, whole.segments["shared"])  # queries and keys
    attention.v_proj = on_meta(ColumnParallelLinear, whole.v_proj, axis)
    attention.h_proj = on_meta(RowParallelLinear, whole.h_proj, axis)
    attention.ema_gate = _average(whole.ema_gate, axis, config)
    attention.rel_pos_bias = sharded(type(whole.rel_pos_bias), axis, {}, config)
    # The stream's channels travel while the average is computed, the average's while values are.
    stream, average = gather_inputs(axis, attention.v_proj), gather_inputs(axis, segments)
    attention.ema_gate.register_forward_pre_hook(lambda module, args: stream.expect(args[0]))
    attention.ema_dropout.register_forward_hook(lambda module, args, output: average.expect(output))
    return attention


def _feed_forward(module: Any, axis: Axis) -> nn.Module:
    module.fc1 = on_meta(ColumnParallelLinear, module.fc1, axis)
    module.fc2 = on_meta(RowParallelLinear, module.fc2, axis)
    gather_inputs(axis, module.fc1)
    return module


def _embeddings(module: Any, axis: Axis) -> nn.Module:
    if (types := module.token_type_embeddings) is not None:
        sizes = types.num_embeddings, types.embedding_dim // axis.size
        module.token_type_embeddings = sharded(nn.Embedding, axis, {"weight": 1}, *sizes)
    return module


def _causal_model(model: Any, axis: Axis) -> nn.Module:
    if model.dense is not None:
        model.dense = on_meta(ColumnParallelLinear, model.dense, axis)
        gather_inputs(axis, model.dense)
    return model


PLANS: dict[type[nn.Module], Plan] = {
    nn.Embedding: Plan(divide=VocabularyParallelEmbedding),
    nn.LayerNorm: Plan(divide=ChannelParallelNorm),
    LanguageModelHead: Plan(divide=lambda head, axis: on_meta(VocabularyParallelHead, head, axis)),
    MegaForCausalLM: Plan(divide=_causal_model),
    MegaEmbeddings: Plan(divide=_embeddings),
    MegaRMSNorm: Plan(divide=ChannelParallelNorm),
    MegaScaleNorm: Plan(divide=ChannelParallelNorm),
    MegaMovingAverageGatedAttention: Plan(prepare=_separate_segments, divide=_gated_attention),
    MegaMultiDimensionDampedEma: Plan(carry=StateExchange),
    MegaNormalizedFeedForwardNetwork: Plan(divide=_feed_forward),
}
"""The plan of every class of modules that needs one."""
