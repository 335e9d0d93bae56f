"""What accelerate launch was told is refused where the run does something else, and taken where it agrees."""

import os

import pytest

from mega_scale.config import RunConfig

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip
MESH = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", **{f"PARALLELISM_CONFIG_{axis}_SIZE": "1" for axis in
        ("DP_REPLICATE", "TP", "SP", "CP")}, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}  # fmt: skip
# What accelerate sets when it was told nothing.
QUIET = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Checks a run of two ranks under accelerate's variables."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
            monkeypatch.delenv(name)

    def check_run(variables, **changes):
        for name, value in (QUIET | variables).items():
            monkeypatch.setenv(name, value)
        config = RunConfig(run_dir=str(tmp_path / "run"))
        for key, value in {"data_source": "python-stdlib", **changes}.items():
            section, _, name = key.partition("_")
            setattr(getattr(config, section), name, value)
        config.validate(2)

    return check_run


@pytest.mark.parametrize(
    ("variables", "changes"),
    [
        ({}, {}),
        ({}, {"train_dtype": "bf16", "train_compile": True}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_USE_CPU": "True"},
         {"train_dtype": "bf16", "train_compile": True}),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_CLIPPING": "1.0",
                      "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
                      "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, {"optimizer_max_grad_norm": 1.0}),
        (FSDP, {"parallel_engine": "fsdp", "parallel_activation_checkpoint": 1}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP", "FSDP_RESHARD_AFTER_FORWARD": "false"},
         {"parallel_engine": "fsdp", "parallel_zero_stage": 2}),
        (MESH, {}),
    ],
)  # fmt: skip
def test_options_that_agree_with_the_run_are_taken(check, variables, changes):
    check(variables, **changes)


@pytest.mark.parametrize(
    ("variables", "changes", "option", "ours"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "--mixed_precision", "train.dtype=fp32"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"train_dtype": "bf16"}, "--mixed_precision", "train.dtype=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "--mixed_precision", "train.dtype=fp32"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "--dynamo_backend", "train.compile=False"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7"}, {}, "--gradient_accumulation_steps", "global_batch_size"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "--gradient_clipping", "optimizer.max_grad_norm="),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "--use_megatron_lm", "parallel.engine=deepspeed"),
        (DEEPSPEED, {"parallel_engine": "fsdp"}, "--use_deepspeed", "parallel.engine=fsdp"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, "--zero_stage", "parallel.zero_stage=3"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "--deepspeed_config_file", "ds_config"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "--offload_param_device", "ds_config"),
        (FSDP, {}, "--use_fsdp", "parallel.engine=deepspeed"),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"parallel_engine": "fsdp"},
         "--fsdp_sharding_strategy", "parallel.dp_replicate=1"),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {"parallel_engine": "fsdp"},
         "--fsdp_reshard_after_forward", "parallel.zero_stage=3"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {"parallel_engine": "fsdp"}, "--fsdp_offload_params", "engine=fsdp"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"parallel_engine": "fsdp"},
         "--fsdp_activation_checkpointing", "parallel.activation_checkpoint=0"),
        (MESH | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, "--parallelism_config_tp_size", "parallel.tp=1"),
        (MESH | {"PARALLELISM_CONFIG_CP_SIZE": "2"}, {}, "--parallelism_config_cp_size", "parallel.sp=1"),
    ],
)  # fmt: skip
def test_options_that_contradict_the_run_are_refused_with_both_names(check, variables, changes, option, ours):
    with pytest.raises(ValueError) as refusal:
        check(variables, **changes)
    line = str(refusal.value)
    assert f"accelerate launch {option} (" in line and ours in line and "\n" not in line
