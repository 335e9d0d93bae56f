"""The templates for many hosts: DeepSpeed reads the hostfile, and the Slurm script trains, and resumes, a small run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile
from launching import ROOT, TINY, metrics

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames node[0-0]" ]] && echo localhost
"""


def test_deepspeed_reads_the_hostfile():
    assert fetch_hostfile(str(ROOT / "launch/hostfile.example")) == {"node0": 8, "node1": 8}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster of one node, as far as the script sees."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[0-0]", "SLURM_JOB_NUM_NODES": "1"}
    for name, value in {**job, "PATH": path, "RANKS_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.launch
@pytest.mark.slow
def test_the_slurm_script_trains_and_goes_on(slurm, tmp_path, text_file):
    run_dir = tmp_path / "run"
    settings = [*TINY, "data.source=json", f"data.path={text_file}", "data.validation_fraction=0.2"]
    for steps in (3, 5):
        command = ["bash", "launch/slurm.sbatch", str(run_dir), *settings, f"train.steps={steps}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ('"from_step": 3' in done.stdout) == (steps == 5)
        assert '"world_size": 2' in done.stdout
    assert list(metrics(run_dir)) == [1, 2, 3, 4, 5]


def test_the_slurm_script_wants_a_run_folder(slurm):
    done = subprocess.run(["bash", "launch/slurm.sbatch"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "give the run folder" in done.stderr
