"""How a model on one meta device becomes a model on all ranks: the order, stated once."""

from mega_scale.model import MegaPreTrainedModel
from mega_scale.parallel.config import ParallelConfig
from mega_scale.parallel.deepspeed_config import native_config
from mega_scale.parallel.deepspeed_engine import DeepSpeedEngine
from mega_scale.parallel.engine import BuildOptimizer, Engine
from mega_scale.parallel.fsdp import FsdpEngine
from mega_scale.parallel.materialize import Values
from mega_scale.parallel.spread import spread
from mega_scale.parallel.world import World


def parallelize(
    model: MegaPreTrainedModel,
    values: Values,
    config: ParallelConfig,
    *,
    dtype: str,
    micro_batch_size: int,
    accumulation: int,
    max_grad_norm: float,
    build_optimizer: BuildOptimizer,
    world: World,
    seed: int = 0,
    compile_gates: bool = False,
) -> Engine:
    """Spread a model over the ranks: cut channels and rows, then shard, materialise, and build the optimizer.

    Args:
        model: `MegaForCausalLM` on the meta device, changed in place.
        values: full values of its parameters and persistent buffers, such as `seeded_values(model.config, seed)`.
        config: engine, stage, activation checkpointing.
        dtype: fp32 or bf16, of forward and backward.
        micro_batch_size: sequences in one forward pass of one rank.
        accumulation: forward passes in one optimizer step.
        max_grad_norm: norm to which gradients are clipped, 0 for not at all.
        build_optimizer: makes AdamW over the sharded model.
        world: ranks and device.
        seed: of dropout.
        compile_gates: whether the arithmetic between matrix products is compiled.

    Returns:
        The engine that trains the model.

    Raises:
        ValueError: the model or its values cannot be spread like this.
    """
    parts = spread(
        model,
        sp=world.axis("sp"),
        tp=world.axis("tp"),
        recomputation=config.recomputation,
        seed=seed,
        compile_gates=compile_gates,
    )
    if config.engine == "fsdp":
        return FsdpEngine(
            model,
            values,
            parts,
            stage=config.zero_stage,
            dtype=dtype,
            max_grad_norm=max_grad_norm,
            build_optimizer=build_optimizer,
            world=world,
        )
    native = native_config(
        config.ds_config,
        zero_stage=config.zero_stage,
        dtype=dtype,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        max_grad_norm=max_grad_norm,
        world_size=world.shape.fsdp,
    )
    return DeepSpeedEngine(
        model,
        values,
        parts,
        native=native,
        dtype=dtype,
        max_grad_norm=max_grad_norm,
        build_optimizer=build_optimizer,
        world=world,
    )
