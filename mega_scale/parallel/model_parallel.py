"""How a model on one meta device becomes a model on all ranks: the order, stated once.

Dropout of a parallel model depends on the position in the global batch only, so that every layout drops the same.

Legend: B rows, L tokens of this rank, D channels of this rank, K chunks, I queries, J keys.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mega_scale.model import MegaPreTrainedModel
from mega_scale.model.attention import MegaMovingAverageGatedAttention
from mega_scale.model.layers import MegaAttentionDropout, MegaDropout, MegaLinear, MegaMultiDimensionDampedEma
from mega_scale.model.modeling_mega import LanguageModelHead
from mega_scale.ops.elementwise import compile_gates, positional_dropout
from mega_scale.parallel.activation_checkpoint import checkpoint_activations
from mega_scale.parallel.config import ActivationCheckpointing, EngineConfig
from mega_scale.parallel.deepspeed import DeepSpeedEngine
from mega_scale.parallel.engine import BuildOptimizer, Engine, FsdpEngine, ModelParallelism
from mega_scale.parallel.mesh import check_segments, check_sequence_parallel
from mega_scale.parallel.sequence_parallel import ReceivedStates, SequenceParallelEma, StateExchange
from mega_scale.parallel.shard import RowSlice, SegmentedAttention, Values, on_meta, replace_modules
from mega_scale.parallel.tensor_parallel import apply_tensor_parallelism
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

    Changes a model on the meta device in place; raises ValueError where it does not fit the mesh.
    """
    config = model.config
    template: MegaPreTrainedModel = on_meta(type(model), config)
    check_segments(config, checkpointing.segment, checkpointing.every, sp.size)
    check_sequence_parallel(config, sp.size * max(config.chunk_size, 1), sp.size)
    row_slice = RowSlice(sp.rank, sp.size, config.chunk_size if config.use_chunking else 1)
    received = ReceivedStates()
    exchange, head = StateExchange(sp, received), model.get_output_embeddings()

    def separate_segments(name: str, module: nn.Module) -> nn.Module | None:
        # Whatever T is: checkpoints then bear the same names.
        return on_meta(SegmentedAttention, config) if type(module) is MegaMovingAverageGatedAttention else None

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) is nn.Linear:
            # Products stay fast, whatever hooks engines put on linear layers.
            kind = LanguageModelHead if module is head else MegaLinear
            new: nn.Linear = on_meta(kind, module.in_features, module.out_features, module.bias is not None)
            new.weight, new.bias = module.weight, module.bias  # ties stay
            return new
        if isinstance(module, MegaDropout | MegaAttentionDropout) and module.p > 0:
            drop = partial(_drop, f"{seed}:{{step}}:{name}", row_slice, tp)
            kinds = PositionalDropout, PositionalAttentionDropout
            return kinds[0](module, drop) if isinstance(module, MegaDropout) else kinds[1](module, drop)
        if type(module) is MegaMultiDimensionDampedEma and sp.size * tp.size > 1:
            return on_meta(SequenceParallelEma, config, row_slice, exchange)
        return None

    replace_modules(model, separate_segments)
    replace_modules(model, replace)
    if tp.size > 1:
        apply_tensor_parallelism(model, tp)
    checkpoint_activations(model, checkpointing, received, row_slice)
    if compile:
        compile_gates(model)
    return ModelParallelism(template, row_slice, tp)


def _drop(key: str, row_slice: RowSlice, tp: Axis, x: Tensor, p: float, featurewise: bool, sharded: bool) -> Tensor:
    """Drop elements of x (B, L, D) by position; featurewise: one draw a feature of a row; sharded: D is a part."""
    place = row_slice.place
    digest = hashlib.blake2b(key.format(step=place.step).encode(), digest_size=4).digest()

    def count(first: int, number: int) -> Tensor:
        return torch.arange(first, first + number, device=x.device)

    rows = count(place.first_row, x.shape[0])
    positions = count(0, 1) if featurewise else count(row_slice.first_token, x.shape[1])
    columns = count(tp.rank * x.shape[2] if sharded else 0, x.shape[2])
    return positional_dropout(x, p, int.from_bytes(digest, "little"), rows, positions, columns)


class PositionalDropout(MegaDropout):
    """`MegaDropout` by position."""

    def __init__(self, whole: MegaDropout, drop: Callable[..., Tensor]) -> None:
        super().__init__(whole.p, whole.featurewise)
        self._drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D)."""
        return self._drop(x, self.p, self.featurewise, sharded=True) if self.training else x


class PositionalAttentionDropout(MegaAttentionDropout):
    """`MegaAttentionDropout` by position; fused attention cannot do it, so weights are then computed one by one."""

    def __init__(self, whole: MegaAttentionDropout, drop: Callable[..., Tensor]) -> None:
        super().__init__(whole.p)
        self._drop = drop

    def rule(self) -> float | Callable[[Tensor], Tensor]:
        """A function of weights (B, K, I, J), or 0."""
        if not self.training:
            return 0.0
        return lambda weights: self._drop(weights.flatten(1, 2), self.p, False, sharded=False).view_as(weights)
