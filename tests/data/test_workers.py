"""Worker processes change nothing but the time, and one that fails or dies is said to have."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from stores import store_of

from mega_scale.data import Loader, PackedDataset
from mega_scale.data.loader import ReadAhead


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_steps_come_in_order_and_any_step_can_be_next():
    feed = ReadAhead(lambda step: (step, os.getpid()), workers=2, prefetch=2, pin_memory=False)
    found = [feed.take(step) for step in range(6)]
    assert [step for step, _ in found] == list(range(6))
    assert len({process for _, process in found}) == 2 and os.getpid() not in {process for _, process in found}
    assert feed.take(100)[0] == 100 and feed.take(3)[0] == 3 and feed.take(4)[0] == 4
    feed.close()
    assert not children()


def test_batches_are_those_of_the_process_itself():
    dataset = PackedDataset(store_of(np.arange(1000)), 8)
    sizes = {"global_batch_size": 12, "micro_batch_size": 3, "rank": 1, "world_size": 2}
    plain, fed = Loader(dataset, **sizes), Loader(dataset, **sizes, workers=2)
    for step in (0, 1, 2, 7, 8, 1):
        for one, other in zip(plain.batches(step), fed.batches(step), strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    fed.close()


def test_refusal_of_a_worker_is_the_runs():
    def read(step: int) -> int:
        if step == 3:
            raise ValueError("a.jsonl, line 7: broken")
        return step

    feed = ReadAhead(read, workers=2, prefetch=2, pin_memory=False)
    assert [feed.take(step) for step in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^a.jsonl, line 7: broken$"):
        feed.take(3)


def test_error_of_a_worker_has_its_traceback():
    def read(step: int) -> int:
        raise KeyError("shard")

    with pytest.raises(KeyError, match=r"in read\n"):
        ReadAhead(read, workers=1, prefetch=2, pin_memory=False).take(0)


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_worker_that_dies_is_an_error_and_no_hang(how):
    def read(step: int) -> int:
        if step == 5:
            if how == "exits":
                os._exit(3)
            time.sleep(60)
        return step

    feed = ReadAhead(read, workers=1, prefetch=1, pin_memory=False)
    assert [feed.take(step) for step in range(5)] == list(range(5))
    if how == "killed":
        (worker,) = children()
        threading.Timer(0.5, worker.send_signal, [signal.SIGKILL]).start()
    began = time.monotonic()
    words = r"before step 5 was read: DataLoader worker .*(killed by signal: Killed|exited unexpectedly|exit code 3)"
    with pytest.raises(RuntimeError, match=words):
        feed.take(5)
    assert time.monotonic() - began < 20 and not children()


def test_workers_leave_the_runs_signals_to_the_run():
    """A launcher, or Slurm, sends them to every process; the run itself still ends its workers at once."""
    script = """
import os, signal, time
from mega_scale.data.loader import ReadAhead
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
feed = ReadAhead(lambda step: (time.sleep(0.2 if step < 8 else 600), os.getpid())[1], 2, 2, False)
workers = {feed.take(step) for step in range(2)}
for number in ("TERM", "USR1", "TERM"):
    os.system("".join(f"kill -{number} {worker};" for worker in workers))  # from another process
assert {feed.take(step) for step in range(2, 8)} == workers
began = time.monotonic()
feed.close()  # they are busy for ten minutes
assert time.monotonic() - began < 15
for worker in workers:
    assert not os.path.exists(f"/proc/{worker}"), worker
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
