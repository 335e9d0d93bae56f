"""One rank killed during a save, under real launchers: all processes end, and the run goes on to the bit."""

import contextlib
import os
import random
import signal
import threading
import time

import forks
import kills
import psutil
import pytest
from launching import LAUNCHERS, _kill_all, _popen, start, write_sources
from same_runs import metric_problems, state_problems

from mega_scale.checkpoint.folder import checkpoints, verify

pytestmark = [pytest.mark.launch, pytest.mark.slow]

LIMIT_S = 120


def ranks_of(launcher):
    """Processes of the ranks, by number; those that read data for them come after them."""
    found = {}
    for process in launcher.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(word.endswith("launch/pretrain.py") for word in process.cmdline()) and "RANK" in process.environ():
                found.setdefault(int(process.environ()["RANK"]), process)
    return found


def kill_in_a_save(launcher, arguments, run_dir, victim):
    """Start a run, and kill one rank once a second checkpoint is being written; returns all processes there were."""
    process = _popen(LAUNCHERS[launcher], arguments)
    threading.Thread(target=process.stdout.read, daemon=True).start()
    deadline = time.monotonic() + LIMIT_S
    try:
        while not (checkpoints(run_dir) and list(run_dir.glob("checkpoints/*.unfinished"))):
            assert process.poll() is None and time.monotonic() < deadline, "no second save"
            time.sleep(0.002)
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(ranks_of(psutil.Process(process.pid))[victim].pid, signal.SIGKILL)
        code = process.wait(LIMIT_S)
        _, alive = psutil.wait_procs(family, timeout=forks.ORPHANS_S)
    finally:
        _kill_all(process.pid)
        process.wait()
    assert code != 0 and not alive, (code, alive)


@pytest.mark.parametrize(
    "launcher,cell,again",  # and what resumes it
    [
        ("torchrun", kills.Cell("fsdp", 3, True, 1), "two forked"),
        ("deepspeed", kills.Cell("deepspeed", 3, True, 1, workers=1), "deepspeed"),
    ],
)
def test_a_rank_killed_in_a_save_takes_all_with_it_and_the_run_goes_on_to_the_bit(tmp_path, launcher, cell, again):
    text, whole, killed = write_sources(tmp_path / "text.jsonl", 20), tmp_path / "whole", tmp_path / "killed"
    code, output = start(LAUNCHERS["two forked"], cell.arguments(text, whole))
    assert code == 0, output[-4000:]
    arguments = cell.arguments(text, killed)
    kill_in_a_save(launcher, arguments, killed, victim=random.Random(launcher).randrange(2))
    newest = checkpoints(killed)[-1]
    step = verify(newest).step
    assert metric_problems(whole, killed, step) == [] and step < kills.STEPS
    code, output = start(LAUNCHERS[again], [*arguments, "--resume"])
    assert code == 0 and f"from step {step} of" in output, output[-4000:]
    final = f"checkpoints/step-{kills.STEPS:08d}"
    assert metric_problems(whole, killed, kills.STEPS) == []
    assert state_problems(whole / final, killed / final) == []
