"""A rank that makes no progress: all ranks say where they stand, one line names it, and all end."""

import ctypes
import time

import pytest
from test_monitor import HOST, run

from mega_scale.process import PEER_LOST
from mega_scale.training.stopping import Watchdog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TIMEOUT_S = 20.0  # a beat of the monitor is 0.5 s
HANG_S = 2.0


def watched(world):
    return Watchdog(world, HANG_S, lambda reason: print(f"at the end: {reason}", file=open(2, "w", closefd=False)))


def one_sleeps(world):
    with watched(world) as watchdog:
        for step in range(1, 4):
            watchdog.beat("waiting for data", step)
            if world.rank == 1 and step == 2:
                time.sleep(60)
            watchdog.beat("computing")
            world.barrier()


def test_the_rank_that_is_behind_is_named_and_all_print_their_stacks(tmp_path):
    ends = run(tmp_path, one_sleeps, timeout_s=TIMEOUT_S)
    for rank, end in ends.items():
        assert end.code == PEER_LOST
        assert f"rank 1 ({HOST}) hangs: no progress for 2 s in step 2, waiting for data; the others wait" in end.line
        assert end.errors.count("makes no progress") == 1
        where = "waiting for data" if rank == 1 else "computing"
        assert f"mega_scale | rank {rank} makes no progress: step 2, {where}, for" in end.errors
        assert "in one_sleeps" in end.errors and "in _talk" in end.errors  # main thread, and others
        assert "at the end: rank 1" in end.errors
        assert end.seconds < 2 * TIMEOUT_S  # its start is in it


def one_holds_the_lock(world):
    with watched(world) as watchdog:
        watchdog.beat("waiting for data", 1)
        if world.rank == 2:
            ctypes.PyDLL(None).sleep(12)  # keeps the interpreter's lock
        watchdog.beat("computing")
        world.barrier()


def test_a_rank_that_cannot_answer_is_named_and_prints_its_stacks_all_the_same(tmp_path):
    ends = run(tmp_path, one_holds_the_lock, timeout_s=TIMEOUT_S)
    for rank in (0, 1):
        assert ends[rank].code == PEER_LOST
        assert f"rank 2 ({HOST}) gave no sign of life when asked" in ends[rank].line
        assert "makes no progress: step 1, computing" in ends[rank].errors
    assert "Timeout (0:00:01" in ends[2].errors and "in one_holds_the_lock" in ends[2].errors


def all_sleep(world):
    with watched(world) as watchdog:
        watchdog.beat("saving", 7)
        time.sleep(60)


def test_ranks_that_all_hang_at_one_place_are_all_named(tmp_path):
    for end in run(tmp_path, all_sleep, timeout_s=TIMEOUT_S).values():
        assert f"ranks 0, 1, 2 ({HOST}) hang: no progress for 2 s in step 7, saving; the stacks" in end.line


def all_beat(world):
    with watched(world) as watchdog:
        for _ in range(8):
            watchdog.beat("computing")
            time.sleep(0.75)
            world.barrier()
    time.sleep(3)  # nobody looks any more


def test_ranks_that_beat_are_left_alone(tmp_path):
    for end in run(tmp_path, all_beat, timeout_s=TIMEOUT_S).values():
        assert (end.code, end.errors) == (0, "")
