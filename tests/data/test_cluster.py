"""datatrove's executors make the same files; Slurm is played by a script that runs what is submitted."""

import json
import os
import sys
from pathlib import Path

import pytest
from test_prepare import TEXTS, contents, prepare

from mega_scale.data import DataConfig
from mega_scale.data.prepare import run_on_cluster

pytest.importorskip("datatrove")
pytestmark = pytest.mark.distributed

SBATCH = """#!/bin/bash
# Runs the tasks of an array one after the other, and answers with the number of the job.
script="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for ((i = 0; i <= ${last:-0}; i++)); do
    export SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_NODELIST=node0 SLURM_NODEID=0
    bash "$script" >> "$0.log" 2>&1
done
echo 7
"""


SRUN = """#!/bin/bash
shift 3  # -l -n 1
"$@"
"""


@pytest.fixture
def config(tmp_path) -> DataConfig:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return DataConfig("json", [str(tmp_path / "text.jsonl")], validation_fraction=0.2)


def test_local_executor_makes_the_same_files(config, tmp_path):
    prepare(tmp_path / "own", config)
    run_on_cluster(tmp_path / "local", config, 3000, tasks=3, processes=1, slurm={})
    assert contents(tmp_path / "local") == contents(tmp_path / "own")
    lost = tmp_path / "local/00002.json"
    lost.unlink()
    run_on_cluster(tmp_path / "local", config, 3000, tasks=2, processes=1, slurm={})
    assert contents(tmp_path / "local") == contents(tmp_path / "own")


@pytest.mark.slow
def test_slurm_jobs_make_the_same_files(config, tmp_path, monkeypatch):
    prepare(tmp_path / "own", config)
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "#!/bin/bash\necho node0\n")):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    keys = {"partition": "cpu", "time": "00:10:00"}
    run_on_cluster(tmp_path / "slurm", config, 3000, tasks=2, processes=None, slurm=keys)
    log = commands / "sbatch.log"
    assert (tmp_path / "slurm/manifest.json").exists(), log.read_text() if log.exists() else "nothing was submitted"
    assert contents(tmp_path / "slurm") == contents(tmp_path / "own")
    with pytest.raises(ValueError, match="partition and time"):
        run_on_cluster(tmp_path / "slurm", config, 3000, tasks=2, processes=None, slurm={})
