"""The native DeepSpeed configuration: our settings in DeepSpeed's words, with a user's keys merged over them."""

from typing import Any

from mega_scale.parallel.mesh import MeshShape

# Keys of DeepSpeed that say what another setting of ours says, and that setting. Two answers to one question would be
# settled by DeepSpeed without a word.
OWNERS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size and train.micro_batch_size",
    "elasticity": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "gradient_allreduce_op": "train.global_batch_size (losses are sums over tokens divided by their number)",
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
    "zero_optimization.stage": "parallel.zero_stage",
    "bf16.enabled": "train.dtype",
    "fp16.enabled": "train.dtype",
    "torch_autocast.enabled": "train.dtype",
    "torch_autocast.dtype": "train.dtype",
    "data_types.param_dtype": "train.dtype",
    "data_parallel_size": "parallel.dp_shard",
    "sequence_parallel_size": "parallel.sp",
    "tensor_parallel": "parallel.tp",
    "zero_optimization.mics_shard_size": "parallel.dp_shard and parallel.dp_replicate",
    "zero_optimization.mics_hierarchical_params_gather": "parallel.dp_shard and parallel.dp_replicate",
    "zero_optimization.zero_hpz_partition_size": "parallel.dp_shard and parallel.dp_replicate",
}

# Keys of zero_optimization that move gradients or weights away from the device.
_OFFLOADS = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param")


def native_config(
    user: dict[str, Any],
    *,
    zero_stage: int,
    dtype: str,
    micro_batch_size: int,
    accumulation: int,
    max_grad_norm: float,
    world_size: int,
) -> dict[str, Any]:
    """Build the dictionary that DeepSpeed is started with.

    Args:
        user: native keys of `parallel.ds_config`, merged over ours.
        zero_stage: 0 to 3.
        dtype: fp32 or bf16.
        micro_batch_size: sequences in one forward pass of one rank.
        accumulation: forward passes in one optimizer step.
        max_grad_norm: norm to which gradients are clipped, 0 for not at all.
        world_size: ranks of the run.

    Returns:
        A configuration in DeepSpeed's own keys.

    Raises:
        ValueError: a key of `user` contradicts a setting of ours.
    """
    ours: dict[str, Any] = {
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # Stage 0 has no norm to report after clipping, so the engine clips there itself.
        "gradient_clipping": max_grad_norm if zero_stage > 0 else 0.0,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # bf16 by autocast: DeepSpeed's own bf16 mode rounds every parameter, those of the EMA included. Without modules
        # listed here, weights are gathered and gradients are reduced in fp32.
        "torch_autocast": {"enabled": dtype == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    return _merge(ours, user, "")


def check_mesh(native: dict[str, Any], mesh: MeshShape) -> None:
    """Refuse native keys with which DeepSpeed cannot train on a mesh.

    Args:
        native: a configuration of `native_config`.
        mesh: the ranks of the run.

    Raises:
        ValueError: names the keys, their values and a remedy.
    """
    zero = native["zero_optimization"]
    copies = f"parallel.dp_replicate={mesh.dp_replicate}"
    if mesh.dp_replicate > 1 and zero["stage"] < 3:
        raise ValueError(
            f"{copies} with parallel.engine=deepspeed makes copies of a sharded model, but parallel.zero_stage="
            f"{zero['stage']} does not shard its weights: use parallel.zero_stage=3, or parallel.engine=fsdp"
        )
    for key in _OFFLOADS:
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
            raise ValueError(
                f"parallel.ds_config.zero_optimization.{key}.device='nvme' keeps state out of memory, from which "
                "checkpoints are written: use 'cpu'"
            )
        if mesh.dp_replicate > 1 and _offloads(zero.get(key)):
            raise ValueError(
                f"{copies} sums gradients between copies on the device, which "
                f"parallel.ds_config.zero_optimization.{key}={zero[key]!r} takes them away from: remove that key, or "
                "use parallel.dp_replicate=1, or parallel.engine=fsdp without ds_config"
            )
    if zero.get("zero_quantized_gradients") and mesh.fsdp != mesh.size:
        raise ValueError(
            "parallel.ds_config.zero_optimization.zero_quantized_gradients=true reduces gradients over all "
            f"{mesh.size} ranks, but {copies} and parallel.tp={mesh.tp} leave {mesh.fsdp} to a shard: remove that key, "
            "or use parallel.dp_replicate=1 and parallel.tp=1"
        )


def _offloads(value: Any) -> bool:
    return value.get("device", "none") != "none" if isinstance(value, dict) else bool(value)


def _merge(ours: dict[str, Any], user: dict[str, Any], prefix: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in user.items():
        path = prefix + key
        if path in OWNERS and (key not in ours or ours[key] != value):
            raise ValueError(
                f"parallel.ds_config.{path}={value!r} contradicts {OWNERS[path]}: set it there and remove it here"
            )
        inner = ours.get(key, {} if isinstance(value, dict) else None)
        if isinstance(inner, dict) != isinstance(value, dict):
            expected = "a section of keys" if isinstance(inner, dict) else "a single value"
            raise ValueError(f"parallel.ds_config.{path}={value!r}: DeepSpeed expects {expected} there")
        if isinstance(inner, dict):
            merged[key] = _merge(inner, value, path + ".")
        else:
            merged[key] = value
    return merged
