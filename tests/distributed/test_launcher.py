"""What launchers and job schedulers say of a process, and options of training that accelerate launch was told."""

import os
from argparse import Namespace

import pytest

from mega_scale.config import RunConfig
from mega_scale.parallel import Placement, check_single, placement
from mega_scale.parallel.mesh import first_host, meeting_point

TORCHRUN = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "node0", "MASTER_PORT": 29500}
SRUN = {
    "SLURM_JOB_ID": 71, "SLURM_STEP_ID": 0, "SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_NODEID": 2, "SLURM_NTASKS": 6,
    "SLURM_STEP_NUM_TASKS": 6, "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_STEP_NODELIST": "gpu[001-002,7],login1",
}  # fmt: skip
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in
            {"RANK": 1, "SIZE": 2, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}.items()}  # fmt: skip
HYDRA = {"PMI_RANK": 3, "PMI_SIZE": 4, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2, "MASTER_ADDR": "node0"}
ALONE = Placement(0, 1, 0, 1)


@pytest.fixture
def told(monkeypatch):
    """Sets the given variables, and no other that says anything about ranks."""
    for name in list(os.environ):
        if (
            name.startswith(("SLURM_", "OMPI_", "PMI", "MV2_", "MPI_", "PALS_", "ACCELERATE_", "LOCAL_"))
            or name in TORCHRUN
        ):
            monkeypatch.delenv(name)

    def set_variables(variables, **changes):
        for name, value in (variables | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    return set_variables


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (SRUN, Placement(5, 6, 1, 2)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,2,1", "SLURM_LOCALID": 0}, Placement(5, 6, 0, 1)),
        (OPEN_MPI, Placement(1, 2, 1, 2)),
        (HYDRA, Placement(3, 4, 1, 2)),
        ({name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}, Placement(1, 2, 1, 2)),
        ({"PMI_RANK": 1, "PMI_SIZE": 2, "PMI_LOCAL_RANK": 1, "PMI_LOCAL_SIZE": 2}, Placement(1, 2, 1, 2)),
        # An inner launcher wins: torchrun or mpirun in a step of Slurm, torchrun under mpirun.
        (SRUN | TORCHRUN, Placement(1, 2, 1, 2)),
        (OPEN_MPI | TORCHRUN | {"RANK": 0, "LOCAL_RANK": 0}, Placement(0, 2, 0, 2)),
        (SRUN | OPEN_MPI | {"SLURM_PROCID": 0}, Placement(1, 2, 1, 2)),
        # Slurm's own PMI knows no places on hosts.
        (SRUN | {"PMI_RANK": 5, "PMI_SIZE": 6, "PMIX_RANK": 5}, Placement(5, 6, 1, 2)),
        # A script that exports what it knows, and leaves the rank to srun.
        (SRUN | {"WORLD_SIZE": 6, "MASTER_ADDR": "gpu001", "MASTER_PORT": 29500}, Placement(5, 6, 1, 2)),
        # What the versions of Slurm, or the way to the process, may leave out.
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1, "SLURM_STEP_ID": 3}, Placement(1, 2, 1, 2)),
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1}, Placement(1, 2, 1, 2)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": None, "SLURM_STEP_NUM_NODES": 3}, Placement(5, 6, 1, 2)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": None, "SLURM_JOB_NUM_NODES": 4}, Placement(5, 6, 1, 2)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_STEP_NODELIST": "a[1-3]"}, Placement(5, 6, 1, 2)),
    ],
)  # fmt: skip
def test_a_process_learns_its_place_from_what_started_it(told, variables, place):
    told(variables)
    assert placement() == place


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # Scripts of sbatch, shells of salloc, and those that salloc starts as a step of their own.
        {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0},
        {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_JOB_NODELIST": "node[0-1]"},
        {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_STEP_ID": 4294967290},
        {"ACCELERATE_USE_CPU": "False"},
    ],
)
def test_a_process_that_nothing_numbered_is_alone(told, variables):
    told(variables)
    assert placement() == ALONE
    check_single("launch/export.py", Namespace())


def test_the_shell_of_a_step_of_one_task_is_alone(told):
    told(SRUN, SLURM_STEP_NUM_TASKS=1, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NODEID=0, SLURM_STEP_TASKS_PER_NODE="1")
    assert placement()[:2] == (0, 1)
    check_single("launch/export.py", Namespace())


