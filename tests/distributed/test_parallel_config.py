"""What the parallel section refuses, and how native DeepSpeed keys are merged."""

from pathlib import Path
from typing import Any

import pytest

from mega_scale.parallel import EngineConfig, ParallelConfig
from mega_scale.parallel.config import KEYS, OWNERS

RUN: dict[str, Any] = {
    "dtype": "fp32",
    "micro_batch_size": 2,
    "accumulation": 3,
    "max_grad_norm": 1.0,
    "world_size": 4,
}


def native_config(user: dict[str, Any], *, zero_stage: int, world_size: int, **run: Any) -> dict[str, Any]:
    return EngineConfig(ParallelConfig(zero_stage=zero_stage, ds_config=user), **run).native_deepspeed(world_size)


def validate(parallel: ParallelConfig, local_size: int | None = None) -> None:
    run = {key: value for key, value in RUN.items() if key != "world_size"}
    return EngineConfig(parallel, **run).validate(RUN["world_size"], local_size)


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        ({"engine": "ddp"}, r"parallel\.engine='ddp'", "fsdp, deepspeed"),
        ({"zero_stage": 4}, r"parallel\.zero_stage=4", "choose 0, 1, 2 or 3"),
        ({"engine": "fsdp", "zero_stage": 0}, r"parallel\.zero_stage=0", "deepspeed"),
        ({"activation_checkpoint": -1}, r"parallel\.activation_checkpoint=-1", "must be 0 or above"),
        (
            {"activation_checkpoint_policy": "all"},
            r"parallel\.activation_checkpoint_policy='all'",
            "full, save_matmuls",
        ),
        (
            {"activation_checkpoint_policy": "save_matmuls"},
            r"activation_checkpoint_policy='save_matmuls'",
            "engine=fsdp",
        ),
        ({"timeout_s": 0}, r"parallel\.timeout_s=0", "must be above 0"),
        ({"device": "tpu"}, r"parallel\.device='tpu'", "auto, cpu, cuda"),
        ({"engine": "fsdp", "ds_config": {"wall_clock_breakdown": True}}, r"parallel\.ds_config=", "remove it"),
    ],
)
def test_refuses(changes: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{remedy}"):
        validate(ParallelConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "local_size", "words"),
    [
        ({"tp": 0}, 4, ["parallel.tp=0", "parallel.tp=1"]),
        ({"dp_shard": 3}, 4, ["parallel.dp_shard=3", "parallel.dp_shard=4", "parallel.dp_shard=-1"]),
        ({"tp": 4}, 2, ["parallel.tp=4", "2 ranks of this host", "use parallel.tp=2"]),
        ({"tp": 2, "dp_shard": 2}, 1, ["parallel.tp=2", "parallel.tp=1 with parallel.dp_shard=-1"]),
        ({"dp_replicate": 2, "zero_stage": 1}, 4, ["parallel.dp_replicate=2", "parallel.zero_stage=3", "engine=fsdp"]),
    ],
)
def test_refuses_meshes(changes: dict[str, Any], local_size: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        validate(ParallelConfig(**changes), local_size)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("offload", [None, False, {}, {"device": "none"}])
def test_copies_accept_keys_that_offload_nothing(offload: Any) -> None:
    config = ParallelConfig(dp_replicate=2, ds_config={"zero_optimization": {"offload_optimizer": offload}})
    assert validate(config) is None


def test_accepts_what_can_run():
    runs = [("deepspeed", 0), *((engine, stage) for engine in ("deepspeed", "fsdp") for stage in (1, 2, 3))]
    accepted = [validate(ParallelConfig(engine=engine, zero_stage=stage)) for engine, stage in runs]
    assert accepted == [None] * 7


@pytest.mark.parametrize("path", OWNERS)
def test_refuses_native_keys_that_other_settings_own(path: str) -> None:
    native: dict[str, Any] = {}
    *outer, key = path.split(".")
    inner = native
    for name in outer:
        inner = inner.setdefault(name, {})
    inner[key] = "something else"
    with pytest.raises(ValueError, match=f"parallel.ds_config.{path}='something else' contradicts") as refusal:
        validate(ParallelConfig(ds_config=native))
    assert OWNERS[path] in str(refusal.value)


def test_native_keys_are_merged_over_ours():
    user = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "train_batch_size": 24,
        "flops_profiler": {"enabled": True},
        "steps_per_print": 5,
    }
    merged = native_config(user, zero_stage=2, **RUN)
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert merged["flops_profiler"] == {"enabled": True}
    assert merged["steps_per_print"] == 5
    assert merged["train_batch_size"] == 24
    assert merged["train_micro_batch_size_per_gpu"] == 2
    assert merged["gradient_accumulation_steps"] == 3
    assert user["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}


def test_a_section_cannot_be_replaced_by_a_value():
    with pytest.raises(ValueError, match=r"zero_optimization=3.*expects a section"):
        native_config({"zero_optimization": 3}, zero_stage=3, **RUN)


def test_refuses_state_on_nvme() -> None:
    zero = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
    with pytest.raises(ValueError, match=r"offload_optimizer\.device='nvme' .* use 'cpu'"):
        validate(ParallelConfig(ds_config=zero))


ZERO = "zero_optimization"


@pytest.mark.parametrize(
    ("native", "words"),
    [
        # Misspelt
        ({"zero_optimisation": {"stage": 3}}, ["zero_optimisation.stage=3", "parallel.ds_config.zero_optimization"]),
        ({"wall_clock_breakdwon": True}, ["wall_clock_breakdwon=True", "parallel.ds_config.wall_clock_breakdown"]),
        ({ZERO: {"overlap_com": True}}, [f"{ZERO}.overlap_com=True", f"{ZERO}.overlap_comm"]),
        (
            {ZERO: {"offload_optimizer": {"devise": "cpu"}}},
            ["offload_optimizer.devise='cpu'", "offload_optimizer.device"],
        ),
        ({ZERO: {"stage3_prefetch_bucket": 1}}, ["stage3_prefetch_bucket=1", "stage3_prefetch_bucket_size"]),
        # Of another type
        ({ZERO: {"stage": "two"}}, [f"{ZERO}.stage='two'", "parallel.zero_stage"]),
        ({ZERO: {"overlap_comm": "true"}}, [f"{ZERO}.overlap_comm='true'", "true or false"]),
        ({ZERO: {"round_robin_gradients": 1}}, ["round_robin_gradients=1", "true or false"]),
        ({ZERO: {"reduce_bucket_size": "many"}}, ["reduce_bucket_size='many'", "a whole number"]),
        ({ZERO: {"reduce_bucket_size": 0}}, ["reduce_bucket_size=0", "at least 1"]),
        ({ZERO: {"sub_group_size": 1.5}}, ["sub_group_size=1.5", "a whole number"]),
        ({ZERO: {"stage3_max_reuse_distance": -1}}, ["stage3_max_reuse_distance=-1", "at least 0"]),
        ({ZERO: {"overlap_comm": {"enabled": True}}}, ["overlap_comm.enabled=True", "a single value"]),
        ({ZERO: {"offload_optimizer": "cpu"}}, ["offload_optimizer='cpu'", "a section of keys"]),
        ({ZERO: {"offload_optimizer": {"device": "disk"}}}, ["device='disk'", "none or cpu"]),
        ({ZERO: True}, [f"{ZERO}=True", "a section of keys"]),
        ({"steps_per_print": 0}, ["steps_per_print=0", "at least 1"]),
        # Other names of what a setting owns
        ({"bfloat16": {"enabled": True}}, ["bfloat16.enabled=True", "train.dtype"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16_master_weights_and_grads", "train.dtype"]),
        ({"fp16": {"enabled": False}}, ["fp16.enabled=False", "train.dtype"]),
        ({"amp": {"enabled": True}}, ["amp.enabled=True", "train.dtype"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype='bf16'", "train.dtype"]),
        ({"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}}, ["train.dtype"]),
        ({"communication_data_type": "bf16"}, ["communication_data_type='bf16'", "train.dtype"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, ["optimizer.type='Adam'", "the optimizer section"]),
        ({"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer=True", "the optimizer section"]),
        ({"prescale_gradients": True}, ["prescale_gradients=True", "train.global_batch_size"]),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, ["parallel.activation_checkpoint"]),
        ({"checkpoint": {"load_universal": True}}, ["checkpoint.load_universal", "the checkpoint section"]),
        ({ZERO: {"stage3_gather_fp16_weights_on_model_save": True}}, ["the checkpoint section"]),
        ({ZERO: {"stage": True}}, [f"{ZERO}.stage=True", "parallel.zero_stage"]),
        # Two names of one key
        ({ZERO: {"overlap_comm": True}, f"{ZERO}.overlap_comm": False}, ["overlap_comm=False", "keep one"]),
        ({f"{ZERO}.sub_group_size": 5, ZERO: {"sub_group_size": 6}}, ["sub_group_size=6", "keep one"]),
        ({ZERO: {"max_live_parameters": 1, "stage3_max_live_parameters": 2}}, ["max_live_parameters=1", "remove one"]),
        ({ZERO: {"cpu_offload": True, "offload_optimizer": {"device": "none"}}}, ["cpu_offload=True", "remove one"]),
        # What changes the numbers, their place, or nothing here
        ({ZERO: {"zero_quantized_weights": True}}, ["zero_quantized_weights=True", "changes what is computed"]),
        ({ZERO: {"zero_quantized_gradients": True}}, ["zero_quantized_gradients=true", "remove that key"]),
        ({"compression_training": {"weight_quantization": {}}}, ["compression_training", "changes what is computed"]),
        ({"progressive_layer_drop": {"enabled": True}}, ["progressive_layer_drop", "changes what is computed"]),
        ({ZERO: {"zenflow": {"topk_ratio": 0.1}}}, ["zenflow.topk_ratio=0.1", "checkpoints"]),
        ({ZERO: {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["ratio=0.5", "checkpoints"]),
        ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine.enabled=True", "does not use it"]),
    ],
    ids=str,
)
def test_refuses_native_keys_in_one_line(native: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        validate(ParallelConfig(ds_config=native, zero_stage=1))
    message = str(refusal.value)
    assert message.startswith("parallel.ds_config.") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("stage", "key"), [(0, "offload_optimizer"), (1, "offload_param"), (2, "offload_param")])
def test_refuses_to_offload_what_is_not_split(stage: int, key: str) -> None:
    config = ParallelConfig(zero_stage=stage, ds_config={ZERO: {key: {"device": "cpu"}}})
    with pytest.raises(ValueError, match=rf"{key}=.*parallel\.zero_stage={stage} does not split"):
        validate(config)


def test_native_keys_by_other_names_and_of_other_words_for_nothing() -> None:
    user = {
        ZERO: {"prefetch_bucket_size": 5e7, "reduce_bucket_size": "auto", "overlap_comm": None, "offload_param": {}}
    }
    merged = native_config(user, zero_stage=3, **RUN)
    assert merged[ZERO] == {"stage": 3, "stage3_prefetch_bucket_size": 50_000_000}
    assert type(merged[ZERO]["stage3_prefetch_bucket_size"]) is int


def test_deepspeed_knows_every_key_that_is_passed_on() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: PLC0415  takes long

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values())}
    assert {key.split(".")[1] for key in KEYS if key.startswith(f"{ZERO}.")} <= known


@pytest.mark.parametrize(
    "section,key",
    [("tensorboard", "output_path"), ("csv_monitor", "output_path"), ("flops_profiler", "output_file")],
)
def test_native_paths_are_local_and_know_home_folders(section: str, key: str) -> None:
    merged = native_config({section: {key: "~/logs"}}, zero_stage=2, **RUN)
    assert merged[section][key] == str(Path("~/logs").expanduser())
    with pytest.raises(ValueError, match=rf"ds_config\.{section}\.{key}='s3://b/x': s3:// is no local path"):
        native_config({section: {key: "s3://b/x"}}, zero_stage=2, **RUN)
