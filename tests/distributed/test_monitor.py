"""A rank that dies, fails or never comes: the others end with a line that names it. One that works or leaves is not."""

import os
import re
import signal
import socket
import threading
import time
from typing import NamedTuple

import pytest
import torch.distributed as dist
import warm

from mega_scale.parallel import ParallelConfig, World
from mega_scale.parallel.monitor import tell_refusal
from mega_scale.process import PEER_LOST

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TIMEOUT_S = 8.0  # a beat is 0.2 s
HOST = socket.gethostname()


class Ended(NamedTuple):
    """How one rank ended: exit code, seconds since its start, and what it wrote on standard error."""

    code: int
    seconds: float
    errors: str

    @property
    def line(self):
        """The monitor's line, of which there must be exactly one."""
        [line] = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        return line


def run(folder, work, size=3, *, started=None, timeout_s=TIMEOUT_S, deadline=40.0, port=None):
    """Run `work(world)` on the ranks that are started, as under a launcher; returns how each ended."""
    warm.start_server()
    port, began = port or warm.free_port(), time.monotonic()
    ranks = list(range(size)) if started is None else started
    processes = {
        rank: warm.CONTEXT.Process(target=_rank, args=(work, rank, size, port, folder, timeout_s), daemon=True)
        for rank in ranks
    }
    for process in processes.values():
        process.start()
    ends = {}
    while len(ends) < len(processes) and time.monotonic() < began + deadline:
        for rank, process in processes.items():
            if rank not in ends and not process.is_alive():
                ends[rank] = time.monotonic() - began
        time.sleep(0.02)
    late = [rank for rank in ranks if rank not in ends]
    for process in processes.values():
        process.kill()
        process.join()
    texts = {rank: (folder / f"stderr-{rank}").read_text() for rank in ranks}
    assert not late, f"ranks {late} did not end: {texts}"
    return {rank: Ended(processes[rank].exitcode, ends[rank], texts[rank]) for rank in ranks}


def _rank(work, rank, size, port, folder, timeout_s):
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    warm.set_variables(warm.variables(rank, size, port))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    with World.start(ParallelConfig(timeout_s=timeout_s)) as world:
        work(world)


def wait_in_a_collective(world):
    world.barrier()
    if world.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def work_elsewhere(world):
    world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_rank_killed_while_the_others_wait_for_it_is_named_within_seconds(tmp_path):
    ends = run(tmp_path, wait_in_a_collective, timeout_s=40)
    assert ends[1].code == -signal.SIGKILL
    for rank in (0, 2):
        assert ends[rank].code == PEER_LOST
        assert f"rank {rank} ({HOST}) ends" in ends[rank].line
        assert f"rank 1 ({HOST}) gave no sign of life" in ends[rank].line
        assert ends[rank].seconds < 25  # of 40


def test_a_rank_killed_while_nobody_waits_for_it_is_named_within_the_timeout(tmp_path):
    ends = run(tmp_path, work_elsewhere)
    for rank in (0, 2):
        assert ends[rank].code == PEER_LOST
        assert f"rank 1 ({HOST}) gave no sign of life" in ends[rank].line
        assert ends[rank].seconds < TIMEOUT_S + 4  # and its start


def wait_for_ever(world):
    world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1800)


@pytest.mark.slow
def test_a_rank_killed_under_a_backend_that_never_raises_is_named_within_a_minute(tmp_path):
    """As NCCL's: the main thread waits for a device, and the timeout of collectives is half an hour."""
    ends = run(tmp_path, wait_for_ever, timeout_s=1800, deadline=90)
    for rank in (0, 2):
        assert ends[rank].code == PEER_LOST
        assert f"rank 1 ({HOST}) gave no sign of life" in ends[rank].line
        assert ends[rank].seconds < 60


def the_first_dies_in_a_collective(world):
    world.barrier()
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def the_first_dies_elsewhere(world):
    world.barrier()
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize("work", [the_first_dies_in_a_collective, the_first_dies_elsewhere])
def test_the_death_of_the_rank_that_keeps_the_store_is_noticed(tmp_path, work):
    ends = run(tmp_path, work)
    for rank in (1, 2):
        assert ends[rank].code == PEER_LOST
        assert f"rank 0 ({HOST}), which keeps the key-value store at 127.0.0.1:" in ends[rank].line
        assert "has been lost" in ends[rank].line
        assert ends[rank].seconds < TIMEOUT_S


