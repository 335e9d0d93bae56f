"""How a model on one meta device becomes a model on all ranks: the order, stated once."""

import torch
from torch import nn

from mega_scale.model import MegaPreTrainedModel
from mega_scale.model.layers import MegaLinear
from mega_scale.model.losses import LanguageModelHead
from mega_scale.ops.elementwise import compile_gates
from mega_scale.parallel.activation_checkpoint import checkpoint_activations
from mega_scale.parallel.config import ActivationCheckpointing, EngineConfig
from mega_scale.parallel.deepspeed import DeepSpeedEngine
from mega_scale.parallel.dropout import make_dropout_positional
from mega_scale.parallel.engine import BuildOptimizer, Engine, ModelParallelism
from mega_scale.parallel.fsdp import FsdpEngine
from mega_scale.parallel.mesh import check_segments, check_sequence_parallel
from mega_scale.parallel.sequence_parallel import ReceivedStates, RowSlice, StateExchange, apply_sequence_parallelism
from mega_scale.parallel.shard import Values, on_meta, replace_modules
from mega_scale.parallel.tensor_parallel import apply_tensor_parallelism, separate_segments
from mega_scale.parallel.world import Axis, World


class ParallelizeError(ValueError):
    """Settings contradict each other, or model or values do not fit the mesh or the engine, perhaps on one rank."""


def parallelize(
    model: MegaPreTrainedModel, values: Values, config: EngineConfig, world: World, build_optimizer: BuildOptimizer
) -> Engine:
    """Put a model on all ranks: apply model parallelism, then shard, materialise, and build the optimizer.

    Args:
        model: `MegaForCausalLM` on the meta device, changed in place.
        values: full values of its parameters and persistent buffers, such as `seeded_values(model.config, seed)`.
        config: engine, number format, batches.
        world: ranks and device.
        build_optimizer: makes AdamW over the sharded model.

    Returns:
        The engine that trains the model.

    Raises:
        ParallelizeError: the settings contradict each other, or model or values do not fit the mesh or the engine.
    """
    try:
        config.validate(world.size)
        parallelism = apply_model_parallelism(
            model,
            sp=world.axis("sp"),
            tp=world.axis("tp"),
            checkpointing=config.parallel.checkpointing,
            seed=config.seed,
            compile=config.compile,
        )
        kind = FsdpEngine if config.parallel.engine == "fsdp" else DeepSpeedEngine
        return kind(model, values, parallelism, config, world, build_optimizer)
    except ValueError as error:
        raise ParallelizeError(str(error)) from error


def apply_model_parallelism(
    model: MegaPreTrainedModel,
    *,
    sp: Axis,
    tp: Axis,
    checkpointing: ActivationCheckpointing,
    seed: int,
    compile: bool = False,
) -> ModelParallelism:
    """Share rows over `sp` and channels over `tp`, make dropout independent of both, and checkpoint activations.

    Args:
        model: on the meta device, changed in place.
        sp: the ranks that share a row.
        tp: the ranks that share every layer.
        checkpointing: which blocks are recomputed, and how.
        seed: of dropout.
        compile: whether elementwise arithmetic between matrix products is compiled.

    Raises:
        ValueError: the model does not fit the mesh.
    """
    with torch.device("meta"):
        template = type(model)(model.config)
    config = model.config
    check_segments(config, checkpointing.segment, checkpointing.every, sp.size)
    check_sequence_parallel(config, sp.size * max(config.chunk_size, 1), sp.size)
    row_slice = RowSlice(sp.rank, sp.size, config.chunk_size if config.use_chunking else 1)
    received = ReceivedStates()
    separate_segments(model)
    _keep_products_fast(model)
    make_dropout_positional(model, seed, row_slice, tp)
    apply_sequence_parallelism(model, config, row_slice, StateExchange(sp, received))
    if tp.size > 1:
        apply_tensor_parallelism(model, tp)
    checkpoint_activations(model, checkpointing, received, row_slice)
    if compile:
        compile_gates(model)
    return ModelParallelism(template, row_slice, tp)


def _keep_products_fast(model: MegaPreTrainedModel) -> None:
    """Whatever hooks engines put on linear layers."""
    head = model.get_output_embeddings()

    def build(name: str, layer: nn.Module) -> nn.Module | None:
        if type(layer) is not nn.Linear:
            return None
        kind = LanguageModelHead if layer is head else MegaLinear
        new: nn.Linear = on_meta(kind, layer.in_features, layer.out_features, layer.bias is not None)
        new.weight, new.bias = layer.weight, layer.bias  # ties stay
        return new

    replace_modules(model, build)
