"""Disks that are full, read-only or broken under two ranks: older checkpoints stay, the run goes on or says why not.

The first test meets real file systems, which needs the right to mount; in the second errors are raised where files are
written, which runs everywhere.
"""

import contextlib
import re
import subprocess

import pytest
from faults import faulty, saved, status, text
from launching import metrics

from mega_scale.checkpoint.folder import find_checkpoint, verify
from mega_scale.process import NOT_WRITTEN

pytestmark = [pytest.mark.launch, pytest.mark.slow]
EVERY = ["checkpoint.every=2", "checkpoint.keep=0", "data.validation_fraction=0"]


@pytest.fixture
def disks(tmp_path):
    """A run folder on a small disk, with checkpoints on another: a disk with open files cannot become read-only."""
    run = tmp_path / "run"
    with contextlib.ExitStack() as mounted:
        for folder in (run, run / "checkpoints"):
            folder.mkdir()
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"no right to mount: {done.stderr.strip()}")
            mounted.callback(subprocess.run, ["umount", "-l", folder], check=True)
        yield run


def not_written(output):
    """What each checkpoint that could not be written was told of, a line each, by its step."""
    pattern = r"^step (\d+) \| checkpoint not written, older ones are untouched: (.*)$"
    return {int(step): problem for step, problem in re.findall(pattern, output, re.MULTILINE)}


def test_a_run_goes_on_while_its_disks_are_full_and_then_read_only(disks, text_file):
    checkpoints = disks / "checkpoints"
    fill = "; ".join(f"cat /dev/zero > {folder}/filler" for folder in (disks, checkpoints))
    faults = [
        {"at": "write", "steps": [4], "rank": 1, "do": "run", "times": 1, "command": f"({fill}) 2> /dev/null || true"},
        {
            **{"at": "save", "steps": [7], "rank": 0, "do": "run"},
            "command": f"rm {disks}/filler {checkpoints}/filler && mount -o remount,ro {checkpoints}",
        },
        {"at": "save", "steps": [9], "rank": 0, "do": "run", "command": f"mount -o remount,rw {checkpoints}"},
    ]
    changes = [*text(text_file), *EVERY, "train.steps=12", "parallel.engine=fsdp"]
    code, output = faulty("two forked", disks, faults, *changes)
    assert code == 0, output[-6000:]
    problems = not_written(output)
    assert list(problems) == [4, 6, 8], output
    assert f"rank 1: No space left on device ({checkpoints}/step-00000004.unfinished/state/part-00001" in problems[4]
    assert re.search(r"it needs [\d,]+ bytes, [\d,]+ are free in .*: make room", problems[6])
    assert "rank 0: Read-only file system" in problems[8]
    assert saved(disks) == [2, 10, 12] and status(disks)["state"] == "finished"
    for folder in checkpoints.glob("step-*"):
        verify(folder)
    # Of lines and events see tests/checkpoint/test_failing_disk.py: here the last page of a file has room.
    assert {1, 2, 3, 9, 10, 11, 12} <= metrics(disks).keys(), "no line is half a line"


def test_a_run_whose_last_checkpoint_cannot_be_written_says_so_and_names_the_one_there_is(tmp_path, text_file):
    faults = [
        {"at": "write", "steps": [4], "rank": 1, "do": "ENOSPC"},
        {"at": "write", "steps": [6], "rank": 0, "do": "EIO"},
        {"at": "write", "steps": [8], "rank": "all", "do": "EROFS"},
    ]
    changes = [*text(text_file), *EVERY, "train.steps=8", "parallel.engine=deepspeed"]
    code, output = faulty("two forked", tmp_path, faults, *changes)
    assert code == NOT_WRITTEN, output[-6000:]
    assert not_written(output) == {
        4: "rank 1: No space left on device (a file of the state)",
        6: "rank 0: Input/output error (a file of the state)",
        8: "; ".join(f"rank {rank}: Read-only file system (a file of the state)" for rank in (0, 1)),
    }
    last = tmp_path / "checkpoints/step-00000002"
    message = f"the checkpoint of step 8 could not be written; the last one is {last}"
    assert f"\nerror: {message}\n" in output and "Traceback" not in output
    assert status(tmp_path) == {"state": "failed", "step": 8, "reason": message}
    assert saved(tmp_path) == [2] and find_checkpoint(tmp_path) == (last, []) and verify(last).step == 2