def two_die(world):
    world.barrier()
    if world.rank in (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def test_all_that_died_are_named(tmp_path):
    ends = run(tmp_path, two_die, 4)
    for rank in (0, 3):
        assert ends[rank].code == PEER_LOST
        assert f"ranks 1, 2 ({HOST}) gave no sign of life" in ends[rank].line


def the_disk_is_full(world, culprit):
    world.barrier()
    if world.rank == culprit:
        time.sleep(0.3)
        raise OSError("the disk\nis full")
    world.barrier()


def the_last_fails(world):
    the_disk_is_full(world, 2)


def the_first_fails(world):
    the_disk_is_full(world, 0)


@pytest.mark.parametrize("work,culprit", [(the_first_fails, 0), (the_last_fails, 2)])
def test_a_rank_that_raises_says_why_to_the_others(tmp_path, work, culprit):
    ends = run(tmp_path, work, timeout_s=40)
    assert ends[culprit].code == 1 and "OSError: the disk\nis full" in ends[culprit].errors
    for rank in {0, 1, 2} - {culprit}:
        assert ends[rank].code == PEER_LOST
        assert f"rank {culprit} ({HOST}) failed: OSError: the disk is full" in ends[rank].line
        assert "Traceback" not in ends[rank].errors
        assert ends[rank].seconds < 20


def all_fail(world):
    world.barrier()
    raise FloatingPointError(f"rank {world.rank} has loss nan")


def test_ranks_that_all_fail_end_with_their_own_error_or_that_of_another(tmp_path):
    for end in run(tmp_path, all_fail).values():
        assert end.code in (1, PEER_LOST) and "has loss nan" in end.errors


def leave_one_by_one(world):
    time.sleep(1.5 * world.rank)


def leave_in_reverse(world):
    time.sleep(1.5 * (2 - world.rank))


def the_middle_leaves_last(world):
    time.sleep(3.0 if world.rank == 1 else 0)


@pytest.mark.parametrize("work", [leave_one_by_one, leave_in_reverse, the_middle_leaves_last])
def test_ranks_may_leave_in_any_order(tmp_path, work):
    """Ranks leave 15 beats apart."""
    for end in run(tmp_path, work, timeout_s=4).values():
        assert (end.code, end.errors) == (0, "")


def one_is_busy(world):
    world.barrier()
    until = time.monotonic() + (5 if world.rank == 1 else 0)
    while time.monotonic() < until:
        sum(range(1000))
    world.barrier()


def test_a_rank_that_is_busy_is_waited_for(tmp_path):
    """For as long as collectives wait, which is the timeout; 5 s are 25 beats."""
    for end in run(tmp_path, one_is_busy).values():
        assert (end.code, end.errors) == (0, "")


def one_is_stuck(world):
    world.barrier()
    if world.rank == 1:
        time.sleep(60)
    world.barrier()


@pytest.mark.alone
def test_a_rank_that_lives_but_is_stuck_ends_when_the_collectives_of_the_others_give_up(tmp_path):
    ends = run(tmp_path, one_is_stuck, timeout_s=4)
    assert ends[1].code == PEER_LOST and ends[1].seconds < 8
    assert re.search(r"rank [02] \(.*\) failed: RuntimeError: .*Timed out", ends[1].line)
    assert {ends[0].code, ends[2].code} <= {1, PEER_LOST}


def one_is_suspended(world):
    world.barrier()
    if world.rank == 1:
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(3.0)
            os.kill(pid, signal.SIGCONT)
            os._exit(0)
        os.kill(pid, signal.SIGSTOP)
    world.barrier()


def test_a_rank_that_was_suspended_for_less_than_the_timeout_goes_on(tmp_path):
    for end in run(tmp_path, one_is_suspended).values():
        assert (end.code, end.errors) == (0, "")


def never(world):
    raise AssertionError


@pytest.mark.alone
def test_ranks_that_never_come_are_named(tmp_path):
    ends = run(tmp_path, never, 4, started=[0, 2], timeout_s=4)
    for rank in (0, 2):
        assert ends[rank].code == PEER_LOST
        assert re.search(r"of 4 ranks, ranks 1, 3 did not come to 127\.0\.0\.1:\d+", ends[rank].line)
        assert ends[rank].seconds < 8


def refused(told, port, folder):
    warm.set_variables(warm.variables(1, 2, port))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    (folder / "told").write_text(str(tell_refusal(1, "its text is\nanother", lambda: False, told)))


def test_a_refusal_of_one_rank_ends_the_others_with_its_reason(tmp_path):
    port = warm.free_port()
    alone = warm.CONTEXT.Process(target=refused, args=(30.0, port, tmp_path))
    alone.start()
    [end] = run(tmp_path, never, 2, started=[0], timeout_s=30, port=port).values()
    alone.join(40)
    assert end.code == PEER_LOST and end.seconds < 25
    assert f"rank 1 ({HOST}) was refused: its text is another" in end.line
    assert (tmp_path / "told").read_text() == "True"


def test_a_refusal_of_all_ranks_is_left_to_the_first(tmp_path):
    alone = warm.CONTEXT.Process(target=refused, args=(1.5, warm.free_port(), tmp_path))
    alone.start()
    alone.join(30)
    assert (tmp_path / "told").read_text() == "False"


@pytest.mark.alone
def test_a_store_that_cannot_be_reached_is_named(tmp_path):
    [end] = run(tmp_path, never, 2, started=[1], timeout_s=3).values()
    assert end.code == PEER_LOST and end.seconds < 6
    assert re.search(r"127\.0\.0\.1:\d+ \(MASTER_ADDR, MASTER_PORT\) cannot be reached: .*Connection refused", end.line)
    assert end.errors.count("\n") == 1


def greet_and_close(listener):
    while True:
        listener.accept()[0].close()


@pytest.mark.parametrize("answer", [None, greet_and_close])
def test_ranks_whose_port_another_program_holds_end_within_seconds_and_name_the_option(tmp_path, answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if answer is not None:
            threading.Thread(target=answer, args=(listener,), daemon=True).start()
        ends = run(tmp_path, never, 2, timeout_s=30, port=listener.getsockname()[1])
    for end in ends.values():
        assert end.code == PEER_LOST and end.seconds < 15
        assert "MASTER_PORT" in end.line and "deepspeed --master_port, torchrun --master-port" in end.line


@pytest.mark.parametrize("met", [{}, {"size": "2", "came/1": "1"}, {"size": "4"}])
def test_a_rank_does_not_join_the_store_of_another_program_or_run(tmp_path, met):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    keys = dist.PrefixStore("mega_scale/0", store)
    for name, value in met.items():
        keys.set(name, value)
    [end] = run(tmp_path, never, 2, started=[1], timeout_s=30, port=store.port).values()
    assert end.code == PEER_LOST and end.seconds < 15
    assert re.search("another (program|run).*--master_port", end.line)
    assert not keys.check(["news"]) and not keys.check(["host/1"])
