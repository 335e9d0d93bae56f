"""How the modules of each model family are computed in parts: one table by class of module, over one set of parts.

A module that is in no plan needs nothing: it computes its own tokens and channels, or its children do.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, NamedTuple, cast

import torch
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
from mega_scale.model.megalodon_layers import (
    MegalodonAttention,
    MegalodonComplexEma,
    MegalodonFeedForward,
    MegalodonLayerNorm,
    MegalodonRMSNorm,
    MegalodonTimestepNorm,
)
from mega_scale.model.modeling_mega import MegaForCausalLM
from mega_scale.parallel.sequence_parallel import MomentExchange, StateExchange
from mega_scale.parallel.shard import RowSlice, on_meta
from mega_scale.parallel.tensor_parallel import (
    ChannelParallelNorm,
    ColumnParallelLinear,
    GatheringLinear,
    RowParallelLinear,
    VocabularyParallelEmbedding,
    VocabularyParallelHead,
    gather_for,
    sharded,
)
from mega_scale.parallel.world import Axis, sum_gradients


class Plan(NamedTuple):
    """How modules of one class are computed in parts."""

    carry: type[StateExchange | MomentExchange] | None = None  # what brings a part of a row the state before it
    divide: Callable[[Any, Axis], nn.Module] | None = None  # this rank's part of its channels; None: its children's


def share_rows(model: nn.Module, axis: Axis, row_slice: RowSlice) -> None:
    """Have the modules of a model bring the states before their part of a row."""
    for module in model.modules():
        if (plan := PLANS.get(type(module))) is not None and plan.carry is not None:
            own: Any = module
            own.carry = partial(_carry, plan.carry(axis), row_slice)


def _carry(exchange: Any, row_slice: RowSlice) -> Any:
    return exchange if row_slice.cut else None


def divide(module: nn.Module, axis: Axis) -> nn.Module:
    """This rank's part of a module on the meta device that is prepared, and of its children."""
    if (plan := PLANS.get(type(module))) is not None and plan.divide is not None:
        module = plan.divide(module, axis)
    for name, child in list(module.named_children()):
        module.add_module(name, divide(child, axis))
    return module


def _own_channels(module: Any, axis: Axis) -> nn.Module:
    """Leave this rank's channels in parameters of which each row belongs to one; its arithmetic meets no others."""
    own = dict(module.named_parameters(recurse=False))
    for name, parameter in own.items():
        setattr(module, name, nn.Parameter(parameter[: len(parameter) // axis.size].detach()))
    module.shard_dims = dict.fromkeys(own, 0)
    return cast(nn.Module, module)


def _all_channels(average: Any, axis: Axis) -> nn.Module:
    """Every rank averages all channels, and has a share of the gradient of what it makes of them."""
    average.sum_gradients = partial(sum_gradients, axis)
    return cast(nn.Module, average)


# Mega


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
    attention.rel_pos_bias = sharded(type(whole.rel_pos_bias), axis, {}, config)
    attention.read_by = partial(gather_for, axis=axis)
    return cast(nn.Module, attention)


def _feed_forward(module: Any, axis: Axis) -> nn.Module:
    module.fc1 = on_meta(GatheringLinear, module.fc1, axis)
    module.fc2 = on_meta(RowParallelLinear, module.fc2, axis)
    return cast(nn.Module, module)


def _embeddings(module: Any, axis: Axis) -> nn.Module:
    if (types := module.token_type_embeddings) is not None:
        sizes = types.num_embeddings, types.embedding_dim // axis.size
        module.token_type_embeddings = sharded(nn.Embedding, axis, {"weight": 1}, *sizes)
    return module


def _causal_model(model: Any, axis: Axis) -> nn.Module:
    if model.dense is not None:
        model.dense = on_meta(GatheringLinear, model.dense, axis)
    return model


# Megalodon


def _timestep_norm(norm: Any, axis: Axis) -> nn.Module:
    """The norm of this rank's groups of channels: each has its own moments, so nothing travels."""
    norm.groups //= axis.size
    return _own_channels(norm, axis)


def _normalized_attention(whole: Any, axis: Axis) -> nn.Module:
    """Attention with this rank's heads; or its values of one head, with the queries and keys of that one."""
    config, own, heads = whole.config, copy(whole.config), whole.heads
    by_head = heads % axis.size == 0
    own.num_attention_heads = heads // axis.size if by_head else 1
    attention = sharded(MegalodonAttention, axis, {"gamma": 1, "beta": 1} if by_head else {}, own)
    for name, module in whole.named_children():
        attention.add_module(name, module)
    for name in ("wv", "wr", "wh1", *(("wz",) if by_head else ())):
        attention.add_module(name, on_meta(ColumnParallelLinear, attention.get_submodule(name), axis))
    attention.wh2 = on_meta(RowParallelLinear, whole.wh2, axis)
    keys = config.shared_representation_size
    if by_head:
        for name in ("gamma", "beta"):
            attention.register_parameter(name, nn.Parameter(torch.empty(2, keys // axis.size, device="meta")))
    else:
        head = axis.rank * heads // axis.size * (keys // heads), keys // heads
        attention.wz = sharded(MegaLinear, axis, {}, config.hidden_size, keys)
        attention.wz.needed = dict.fromkeys(("weight", "bias"), (0, *head))
        attention.needed = dict.fromkeys(("gamma", "beta"), (1, *head))
    attention.rmsnorm = sharded(MegalodonRMSNorm, axis, {}, config.hidden_size, config.norm_eps, config.norm_affine)
    attention.read_by = partial(gather_for, axis=axis)
    return cast(nn.Module, attention)


def _swiglu_feed_forward(module: Any, axis: Axis) -> nn.Module:
    layers = [name for name in ("fc1", "fc3") if getattr(module, name) is not None]
    for name in layers:
        module.add_module(name, on_meta(ColumnParallelLinear, module.get_submodule(name), axis))
    module.fc2 = on_meta(RowParallelLinear, module.fc2, axis)
    module.read_by = partial(gather_for, axis=axis)
    return _own_channels(module, axis)  # alpha


PLANS: dict[type[nn.Module], Plan] = {
    nn.Embedding: Plan(divide=VocabularyParallelEmbedding),
    nn.LayerNorm: Plan(divide=ChannelParallelNorm),
    LanguageModelHead: Plan(divide=lambda head, axis: on_meta(VocabularyParallelHead, head, axis)),
    MegaForCausalLM: Plan(divide=_causal_model),
    MegaEmbeddings: Plan(divide=_embeddings),
    MegaRMSNorm: Plan(divide=ChannelParallelNorm),
    MegaScaleNorm: Plan(divide=ChannelParallelNorm),
    MegaMovingAverageGatedAttention: Plan(divide=_gated_attention),
    MegaMultiDimensionDampedEma: Plan(carry=StateExchange, divide=_all_channels),
    MegaNormalizedFeedForwardNetwork: Plan(divide=_feed_forward),
    MegalodonAttention: Plan(divide=_normalized_attention),
    MegalodonComplexEma: Plan(carry=StateExchange, divide=_all_channels),
    MegalodonFeedForward: Plan(divide=_swiglu_feed_forward),
    MegalodonLayerNorm: Plan(divide=ChannelParallelNorm),
    MegalodonTimestepNorm: Plan(carry=MomentExchange, divide=_timestep_norm),
}
"""The plan of every class of modules that needs one."""
