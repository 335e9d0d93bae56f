"""Tensor parallelism: how the modules of a model on the meta device become this rank's part of them.

The residual stream is cut over channels. The moving average, norms, gates and the stream itself then need only a
statistic a token; a block collects the channels of its stream for values, of its average for gates, queries and keys,
and of its stream again for the feed-forward network, and sums its two outputs over ranks: five large collectives.

Legend: D channels of the stream, E width of values, F of the feed-forward network, T ranks, V vocabulary.
"""

from typing import Any

from torch import nn

from mega_scale.model import MegaForCausalLM, MegaPreTrainedModel
from mega_scale.model.attention import MegaMovingAverageGatedAttention
from mega_scale.model.layers import (
    MegaEmbeddings,
    MegaLinear,
    MegaNormalizedFeedForwardNetwork,
    MegaRotaryRelativePositionalBias,
    MegaSequenceNorm,
)
from mega_scale.parallel.collectives import Axis
from mega_scale.parallel.model_checks import check_tensor_parallel
from mega_scale.parallel.shards import TensorParallel
from mega_scale.parallel.tensor_layers import (
    CutAttention,
    CutEma,
    CutLinear,
    GatherLinear,
    GatherSegments,
    ScatterLinear,
    SegmentedAttention,
    SegmentedLinear,
    SharedRotaryBias,
    SharedSimpleBias,
    WholeLinear,
    cut_norm,
    on_meta,
)
from mega_scale.parallel.vocabulary import CutLanguageModelHead, CutTokenTypes, CutVocabularyEmbedding

_SHARED_SEGMENT = "shared"  # queries and keys, which every rank computes


class CutCausalLM(MegaForCausalLM):
    """A language model that has logits or a loss, not both."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `MegaForCausalLM.forward`, with `skip_logits=True`."""
        return super().forward(*args, **{**kwargs, "skip_logits": True})


def separate_segments(model: MegaPreTrainedModel) -> None:
    """Give every segment of packed layers a layer of its own, whatever T is: checkpoints then bear the same names.

    Args:
        model: on the meta device, changed in place.
    """
    for module in list(model.modules()):
        if isinstance(module, MegaMovingAverageGatedAttention):
            channels = module.mx_proj.in_features
            layers = {key: on_meta(MegaLinear, channels, width) for key, width in module.segments.items()}
            module.add_module("mx_proj", SegmentedLinear(layers, _rows(module.segments)))
            module.__class__ = SegmentedAttention


def _rows(segments: dict[str, int]) -> dict[str, tuple[int, int]]:
    rows, begin = {}, 0
    for key, width in segments.items():
        rows[key] = (begin, begin + width)
        begin += width
    return rows


def cut_channels(model: MegaPreTrainedModel, axis: Axis) -> None:
    """Replace the modules of a model by this rank's parts of them.

    Args:
        model: on the meta device, after `separate_segments` and `share_rows`; changed in place.
        axis: the ranks that share every layer.

    Raises:
        ValueError: T does not divide a width, or the model has what cannot be cut.
    """
    check_tensor_parallel(model.config, axis.size)
    for module in list(model.modules()):
        if isinstance(module, MegaSequenceNorm):
            module.norm = cut_norm(module.norm, axis)
        elif isinstance(module, MegaMovingAverageGatedAttention):
            _cut_attention(module, axis)
        elif isinstance(module, MegaNormalizedFeedForwardNetwork):
            module.fc1 = _gather_linear(module.fc1, axis)
            module.fc2 = _scatter_linear(module.fc2, axis)
        elif isinstance(module, MegaEmbeddings):
            _cut_embeddings(module, axis)
    if isinstance(model, MegaForCausalLM):
        tied = model.config.tie_word_embeddings
        if model.dense is not None:
            model.dense = _gather_linear(model.dense, axis)
        model.lm_head = _cut_head(model.lm_head, axis)
        if tied:
            model.lm_head.register_parameter("weight", model.mega.embedding_layer.word_embeddings._parameters["weight"])
        model.__class__ = CutCausalLM


def _cut_attention(layer: MegaMovingAverageGatedAttention, axis: Axis) -> None:
    packed: Any = layer.mx_proj
    layers = {}
    for key, linear in packed.named_children():
        if key == _SHARED_SEGMENT:
            layers[key] = linear
            _become(linear, WholeLinear, axis)
        else:
            layers[key] = on_meta(CutLinear, linear.in_features, linear.out_features, axis)
    gathering = GatherSegments(layers, packed.rows)
    gathering.axis = axis
    layer.add_module("mx_proj", gathering)
    layer.v_proj = _gather_linear(layer.v_proj, axis)
    layer.h_proj = _scatter_linear(layer.h_proj, axis)
    _cut_rows(layer.ema_gate, axis)
    _become(layer.ema_gate, CutEma, axis)
    rotary = isinstance(layer.rel_pos_bias, MegaRotaryRelativePositionalBias)
    _become(layer.rel_pos_bias, SharedRotaryBias if rotary else SharedSimpleBias, axis)
    _become(layer, CutAttention, axis)
    # The stream's channels travel while the average is computed, the average's while values are.
    layer.ema_gate.register_forward_pre_hook(lambda module, args: layer.v_proj.expect(args[0]))
    layer.ema_dropout.register_forward_hook(lambda module, args, output: gathering.expect(output))


def _cut_embeddings(embeddings: MegaEmbeddings, axis: Axis) -> None:
    words = embeddings.word_embeddings
    embeddings.word_embeddings = on_meta(
        CutVocabularyEmbedding, words.num_embeddings, words.embedding_dim, words.padding_idx, axis
    )
    if embeddings.token_type_embeddings is not None:
        types = embeddings.token_type_embeddings
        types.embedding_dim //= axis.size
        types.weight = nn.Parameter(types.weight.detach()[:, : types.embedding_dim].contiguous())
        _become(types, CutTokenTypes, axis)


def _gather_linear(linear: nn.Linear, axis: Axis) -> GatherLinear:
    return on_meta(GatherLinear, linear.in_features, linear.out_features, axis, linear.bias is not None)


def _cut_head(head: Any, axis: Axis) -> CutLanguageModelHead:
    return on_meta(CutLanguageModelHead, head.in_features, head.out_features, axis, head.bias is not None)


def _scatter_linear(linear: nn.Linear, axis: Axis) -> ScatterLinear:
    return on_meta(ScatterLinear, linear.in_features, linear.out_features, axis)


def _cut_rows(module: nn.Module, axis: Axis) -> None:
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            setattr(module, name, nn.Parameter(parameter.detach()[: parameter.shape[0] // axis.size]))


def _become(module: nn.Module, kind: type[TensorParallel], axis: Axis) -> None:
    """Give a module the class that reads its parameters as parts; its state stays."""
    module.__class__ = kind
    module.axis = axis  # type: ignore[assignment]
