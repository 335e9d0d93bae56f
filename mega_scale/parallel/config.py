"""Settings of how a run is laid out on processes, and what an engine has to know of its run.

DeepSpeed's native keys are merged over ours, and what accelerate launch was told about training is held against them.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import gcd
from typing import Any, Literal

import torch
from torch import cuda

from mega_scale.files import local_path
from mega_scale.ops import device_kind
from mega_scale.parallel.mesh import MeshShape
from mega_scale.settings import require, require_ranges

_FP8_CAPABILITY = (8, 9)  # of GPUs that multiply numbers of 8 bits


@dataclass
class ParallelConfig:
    """Which engine shards the model, how far, and on what device."""

    engine: Literal["auto", "fsdp", "deepspeed"] = "auto"
    """What shards and steps the model: fsdp (PyTorch fully_shard) or deepspeed (ZeRO); auto takes deepspeed where it is
    installed (no unit)."""

    zero_stage: int = 3
    """Split over ranks: 1 optimizer state, 2 also gradients, 3 also weights; 0, deepspeed only, nothing (stage)."""

    dp_replicate: int = 1
    """Copies of the sharded model; gradients are summed between them (ranks)."""

    dp_shard: int = -1
    """Ranks that read different rows, parameters sharded over them; -1: what other dimensions leave (ranks)."""

    sp: int = 1
    """Sequence parallelism: ranks that share one sequence in whole chunks and pass only EMA and norm states (ranks)."""

    tp: int = 1
    """Tensor parallelism: ranks of one host that share the channels of every layer (ranks)."""

    tp_overlap: bool | None = None
    """Whether collectives of tp travel beside the matrix products that read or make what they bring, by symmetric
    memory, with engine=fsdp; none means on NVIDIA GPUs that reach each other's memory, true refuses all else (no unit).
    """

    self_test: bool = False
    """Whether, before training, gradients of a tiny model in this layout are compared with one process's (no unit)."""

    activation_checkpoint: int = 0
    """Recompute the activations of every n-th block in the backward pass; 1 is every block, 0 none (blocks)."""

    activation_checkpoint_policy: Literal["full", "save_matmuls"] = "full"
    """Selective activation checkpointing: full recomputes everything, save_matmuls saves matmul outputs (no unit)."""

    activation_checkpoint_segment: int = 0
    """Compute recomputed blocks so many tokens at a time, in both passes: whole chunks; 0 for whole rows (tokens)."""

    ds_config: dict[str, Any] = field(default_factory=dict)
    """Native DeepSpeed keys, merged over ours; those that another setting owns, that change what is computed, or that
    are misspelt are refused (DeepSpeed's units)."""

    timeout_s: int = 1800
    """Longest wait of one rank for the others before the run fails (seconds)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; auto takes CUDA where there is one (no unit)."""

    def __post_init__(self) -> None:
        if self.engine == "auto":
            self.engine = "deepspeed" if importlib.util.find_spec("deepspeed") is not None else "fsdp"

    def mesh(self, world_size: int) -> MeshShape:
        """The mesh of a run of `world_size` ranks; raises as `MeshShape.resolve` does."""
        return MeshShape.resolve(world_size, self.dp_replicate, self.dp_shard, self.sp, self.tp)

    def layout(self, world_size: int) -> dict[str, Any]:
        """Engine, ZeRO stage, ranks and mesh of a run of `world_size` ranks, as plain JSON to keep in a checkpoint."""
        dimensions = self.mesh(world_size)._asdict()
        return {"engine": self.engine, "zero_stage": self.zero_stage, "world_size": world_size, **dimensions}

    def validate(self, world_size: int, local_size: int | None = None) -> None:
        """Refuse (ValueError) what cannot run on so many ranks, `local_size` of them on this host (None: all)."""
        require_ranges("parallel", self, positive=("timeout_s",), not_negative=("activation_checkpoint",))
        self.mesh(world_size)
        here, also = local_size or world_size, "" if self.dp_shard == -1 else " with parallel.dp_shard=-1"
        policy, fsdp = "activation_checkpoint_policy", self.engine == "fsdp"
        for good, key, remedy in (
            (self.zero_stage in range(4), "zero_stage", "choose 0, 1, 2 or 3"),
            (self.zero_stage > 0 or not fsdp, "zero_stage", "fsdp has to split something, choose 1 to 3, or deepspeed"),
            (self.activation_checkpoint_policy == "full" or fsdp or self.zero_stage < 3, policy,
             "linear layers of engine=deepspeed with zero_stage=3 change matmul outputs after they were saved, choose "
             "full, parallel.engine=fsdp, or a zero_stage below 3"),
            (fsdp or importlib.util.find_spec("deepspeed") is not None, "engine",
             "DeepSpeed is not installed, run pip install 'mega_scale[deepspeed]', or choose parallel.engine=fsdp"),
            (not self.ds_config or not fsdp, "ds_config", "fsdp has no use for it, remove it, or use engine=deepspeed"),
            (self.device != "cuda" or cuda.is_available(), "device", "there is no CUDA device, choose cpu or auto"),
            # The collectives of tensor parallelism run several times a layer.
            (here % self.tp == 0, "tp", f"it does not divide the {here} ranks of this host, and ranks that share "
             f"channels must share a host; use parallel.tp={gcd(here, self.tp)}{also}"),
        ):  # fmt: skip
            require(good, f"parallel.{key}", getattr(self, key), remedy)
        if self.tp_overlap and (problem := self.overlap_problem()):
            require(False, "parallel.tp_overlap", True, f"{problem}, or remove parallel.tp_overlap")

    def overlap_problem(self) -> str | None:
        """Why tp's collectives have to be waited for, with a remedy; None where only ranks that have met can tell."""
        kind = device_kind(torch.device("cuda" if self.device != "cpu" and cuda.is_available() else "cpu"))
        for good, problem in (
            (self.tp > 1, f"parallel.tp={self.tp} has no collectives, use parallel.tp=2 or more"),
            (self.engine == "fsdp", f"parallel.engine={self.engine} brings weights layer by layer, and products that "
             "travel beside collectives need those of several, use parallel.engine=fsdp"),
            (kind == "cuda" and torch.version.hip is None, "symmetric memory needs NVIDIA GPUs, use them"),
            (_has_symmetric_products(), f"torch {torch.__version__} has no torch.ops.symm_mem.fused_all_gather_matmul, "
             "install torch 2.13"),
        ):  # fmt: skip
            if not good:
                return problem
        return None


