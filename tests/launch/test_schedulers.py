"""Processes that srun or mpirun started: they have no variables but those of their scheduler, and are one run."""

import os

import pytest
import warm
from launching import TINY, metrics

TASKS = {
    "srun": lambda rank: {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node0",
    },
    "Open MPI": lambda rank: {
        "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), "PMIX_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": f"prterun-{os.getpid()}@1",
    },
    "MPICH": lambda rank: {
        "PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2",
        "MASTER_PORT": str(warm.free_port()) if rank == 0 else "",
    },
}  # fmt: skip


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("scheduler", TASKS)
def test_tasks_of_a_scheduler_train_one_run(tmp_path, text_file, scheduler):
    tasks = [TASKS[scheduler](rank) for rank in range(2)]
    if scheduler == "MPICH":
        tasks[1]["MASTER_PORT"] = tasks[0]["MASTER_PORT"]
    settings = [*TINY, "data.source=json", f"data.path={text_file}", "train.steps=3", f"run_dir={tmp_path / 'run'}"]
    engine = "parallel.engine=fsdp" if scheduler == "MPICH" else "parallel.engine=deepspeed"
    code, output = warm.run_script("launch/pretrain.py", [*settings, engine], 0, 200, tasks=tasks)
    assert code == 0, output[-4000:]
    assert output.count("| 2 ranks (") == 1
    assert list(metrics(tmp_path / "run")) == [1, 2, 3]
    # A command of one process refuses to run once a task.
    code, output = warm.run_script(
        "launch/export.py", [str(tmp_path / "run"), str(tmp_path / "out")], 0, 100, tasks=tasks
    )
    assert code == 2 and output.count("launch/export.py is one process") == 2 and not (tmp_path / "out").exists()
