"""Options of accelerate launch that are about training: they arrive as variables, and are held against the run."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from mega_scale.parallel.config import ParallelConfig
from mega_scale.parallel.mesh import MeshShape

_UNSAID = ("", "none", "auto")


class _Option(NamedTuple):
    """One of accelerate's options.

    Args:
        variable: by which it arrives.
        name: on accelerate's command line, and without dashes in its configuration file.
        fits: values that agree with the run, or that it has when nobody sets it.
        ours: our key for it, with its value.
    """

    variable: str
    name: str
    fits: tuple[Any, ...]
    ours: str


def check_accelerate(
    parallel: ParallelConfig, world_size: int, *, dtype: str, compiled: bool, accumulation: int, max_grad_norm: float
) -> None:
    """Refuse a run that does something else than accelerate launch, or its configuration file, was told.

    Args:
        parallel: how the run is spread.
        world_size: ranks of the run.
        dtype: fp32 or bf16, the number format of forward and backward.
        compiled: whether `train.compile` is set.
        accumulation: forward passes in one optimizer step.
        max_grad_norm: norm to which gradients are clipped, 0 for not at all.

    Raises:
        ValueError: names the variable, the option, our key and its value.
    """
    cpu = parallel.device == "cpu" or not torch.cuda.is_available()
    options = [
        _Option("ACCELERATE_USE_CPU", "--cpu", ("false", str(cpu)), f"parallel.device={parallel.device}"),
        _Option("ACCELERATE_MIXED_PRECISION", "--mixed_precision", ("no", dtype), f"train.dtype={dtype}"),
        _Option(
            "ACCELERATE_DYNAMO_BACKEND", "--dynamo_backend", ("no", "inductor" if compiled else "no"),
            f"train.compile={compiled}",
        ),
        _Option("ACCELERATE_USE_MEGATRON_LM", "--use_megatron_lm", ("false",), _engine(parallel)),
        _Option(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "--gradient_accumulation_steps", (accumulation,),
            f"train.global_batch_size and train.micro_batch_size, which make {accumulation}",
        ),
        _Option(
            "ACCELERATE_GRADIENT_CLIPPING", "--gradient_clipping", (max_grad_norm,),
            f"optimizer.max_grad_norm={max_grad_norm:g}",
        ),
        *_deepspeed(parallel),
        *(_fsdp(parallel) if _is_set("ACCELERATE_USE_FSDP") else ()),
        *(_mesh(parallel.mesh(world_size)) if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG") else ()),
    ]  # fmt: skip
    for variable, name, fits, ours in options:
        value = os.environ.get(variable, "").strip().lower()
        if value not in _UNSAID and not any(_same(value, good) for good in fits):
            raise ValueError(
                f"accelerate launch {name} ({variable}={value}) contradicts {ours}: say there what you want, and take "
                f"{name} out of accelerate's command, or {name.lstrip('-')} out of its configuration file"
            )


def _deepspeed(parallel: ParallelConfig) -> Iterator[_Option]:
    ours = str(parallel.engine == "deepspeed")
    yield _Option("ACCELERATE_USE_DEEPSPEED", "--use_deepspeed", ("false", ours), _engine(parallel))
    file = "parallel.ds_config, where its keys belong"
    yield _Option("ACCELERATE_DEEPSPEED_CONFIG_FILE", "--deepspeed_config_file", (), file)
    stage = parallel.zero_stage
    yield _Option("ACCELERATE_DEEPSPEED_ZERO_STAGE", "--zero_stage", (stage,), f"parallel.zero_stage={stage}")
    zero = parallel.ds_config.get("zero_optimization")
    for what in ("optimizer", "param"):
        section = zero.get(f"offload_{what}") if isinstance(zero, dict) else None
        device = section.get("device", "none") if isinstance(section, dict) else "none"
        yield _Option(
            f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", f"--offload_{what}_device", (str(device),),
            f"parallel.ds_config.zero_optimization.offload_{what}.device={device}",
        )  # fmt: skip


def _fsdp(parallel: ParallelConfig) -> Iterator[_Option]:
    """FULL_SHARD, false and the like are accelerate's own defaults, so they may not be what anybody said."""
    stage, copies, every = parallel.zero_stage, parallel.dp_replicate, parallel.activation_checkpoint
    yield _Option("ACCELERATE_USE_FSDP", "--use_fsdp", (str(parallel.engine == "fsdp"),), _engine(parallel))
    hybrid = ("hybrid_shard", "4") if copies > 1 else ()
    strategies = ("full_shard", "1", *(("shard_grad_op", "2") if stage < 3 else ()), *hybrid)
    layout = f"parallel.zero_stage={stage} with parallel.dp_replicate={copies}"
    yield _Option("FSDP_SHARDING_STRATEGY", "--fsdp_sharding_strategy", strategies, layout)
    again = ("true", *strategies, *(("false",) if stage < 3 else ()))
    yield _Option("FSDP_RESHARD_AFTER_FORWARD", "--fsdp_reshard_after_forward", again, f"parallel.zero_stage={stage}")
    yield _Option("FSDP_OFFLOAD_PARAMS", "--fsdp_offload_params", ("false",), _engine(parallel))
    recompute = f"parallel.activation_checkpoint={every}"
    name = "--fsdp_activation_checkpointing"
    yield _Option("FSDP_ACTIVATION_CHECKPOINTING", name, ("false", str(every > 0)), recompute)
    yield _Option("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", f"{name}_offload", ("false",), recompute)
    yield _Option("FSDP_IGNORED_MODULES", "--fsdp_ignored_modules", (), f"{_engine(parallel)}, which shards all")


def _mesh(mesh: MeshShape) -> Iterator[_Option]:
    for axis in ("dp_replicate", "dp_shard", "tp", "sp"):
        ranks = getattr(mesh, axis)
        name = f"--parallelism_config_{axis}_size"
        yield _Option(f"PARALLELISM_CONFIG_{axis.upper()}_SIZE", name, (ranks,), f"parallel.{axis}={ranks}")
    ours = f"parallel.sp={mesh.sp}, which shares sequences here"
    yield _Option("PARALLELISM_CONFIG_CP_SIZE", "--parallelism_config_cp_size", (1,), ours)


def _engine(parallel: ParallelConfig) -> str:
    return f"parallel.engine={parallel.engine}"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "on")


def _same(said: str, ours: Any) -> bool:
    if isinstance(ours, str):
        return said == ours.lower()
    try:
        return float(said) == float(ours)
    except ValueError:
        return False
