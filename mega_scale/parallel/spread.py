"""How a model on the meta device becomes this rank's part of it, before an engine shards what is left."""

from typing import NamedTuple

import torch
from torch import nn

from mega_scale.model import MegaPreTrainedModel
from mega_scale.model.layers import MegaLinear
from mega_scale.model.losses import LanguageModelHead
from mega_scale.ops.gates import compiled
from mega_scale.parallel.activation_checkpoint import Recomputation, checkpoint_activations
from mega_scale.parallel.collectives import Axis
from mega_scale.parallel.dropout import drop_by_place
from mega_scale.parallel.model_checks import check_segments, check_sequence_parallel
from mega_scale.parallel.sequence import Kept, StateExchange, share_rows
from mega_scale.parallel.tensor import cut_channels, separate_segments
from mega_scale.parallel.window import Window


class Spread(NamedTuple):
    """What engines need to know of a model that was spread.

    Args:
        template: the model as it was, on the meta device.
        window: tells it which part of the global batch it computes.
        tp: the ranks that share every layer.
    """

    template: nn.Module
    window: Window
    tp: Axis


def spread(
    model: MegaPreTrainedModel,
    *,
    sp: Axis,
    tp: Axis,
    recomputation: Recomputation,
    seed: int,
    compile_gates: bool = False,
) -> Spread:
    """Cut channels over `tp` and rows over `sp`, make dropout independent of both, and checkpoint activations.

    Args:
        model: on the meta device, changed in place.
        sp: the ranks that share a row.
        tp: the ranks that share every layer.
        recomputation: which blocks are recomputed, and how.
        seed: of dropout.
        compile_gates: whether the arithmetic between matrix products is compiled.

    Returns:
        What was done.

    Raises:
        ValueError: the model cannot be spread like this.
    """
    with torch.device("meta"):
        template = type(model)(model.config)
    config = model.config
    check_segments(config, recomputation.segment, recomputation.every, sp.size)
    check_sequence_parallel(config, sp.size * max(config.chunk_size, 1), sp.size)
    window, kept = Window(sp.rank, sp.size, config.chunk_size if config.use_chunking else 1), Kept()
    _keep_products_fast(model)
    separate_segments(model)
    share_rows(model, window, StateExchange(sp, kept))
    if tp.size > 1:
        cut_channels(model, tp)
    drop_by_place(model, seed, window, tp)
    checkpoint_activations(model, recomputation, kept, window)
    if compile_gates:
        for module in model.modules():
            if hasattr(module, "gates"):
                vars(module)["gates"] = compiled()
    return Spread(template, window, tp)


def _keep_products_fast(model: MegaPreTrainedModel) -> None:
    """Whatever hooks engines put on linear layers."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = LanguageModelHead if module is head else MegaLinear
