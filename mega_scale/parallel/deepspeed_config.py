"""The native DeepSpeed configuration: our settings in DeepSpeed's words, with a user's keys merged over them."""

import copy
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from typing import Any

from mega_scale.files import local_path
from mega_scale.parallel.mesh import MeshShape

# Keys of DeepSpeed, or sections of them, that say what another setting of ours says, and that setting. Two answers to
# one question would be settled by DeepSpeed without a word.
_OWNED = {
    "train.global_batch_size": "train_batch_size",
    "train.micro_batch_size": "train_micro_batch_size_per_gpu",
    "train.global_batch_size and train.micro_batch_size": """gradient_accumulation_steps managed_gradient_accumulation
        elasticity""",
    "optimizer.max_grad_norm": "gradient_clipping zero_optimization.compute_grad_norm",
    "train.global_batch_size (losses are sums over tokens divided by their number)": """gradient_allreduce_op
        gradient_predivide_factor prescale_gradients""",
    "the optimizer section": "optimizer zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
    "the schedule section": "scheduler",
    "train.dtype": "bf16 bfloat16 fp16 amp torch_autocast data_types",
    "train.dtype (gradients are reduced in fp32)": "communication_data_type seq_parallel_communication_data_type",
    "parallel.dp_shard": "data_parallel_size",
    "parallel.sp": "sequence_parallel_size",
    "parallel.tp": "tensor_parallel",
    "model.vocab_size": "vocabulary_size",
    "parallel.activation_checkpoint": "activation_checkpointing",
    "train.compile": "compile",
    "the checkpoint section": """checkpoint nebula datastates zero_optimization.load_from_fp32_weights
        zero_optimization.elastic_checkpoint zero_optimization.pipeline_loading_checkpoint
        zero_optimization.gather_16bit_weights_on_model_save
        zero_optimization.stage3_gather_16bit_weights_on_model_save
        zero_optimization.stage3_gather_fp16_weights_on_model_save""",
    "the data section": "dataloader_drop_last data_efficiency",
    "data.length_schedule": "curriculum_learning",
    "parallel.zero_stage": "zero_optimization.stage",
    "parallel.dp_shard and parallel.dp_replicate": """zero_optimization.mics_shard_size
        zero_optimization.mics_hierarchical_params_gather zero_optimization.zero_hpz_partition_size""",
}
OWNERS = {key: owner for owner, keys in _OWNED.items() for key in keys.split()}

# What is computed stays, and where it lies is compared with one process: tests/distributed/test_native_keys.py.
_ZERO = {
    bool: """contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm
        round_robin_gradients parameter_alignment ignore_unused_parameters stage3_use_all_reduce_for_fetch_params
        stage3_allgather_sequential memory_efficient_linear override_module_apply log_trace_cache_warnings
        enable_sanity_checks cpu_offload cpu_offload_param cpu_offload_use_pin_memory
        offload_optimizer.pin_memory offload_param.pin_memory
        zero_quantized_gradients""",  # the last is refused in words of its own
    int: """reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size
        stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
        stage3_max_reuse_distance offload_optimizer.buffer_count offload_param.buffer_count""",
    str: "offload_optimizer.device offload_optimizer.nvme_path offload_param.device offload_param.nvme_path",
}
_REPORTS = {
    bool: """wall_clock_breakdown memory_breakdown dump_state timers.throughput.enabled timers.throughput.synchronized
        flops_profiler.enabled flops_profiler.detailed comms_logger.enabled comms_logger.prof_all comms_logger.verbose
        comms_logger.debug tensorboard.enabled csv_monitor.enabled wandb.enabled""",
    int: "steps_per_print flops_profiler.profile_step flops_profiler.module_depth flops_profiler.top_modules",
    float: "flops_profiler.recompute_fwd_factor",
    str: """flops_profiler.output_file tensorboard.output_path tensorboard.job_name csv_monitor.output_path
        csv_monitor.job_name wandb.group wandb.team wandb.project""",
    list: "comms_logger.prof_ops",
}
KEYS: dict[str, type] = {key: kind for kind, keys in _REPORTS.items() for key in keys.split()} | {
    f"zero_optimization.{key}": kind for kind, keys in _ZERO.items() for key in keys.split()
}
"""Native keys that are passed on to DeepSpeed, with the type of their values; every other one is refused."""

