"""The templates for many hosts: DeepSpeed reads the hostfile, and the Slurm script trains, and resumes, a small run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile
from faults import until_step
from launching import ROOT, TINY, metrics

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
echo $$ > "$PROGRAMS/step"
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames node[0-0]") echo localhost ;;
    "requeue $SLURM_JOB_ID") touch "$PROGRAMS/requeued" ;;
    *) exit 1 ;;
esac
"""
# Every process of the job's step, as Slurm does it.
SCANCEL = """#!/bin/bash
[[ "$*" == "--signal=USR1 $SLURM_JOB_ID" ]] || exit 1
signal_tree() {
    for child in $(cat /proc/$1/task/*/children); do signal_tree $child; done
    kill -USR1 $1
}
signal_tree $(cat "$PROGRAMS/step")
"""


def test_deepspeed_reads_the_hostfile():
    assert fetch_hostfile(str(ROOT / "launch/hostfile.example")) == {"node0": 8, "node1": 8}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster of one node, as far as the script sees."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[0-0]", "SLURM_JOB_NUM_NODES": "1"}
    job["PROGRAMS"] = str(programs)
    for name, value in {**job, "PATH": path, "RANKS_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    return programs


@pytest.mark.launch
@pytest.mark.slow
def test_a_job_whose_time_is_nearly_over_stops_queues_itself_again_and_goes_on(slurm, tmp_path, text_file):
    run_dir, steps = tmp_path / "run", 60
    settings = [*TINY, "data.source=json", f"data.path={text_file}", "data.validation_fraction=0.2", "data.workers=1"]
    command = ["bash", "launch/slurm.sbatch", str(run_dir), *settings, f"train.steps={steps}"]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert until_step(5, job)
    job.send_signal(signal.SIGUSR1)  # to the batch shell alone
    rest, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and "queued again" in rest, rest
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped" and 5 <= status["step"] < steps
    (slurm / "requeued").unlink()

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 and f"from step {status['step']} of" in done.stdout, done.stderr[-4000:]
    assert "| 2 ranks (" in done.stdout
    assert list(metrics(run_dir)) == list(range(1, steps + 1))
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
    assert not (slurm / "requeued").exists()


@pytest.mark.launch
@pytest.mark.slow
def test_a_job_that_fails_or_does_nothing_is_not_queued_again(slurm, tmp_path, text_file):
    run_dir = tmp_path / "run"
    settings = [*TINY, "data.source=json", f"data.path={text_file}", "data.validation_fraction=0.2"]
    command = ["bash", "launch/slurm.sbatch", str(run_dir), *settings, "parallel.engine=fsdp"]
    run_dir.mkdir()
    (run_dir / "status.json").write_text('{"state": "stopped", "step": 3, "reason": ""}')
    for change, says in (("train.stepz=1", "train.stepz"), ("train.max_time=1", "")):
        # The second saves step 0, and then has nothing more to save.
        for _ in range(2 if says == "" else 1):
            done = subprocess.run(
                [*command, change], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
            )
        assert done.returncode == 1 and says in done.stderr, done.stderr[-4000:]
    assert "not queued again" in done.stderr


def test_the_slurm_script_wants_a_run_folder(slurm):
    done = subprocess.run(["bash", "launch/slurm.sbatch"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "give the run folder" in done.stderr
