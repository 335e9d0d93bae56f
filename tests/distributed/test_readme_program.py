"""The program in the README of mega_scale/parallel runs, as it is printed there, under two launchers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm

import mega_scale.parallel

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROGRAM = re.search(
    r"```python\n(.*?)```", (Path(mega_scale.parallel.__file__).parent / "README.md").read_text(), flags=re.S
)
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "{port}"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "{port}"],
}


def losses(launcher: str, program: str, folder: Path) -> list[float]:
    (folder / "program.py").write_text(program)
    command = [word.format(port=warm.free_port()) for word in LAUNCHERS[launcher]]
    done = subprocess.run(
        [BIN / command[0], *command[1:], "program.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [float(loss) for loss in re.findall(r"step \d+ loss ([\d.]+) norm", done.stdout)]


def test_it_trains_alike_under_every_launcher_and_engine(tmp_path):
    assert PROGRAM is not None
    program = PROGRAM[1]
    assert len(program.splitlines()) < 30
    fsdp = losses("torchrun", program, tmp_path)
    assert len(fsdp) == 10 and fsdp[-1] < fsdp[0]
    zero = losses("deepspeed", program.replace('engine="fsdp"', 'engine="deepspeed"'), tmp_path)
    assert zero == pytest.approx(fsdp, rel=1e-3)