def _has_symmetric_products() -> bool:
    try:
        importlib.import_module("torch.distributed._symmetric_memory")
    except ImportError:
        return False
    operators = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")
    return all(hasattr(torch.ops.symm_mem, name) for name in operators)


@dataclass(frozen=True)
class EngineConfig:
    """What an engine has to know of its run."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: str = "fp32"  # or bf16, the number format of forward and backward
    micro_batch_size: int = 1  # sequences in one forward pass of one rank
    accumulation: int = 1  # forward passes in one optimizer step
    max_grad_norm: float = 1.0  # norm to which gradients are clipped, 0 for not at all
    seed: int = 0  # of dropout
    compile: bool | None = None  # whether blocks are compiled; None: on GPUs
    fp8: bool = False  # whether matrix products of blocks are computed in fp8
    weight_average: float = 0.0  # decay of an exponential average of the weights, 0 for none

    def validate(self, world_size: int, local_size: int | None = None) -> None:
        """Refuse what cannot run, before any process group starts; see `ParallelConfig.validate`."""
        self.parallel.validate(world_size, local_size)
        if self.fp8:
            self._check_fp8()
        if self.parallel.engine == "deepspeed":
            mesh = self.parallel.mesh(world_size)
            _check_native(self.native_deepspeed(mesh.fsdp)["zero_optimization"], mesh)

    def compiles(self, device: str) -> bool:
        """Whether blocks are compiled on this type of device."""
        return device == "cuda" if self.compile is None else self.compile

    def _check_fp8(self) -> None:
        parallel = self.parallel
        kind = device_kind(torch.device("cuda" if parallel.device != "cpu" and cuda.is_available() else "cpu"))
        capability = cuda.get_device_capability() if cuda.is_available() else _FP8_CAPABILITY
        for good, remedy in (
            (parallel.engine == "fsdp", f"parallel.engine={parallel.engine} casts what products read to bf16, use "
             "parallel.engine=fsdp, or train.fp8=false"),
            (parallel.tp == 1, f"layers that parallel.tp={parallel.tp} ranks share have no fp8 products, use "
             "parallel.tp=1, or train.fp8=false"),
            (self.dtype == "bf16", f"the rest is in bf16, not train.dtype={self.dtype}, use train.dtype=bf16"),
            (kind == "cuda", "a CPU has no fp8 products, use train.fp8=false"),
            (capability >= _FP8_CAPABILITY, f"the GPU has compute capability {capability[0]}.{capability[1]}, and fp8 "
             "products need 8.9 or newer, as an H100 has, use train.fp8=false"),
            (importlib.util.find_spec("torchao") is not None,
             "torchao is not installed, run pip install 'mega_scale[fp8]', or use train.fp8=false"),
        ):  # fmt: skip
            require(good, "train.fp8", True, remedy)

    def native_deepspeed(self, ranks: int) -> dict[str, Any]:
        """DeepSpeed's own configuration, for `ranks` over which parameters are partitioned.

        Refuses keys of `parallel.ds_config` that contradict a setting of ours, or are none of `KEYS`.
        """
        stage = self.parallel.zero_stage
        ours: dict[str, Any] = {
            "train_batch_size": self.micro_batch_size * self.accumulation * ranks,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            # Stage 0 has no norm to report after clipping, so the engine clips there itself.
            "gradient_clipping": self.max_grad_norm if stage > 0 else 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            # bf16 by autocast: DeepSpeed's own bf16 mode rounds every parameter, those of the EMA included. Without
            # modules listed here, weights are gathered and gradients are reduced in fp32.
            "torch_autocast": {
                "enabled": self.dtype == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []
            },
        }  # fmt: skip
        return _merge(ours, self.parallel.ds_config)


def layout_changes(saved: dict[str, Any], here: dict[str, Any]) -> str:
    """Say in which settings the layout of this run differs from that of a checkpoint; empty where they are the same."""
    changed = [key for key, value in here.items() if saved.get(key) != value]
    names = {key: "processes" if key == "world_size" else f"parallel.{key}" for key in changed}
    return ", ".join(f"{name} {saved.get(key)} -> {here[key]}" for key, name in names.items())


def _paths(keys: str) -> list[str]:
    return keys.replace("zero.", "zero_optimization.").split()


# Keys of DeepSpeed, or sections of them, that say what another setting of ours says, and that setting. Two answers to
# one question would be settled by DeepSpeed without a word.
_OWNED = {
    "train.global_batch_size": "train_batch_size",
    "train.micro_batch_size": "train_micro_batch_size_per_gpu",
    "train.global_batch_size and train.micro_batch_size": """gradient_accumulation_steps managed_gradient_accumulation
        elasticity""",
    "optimizer.max_grad_norm": "gradient_clipping zero.compute_grad_norm",
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
    "the checkpoint section": """checkpoint nebula datastates zero.load_from_fp32_weights zero.elastic_checkpoint
        zero.pipeline_loading_checkpoint zero.gather_16bit_weights_on_model_save
        zero.stage3_gather_16bit_weights_on_model_save zero.stage3_gather_fp16_weights_on_model_save""",
    "the data section": "dataloader_drop_last data_efficiency",
    "data.length_schedule": "curriculum_learning",
    "parallel.zero_stage": "zero.stage",
    "parallel.dp_shard and parallel.dp_replicate": """zero.mics_shard_size zero.mics_hierarchical_params_gather
        zero.zero_hpz_partition_size""",
}
OWNERS = {key: owner for owner, keys in _OWNED.items() for key in _paths(keys)}

# By what DeepSpeed expects of a value: a test of it, and the keys that are passed on with such a value. What is
# computed stays, and where it lies is compared with one process: tests/distributed/test_native_keys.py.
_PASSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "true or false": (lambda value: type(value) is bool, """wall_clock_breakdown memory_breakdown dump_state
        timers.throughput.enabled timers.throughput.synchronized flops_profiler.enabled flops_profiler.detailed
        comms_logger.enabled comms_logger.prof_all comms_logger.verbose comms_logger.debug tensorboard.enabled
        csv_monitor.enabled wandb.enabled zero.contiguous_gradients zero.reduce_scatter zero.allgather_partitions
        zero.use_multi_rank_bucket_allreduce zero.overlap_comm zero.round_robin_gradients zero.parameter_alignment
        zero.ignore_unused_parameters zero.stage3_use_all_reduce_for_fetch_params zero.stage3_allgather_sequential
        zero.memory_efficient_linear zero.override_module_apply zero.log_trace_cache_warnings
        zero.enable_sanity_checks zero.cpu_offload zero.cpu_offload_param zero.cpu_offload_use_pin_memory
        zero.offload_optimizer.pin_memory zero.offload_param.pin_memory
        zero.zero_quantized_gradients"""),  # the last is refused in words of its own
    "a whole number of at least 1": (lambda value: type(value) is int and value >= 1, """steps_per_print
        zero.reduce_bucket_size zero.allgather_bucket_size zero.sub_group_size zero.offload_optimizer.buffer_count
        zero.offload_param.buffer_count"""),
    "a whole number of at least 0": (lambda value: type(value) is int and value >= 0, """flops_profiler.profile_step
        flops_profiler.top_modules zero.stage3_prefetch_bucket_size zero.stage3_param_persistence_threshold
        zero.stage3_model_persistence_threshold zero.stage3_max_live_parameters zero.stage3_max_reuse_distance"""),
    "a whole number": (lambda value: type(value) is int, "flops_profiler.module_depth"),
    "a number": (lambda value: type(value) in (int, float), "flops_profiler.recompute_fwd_factor"),
    "text": (lambda value: type(value) is str, """tensorboard.job_name csv_monitor.job_name wandb.group wandb.team
        wandb.project"""),
    "a path": (lambda value: type(value) is str, """flops_profiler.output_file tensorboard.output_path
        csv_monitor.output_path zero.offload_optimizer.nvme_path zero.offload_param.nvme_path"""),
    "none or cpu": (lambda value: value in ("none", "cpu", "nvme"),  # of nvme, `_check_native` says more
                    "zero.offload_optimizer.device zero.offload_param.device"),
    "a list of texts": (lambda value: type(value) is list, "comms_logger.prof_ops"),
}  # fmt: skip
KEYS = {key: expected for expected, (_, keys) in _PASSED.items() for key in _paths(keys)}
"""Native keys that are passed on to DeepSpeed, with what it expects as their values; every other one is refused."""

_SECTIONS = {path[:end] for path in KEYS for end, letter in enumerate(path) if letter == "."}
# Further names under which DeepSpeed reads a key.
_ALIASES = {key.replace("stage3_", ""): key for key in KEYS if "stage3_" in key}
_SUPERSEDED = {
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
}
# Keys of DeepSpeed that no setting of ours stands for, by the reason why they are not passed on.
_REFUSED = {
    "it changes what is computed": """zero.zero_quantized_weights zero.zero_quantized_nontrainable_weights
        zero.zeropp_loco_param weight_quantization quantize_training compression_training eigenvalue sparse_attention
        sparse_gradients progressive_layer_drop""",
    "weights and moments would lie where checkpoints do not look for them": """zero.zenflow zero.legacy_stage1
        zero.save_muon_momentum_buffer_in_memory zero.offload_optimizer.ratio zero.offload_optimizer.super_offload
        zero.offload_optimizer.cpuadam_cores_perc""",
    "DeepSpeed fails with it in this model's first step": """zero.stage3_module_granularity_threshold
        zero.module_granularity_threshold zero.leaf_module""",
    "this trainer does not use it": """pipeline hybrid_engine expert_parallel use_data_before_expert_parallelism
        autotuning graph_harvesting aio comet disable_allgather disable_python_gc log_level""",
}


def _check_native(zero: dict[str, Any], mesh: MeshShape) -> None:
    """Refuse native keys of the section zero_optimization with which DeepSpeed cannot train on a mesh."""
    copies, stage = f"parallel.dp_replicate={mesh.dp_replicate}", f"parallel.zero_stage={zero['stage']}"
    native = "parallel.ds_config.zero_optimization"
    rules = [
        (mesh.dp_replicate > 1 and zero["stage"] < 3,
         f"{copies} with parallel.engine=deepspeed makes copies of a sharded model, but {stage} does not shard its "
         "weights: use parallel.zero_stage=3, or parallel.engine=fsdp"),
        (zero.get("zero_quantized_gradients", False),
         f"{native}.zero_quantized_gradients=true rounds gradients to 4 bits and reduces them over all ranks, whatever "
         f"{copies} and parallel.tp={mesh.tp}: remove that key"),
    ]  # fmt: skip
    # What moves gradients or weights away from the device.
    for key in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param"):
        value = zero.get(key)
        device = value.get("device", "none") if isinstance(value, dict) else "cpu" if value else "none"
        rules += [
            (device == "nvme",
             f"{native}.{key}.device='nvme' keeps state out of memory, from which checkpoints are written: use 'cpu'"),
            (device != "none" and zero["stage"] < (3 if "param" in key else 1),
             f"{native}.{key}={value!r} moves what {stage} does not split: remove that key, or use "
             "parallel.zero_stage=3"),
            (device != "none" and mesh.dp_replicate > 1,
             f"{copies} sums gradients between copies on the device, which {native}.{key}={value!r} takes them away "
             "from: remove that key, or use parallel.dp_replicate=1, or parallel.engine=fsdp without ds_config"),
        ]  # fmt: skip
    for broken, message in rules:
        if broken:
            raise ValueError(message)


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
    """Native keys of the user put into ours, in place."""
    own, given = dict(_leaves(ours)), dict[str, Any]()
    for written, value in _leaves(user):
        if written in given:
            raise ValueError(f"parallel.ds_config.{written}={value!r} is given twice, nested and with dots: keep one")
        whole = isinstance(value, float) and value.is_integer()  # as in 5e8
        given[written] = int(value) if whole else value
    for written, value in given.items():
        name, path = f"parallel.ds_config.{written}", _ALIASES.get(written, written)
        if owner := _within(path, OWNERS):
            if path not in own or own[path] != value or isinstance(own[path], bool) != isinstance(value, bool):
                raise ValueError(f"{name}={value!r} contradicts {OWNERS[owner]}: set it there and remove it here")
            continue
        if problem := _unknown(path, value):
            raise ValueError(f"{name}={value!r}{problem}")
        if path in _SECTIONS or value is None or (value == "auto" and path.startswith("zero_optimization.")):
            continue  # as if it was not there
        twin = _SUPERSEDED.get(path, path)
        if twin != written and any(_within(other, [twin]) for other in given):
            raise ValueError(f"{name}={value!r} is an older name of parallel.ds_config.{twin}: remove one of the two")
        expected = KEYS[path]
        if not _PASSED[expected][0](value):
            raise ValueError(f"{name}={value!r} is not allowed: expected {expected}")
        place = ours
        *sections, last = path.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = local_path(value, name) if expected == "a path" else value
    return ours


def _unknown(path: str, value: Any) -> str | None:
    """Why a key that no setting of ours stands for is not passed on; None where it is."""
    if why := next((why for why, keys in _REFUSED.items() if _within(path, _paths(keys))), None):
        return f" is not passed on to DeepSpeed: {why}; remove it"
    if path in _SECTIONS:
        off = value in ({}, None) or (value is False and path.startswith("zero_optimization.offload_"))
        return None if off else ": DeepSpeed expects a section of keys there"
    if path in KEYS:
        return None
    if outer := _within(path, KEYS):
        return f": DeepSpeed expects a single value as {outer}"
    [nearest] = get_close_matches(path, [*KEYS, *_ALIASES, *_SECTIONS], 1, 0.0)
    return f" is no key that is passed on to DeepSpeed: the nearest one is parallel.ds_config.{nearest}"


def check_accelerate(config: EngineConfig, world_size: int) -> None:
    """Refuse a run that does something else than accelerate launch, or its configuration file, was told."""
    parallel, mesh, stage = config.parallel, config.parallel.mesh(world_size), config.parallel.zero_stage
    accumulation, clip, every = config.accumulation, config.max_grad_norm, config.parallel.activation_checkpoint
    cpu = parallel.device == "cpu" or not cuda.is_available()
    engine, zero = f"parallel.engine={parallel.engine}", f"parallel.zero_stage={stage}"
    # By variable, values that agree with the run or that it has when nobody sets it, and our key for it.
    told: dict[str, tuple[tuple[Any, ...], str]] = {
        "ACCELERATE_USE_CPU": (("false", cpu), f"parallel.device={parallel.device}"),
        "ACCELERATE_MIXED_PRECISION": (("no", config.dtype), f"train.dtype={config.dtype}"),
        "ACCELERATE_DYNAMO_BACKEND": (
            ("no", "" if config.compile is False else "inductor"), f"train.compile={config.compile}"
        ),
        "ACCELERATE_USE_MEGATRON_LM": (("false",), engine),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            (accumulation,), f"train.global_batch_size and train.micro_batch_size, which make {accumulation}"
        ),
        "ACCELERATE_GRADIENT_CLIPPING": ((clip,), f"optimizer.max_grad_norm={clip:g}"),
        "ACCELERATE_USE_DEEPSPEED": (("false", parallel.engine == "deepspeed"), engine),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ((), "parallel.ds_config, where its keys belong"),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ((stage,), zero),
    }  # fmt: skip
    uses = {what: os.environ.get(f"ACCELERATE_USE_{what}", "").lower() for what in ("FSDP", "PARALLELISM_CONFIG")}
    is_set = {what: value in ("true", "1", "yes", "on") for what, value in uses.items()}
    native = dict(_leaves(parallel.ds_config))
    for what in ("optimizer", "param"):
        key = f"zero_optimization.offload_{what}.device"
        device = native.get(key, "none")
        told[f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE"] = (device,), f"parallel.ds_config.{key}={device}"
    if is_set["FSDP"]:
        # FULL_SHARD, false and the like are accelerate's own defaults, so they may not be what anybody said.
        below, replicate = ("shard_grad_op", "2") if stage < 3 else (), f"parallel.dp_replicate={mesh.dp_replicate}"
        strategies = ("full_shard", "1", *below, *(("hybrid_shard", "4") if mesh.dp_replicate > 1 else ()))
        recompute = f"parallel.activation_checkpoint={every}"
        told |= {
            "ACCELERATE_USE_FSDP": ((parallel.engine == "fsdp",), engine),
            "FSDP_SHARDING_STRATEGY": (strategies, f"{zero} with {replicate}"),
            "FSDP_RESHARD_AFTER_FORWARD": (("true", *strategies, *(("false",) if stage < 3 else ())), zero),
            "FSDP_OFFLOAD_PARAMS": (("false",), engine),
            "FSDP_ACTIVATION_CHECKPOINTING": (("false", every > 0), recompute),
            "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), recompute),
            "FSDP_IGNORED_MODULES": ((), f"{engine}, which shards all"),
        }
    if is_set["PARALLELISM_CONFIG"]:
        told |= {
            f"PARALLELISM_CONFIG_{axis.upper()}_SIZE": ((size,), f"parallel.{axis}={size}")
            for axis, size in mesh._asdict().items()
        }
        told["PARALLELISM_CONFIG_CP_SIZE"] = (1,), f"parallel.sp={mesh.sp}, which shares sequences here"
    renamed = {"ACCELERATE_USE_CPU": "cpu", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file"}
    for variable, (fits, ours) in told.items():
        name = renamed.get(variable, variable.lower().removeprefix("accelerate_").removeprefix("deepspeed_"))
        value = os.environ.get(variable, "").strip().lower()
        if value not in ("", "none", "auto") and not any(_same(value, good) for good in fits):
            raise ValueError(
                f"accelerate launch --{name} ({variable}={value}) contradicts {ours}: say there what you want, and "
                f"take --{name} out of accelerate's command, or {name} out of its configuration file"
            )


def _same(said: str, ours: Any) -> bool:
    with contextlib.suppress(ValueError):
        return float(said) == float(ours) and not isinstance(ours, bool)
    return said == str(ours).lower()
