"""What the parallel section refuses, and how native DeepSpeed keys are merged."""

from typing import Any

import pytest

from mega_scale.parallel import ParallelConfig
from mega_scale.parallel.deepspeed_config import OWNERS, native_config

RUN: dict[str, Any] = {
    "dtype": "fp32",
    "micro_batch_size": 2,
    "accumulation": 3,
    "max_grad_norm": 1.0,
    "world_size": 4,
}


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        ({"engine": "ddp"}, r"parallel\.engine='ddp'", "fsdp, deepspeed"),
        ({"zero_stage": 4}, r"parallel\.zero_stage=4", "choose 0, 1, 2 or 3"),
        ({"engine": "fsdp", "zero_stage": 0}, r"parallel\.zero_stage=0", "deepspeed"),
        ({"activation_checkpoint": -1}, r"parallel\.activation_checkpoint=-1", "choose 0"),
        ({"activation_checkpoint_keeps": "all"}, r"parallel\.activation_checkpoint_keeps='all'", "nothing, products"),
        ({"activation_checkpoint_keeps": "products"}, r"activation_checkpoint_keeps='products'", "engine=fsdp"),
        ({"timeout_s": 0}, r"parallel\.timeout_s=0", "at least 1"),
        ({"device": "tpu"}, r"parallel\.device='tpu'", "auto, cpu, cuda"),
        ({"engine": "fsdp", "ds_config": {"wall_clock_breakdown": True}}, r"parallel\.ds_config=", "remove it"),
    ],
)
def test_refuses(changes: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{remedy}"):
        ParallelConfig(**changes).validate(**RUN)


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
        ParallelConfig(**changes).validate(**RUN, local_size=local_size)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("offload", [None, False, {}, {"device": "none"}])
def test_copies_accept_keys_that_offload_nothing(offload: Any) -> None:
    config = ParallelConfig(dp_replicate=2, ds_config={"zero_optimization": {"offload_optimizer": offload}})
    assert config.validate(**RUN) is None


def test_accepts_what_can_run():
    runs = [("deepspeed", 0), *((engine, stage) for engine in ("deepspeed", "fsdp") for stage in (1, 2, 3))]
    accepted = [ParallelConfig(engine=engine, zero_stage=stage).validate(**RUN) for engine, stage in runs]
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
        ParallelConfig(ds_config=native).validate(**RUN)
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
        ParallelConfig(ds_config=zero).validate(**RUN)