@pytest.mark.parametrize(
    ("variables", "changes", "names"),
    [
        (TORCHRUN, {"RANK": "x"}, "RANK='x'"),
        (TORCHRUN, {"RANK": "5"}, "RANK='5'.*WORLD_SIZE=2"),
        (TORCHRUN, {"RANK": "-1"}, "RANK='-1'"),
        (TORCHRUN, {"RANK": "1.0"}, "RANK='1.0'"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        (TORCHRUN, {"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        (TORCHRUN, {"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "LOCAL_RANK='2'"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE='3'.*WORLD_SIZE=2"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK='1'"),
        (TORCHRUN, {"LOCAL_SIZE": "two"}, "LOCAL_SIZE='two'"),
        (TORCHRUN, {"MASTER_PORT": "abc"}, "MASTER_PORT='abc'.*--master_port.*--master-port"),
        (TORCHRUN, {"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        (TORCHRUN, {"MASTER_PORT": "0"}, "MASTER_PORT='0'"),
        (TORCHRUN, {"MASTER_ADDR": ""}, "MASTER_ADDR=''"),
        (TORCHRUN, {"RANK": None}, "RANK are missing"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK='2'"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": None}, "OMPI_COMM_WORLD_SIZE are missing.*OMPI_COMM_WORLD_RANK='1'"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "MASTER_ADDR=None.*-x"),
        (OPEN_MPI, {"WORLD_SIZE": "4"}, "WORLD_SIZE='4' contradicts the 2"),
        (HYDRA, {"MASTER_ADDR": None}, "MASTER_ADDR=None.*-genv"),
        (HYDRA, {"MPI_LOCALRANKID": None}, "MPI_LOCALRANKID are missing"),
        ({"PMIX_RANK": 1}, {}, "PMIX_RANK='1'"),
        (SRUN, {"SLURM_PROCID": "6"}, "SLURM_PROCID='6'.*SLURM_STEP_NUM_TASKS=6"),
        (SRUN, {"SLURM_LOCALID": None}, "SLURM_LOCALID are missing"),
        (SRUN, {"SLURM_LOCALID": "2"}, "SLURM_LOCALID='2'"),
        (SRUN, {"SLURM_NODEID": "3"}, "SLURM_NODEID='3'"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE='many'"),
        (SRUN, {"SLURM_STEP_NODELIST": "gpu[a-b]"}, r"SLURM_STEP_NODELIST='gpu\[a-b\]'"),
        (SRUN, {"PMI_RANK": "3"}, "PMI_RANK='3' contradicts SLURM_PROCID='5'"),
        # accelerate launch --cpu --num_processes 2, as its launcher leaves the variables.
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}, {}, "--multi_gpu"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line_that_names_it(told, variables, changes, names):
    told(variables, **changes)
    with pytest.raises(ValueError, match=names) as refusal:
        placement()
    assert "\n" not in str(refusal.value)


def test_ranks_meet_where_they_are_told_or_on_the_first_host_of_the_step(told):
    told(SRUN)
    host, port = meeting_point(placement())
    assert host == "gpu001" and 20_000 <= port < 30_000
    assert meeting_point(placement()) == (host, port)
    told({}, SLURM_STEP_ID=1)  # a second step of the same job, at the same time perhaps
    assert meeting_point(placement())[1] != port
    told({}, MASTER_ADDR="other", MASTER_PORT=1234)
    assert meeting_point(placement()) == ("other", 1234)


def test_ranks_of_one_host_need_no_name_for_it(told):
    told(OPEN_MPI)
    assert meeting_point(placement())[0] == "127.0.0.1"


def test_the_first_of_a_list_of_hosts_is_found():
    known = {
        "login1": "login1",
        "gpu[001-003,7],login1": "gpu001",
        "gpu[7,001-003]": "gpu7",
        "r[1-2]n[09-10]-ib": "r1n09-ib",
        "a,b[2],c.example.org": "a",
        "c.example.org,b[2]": "c.example.org",
    }
    assert {text: first_host("SLURM_NODELIST", text) for text in known} == known
    for text in ("", "gpu[1", "gpu1]", "gpu[1-]", "gpu[]", "a,,b", "a b"):
        with pytest.raises(ValueError, match="SLURM_NODELIST="):
            first_host("SLURM_NODELIST", text)


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN, OPEN_MPI, HYDRA])
def test_a_command_of_one_process_is_not_run_once_a_rank(told, variables):
    told(variables)
    with pytest.raises(ValueError, match="is one process, and this is rank"):
        check_single("launch/export.py", Namespace())


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
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"train_compile": False}, "--dynamo_backend", "compile=False"),
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