_SECTIONS = {path[:end] for path in KEYS for end, letter in enumerate(path) if letter == "."}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list of texts"}
_FROM_ONE = ("steps_per_print", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "buffer_count")
_PATHS = ("nvme_path", "output_path", "output_file")
_MAY_BE_NEGATIVE = ("flops_profiler.module_depth",)
# Further names under which DeepSpeed reads a key.
_ALIASES = {key.replace("stage3_", ""): key for key in KEYS if "stage3_" in key}
_SUPERSEDED = {
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
}
# Keys of DeepSpeed that no setting of ours stands for, by the reason why they are not passed on.
_REFUSED = {
    "it changes what is computed": """zero_optimization.zero_quantized_weights
        zero_optimization.zero_quantized_nontrainable_weights zero_optimization.zeropp_loco_param weight_quantization
        quantize_training compression_training eigenvalue sparse_attention sparse_gradients progressive_layer_drop""",
    "weights and moments would lie where checkpoints do not look for them": """zero_optimization.zenflow
        zero_optimization.legacy_stage1 zero_optimization.save_muon_momentum_buffer_in_memory
        zero_optimization.offload_optimizer.ratio zero_optimization.offload_optimizer.super_offload
        zero_optimization.offload_optimizer.cpuadam_cores_perc""",
    "DeepSpeed fails with it in this model's first step": """zero_optimization.stage3_module_granularity_threshold
        zero_optimization.module_granularity_threshold zero_optimization.leaf_module""",
    "this trainer does not use it": """pipeline hybrid_engine expert_parallel use_data_before_expert_parallelism
        autotuning graph_harvesting aio comet disable_allgather disable_python_gc log_level""",
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
    """Build the dictionary that DeepSpeed is started with, in its own keys.

    Args:
        user: native keys of `parallel.ds_config`, merged over ours.
        zero_stage: 0 to 3; the others are as in `EngineConfig`.
        world_size: ranks over which parameters are partitioned.

    Raises:
        ValueError: a key of `user` contradicts a setting of ours, is none of `KEYS`, or has a value of another type;
            names the key, its value and a remedy.
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
    return _merge(ours, user)


def check_mesh(native: dict[str, Any], mesh: MeshShape) -> None:
    """Refuse native keys of a `native_config` with which DeepSpeed cannot train on a mesh.

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
        if _offloads(zero.get(key)) and zero["stage"] < (3 if "param" in key else 1):
            raise ValueError(
                f"parallel.ds_config.zero_optimization.{key}={zero[key]!r} moves what parallel.zero_stage="
                f"{zero['stage']} does not split: remove that key, or use parallel.zero_stage=3"
            )
        if mesh.dp_replicate > 1 and _offloads(zero.get(key)):
            raise ValueError(
                f"{copies} sums gradients between copies on the device, which "
                f"parallel.ds_config.zero_optimization.{key}={zero[key]!r} takes them away from: remove that key, or "
                "use parallel.dp_replicate=1, or parallel.engine=fsdp without ds_config"
            )
    if zero.get("zero_quantized_gradients"):
        raise ValueError(
            "parallel.ds_config.zero_optimization.zero_quantized_gradients=true rounds gradients to 4 bits and reduces "
            f"them over all ranks, whatever {copies} and parallel.tp={mesh.tp}: remove that key"
        )


def _offloads(value: Any) -> bool:
    return value.get("device", "none") != "none" if isinstance(value, dict) else bool(value)


def _leaves(user: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values; a section without keys is a value."""
    for key, value in user.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _within(path: str, paths: Iterable[str]) -> str | None:
    """The one of some paths that a path is, or lies in."""
    return next((outer for outer in paths if path == outer or path.startswith(f"{outer}.")), None)


def _merge(ours: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
    own, given = dict(_leaves(ours)), dict[str, Any]()
    for written, value in _leaves(user):
        if written in given:
            raise ValueError(f"parallel.ds_config.{written}={value!r} is given twice, nested and with dots: keep one")
        given[written] = value
    merged = copy.deepcopy(ours)
    for written, value in given.items():
        name, path = f"parallel.ds_config.{written}", _ALIASES.get(written, written)
        if owner := _within(path, OWNERS):
            if path not in own or own[path] != value or isinstance(own[path], bool) != isinstance(value, bool):
                raise ValueError(f"{name}={value!r} contradicts {OWNERS[owner]}: set it there and remove it here")
            continue
        _refuse_unknown(name, path, value)
        if path in _SECTIONS or value is None or (value == "auto" and path.startswith("zero_optimization.")):
            continue  # as if it was not there
        twin = _SUPERSEDED.get(path, path)
        if twin != written and any(_within(other, [twin]) for other in given):
            raise ValueError(f"{name}={value!r} is an older name of parallel.ds_config.{twin}: remove one of the two")
        place = merged
        *sections, last = path.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = _typed(name, path, value)
    return merged


def _refuse_unknown(name: str, path: str, value: Any) -> None:
    for why, keys in _REFUSED.items():
        if _within(path, keys.split()):
            raise ValueError(f"{name}={value!r} is not passed on to DeepSpeed: {why}; remove it")
    if path in _SECTIONS:
        off = value in ({}, None) or (value is False and path.startswith("zero_optimization.offload_"))
        if not off:
            raise ValueError(f"{name}={value!r}: DeepSpeed expects a section of keys there")
    elif path not in KEYS:
        if outer := _within(path, KEYS):
            raise ValueError(f"{name}={value!r}: DeepSpeed expects a single value as {outer}")
        known = [*KEYS, *_ALIASES, *_SECTIONS]
        nearest = max(known, key=lambda key: SequenceMatcher(None, path, key).ratio())
        near = f"parallel.ds_config.{nearest}"
        raise ValueError(f"{name}={value!r} is no key that is passed on to DeepSpeed: the nearest one is {near}")


def _typed(name: str, path: str, value: Any) -> Any:
    kind, key = KEYS[path], path.rpartition(".")[2]
    expected = _WORDS[kind]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # as in 5e8
    fits = type(value) is kind or (kind is float and type(value) is int)
    if kind is int and path not in _MAY_BE_NEGATIVE:
        least = int(key in _FROM_ONE)
        expected += f" of at least {least}"
        fits = fits and value >= least
    elif key == "device":
        expected, fits = "none or cpu", value in ("none", "cpu", "nvme")  # of nvme, `check_mesh` says more
    if not fits:
        raise ValueError(f"{name}={value!r} is not allowed: expected {expected}")
    return local_path(value, name) if key in _PATHS else value
