"""The process group: collectives, a rank that fails, and what the environment has to say."""

import os
import subprocess
import sys
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailedError, run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from mega_scale.parallel import ParallelConfig, Placement, World, layout_changes, placement, world
from mega_scale.parallel.mesh import MeshShape
from mega_scale.parallel.world import join_axes

# One rank of as many on this machine.
THREADS = """
import sys
import torch
from mega_scale.parallel.world import share_cores
share_cores(int(sys.argv[1]))
print("threads", torch.get_num_threads())
"""
MESSAGE = {"prompt": "naïve", "steps": [1, 2.5, None], "stop": False}


def collectives() -> dict[str, Any]:
    with World.start(ParallelConfig(timeout_s=60)) as world:
        mine = torch.tensor([world.rank + 1.0, 10.0], dtype=torch.float64)
        found = {
            "rank": world.rank,
            "size": world.size,
            "device": str(world.device),
            "sum": world.sum(mine),
            "mine": mine,
            "all": world.all_agree(True),
            "some": world.all_agree(world.rank == 0),
            "none": world.all_agree(False),
            "message": world.broadcast(MESSAGE if world.rank == 0 else None),
            "empty": world.broadcast("" if world.rank == 0 else "x"),
        }
        world.barrier()
    return found


@pytest.mark.parametrize(
    ("shape", "calls"),
    [
        (MeshShape(1, 1024, 1, 1), 0),
        (MeshShape(1, 64, 16, 1), 1),
        (MeshShape(1, 128, 1, 8), 2),
        (MeshShape(4, 16, 2, 8), 4),
        (MeshShape(1024, 1, 1, 1), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [0, 700, 1023])
def test_a_rank_makes_its_own_groups_only(shape, calls, rank, monkeypatch):
    """One call an axis, and none where nobody shares it, at any number of ranks."""
    made = []
    new_group = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda *args, **options: made.append(options) or new_group(*args, **options))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=shape.size)
    try:
        axes = join_axes(shape, rank, 1234)
        assert len(made) == calls and all(options["timeout"] == timedelta(seconds=1234) for options in made)
        places = [dict(zip(shape._fields, place, strict=True)) for place in product(*map(range, shape))]
        for name, along in {
            "dp_replicate": ["dp_replicate"],
            "fsdp": ["dp_shard", "sp"],
            "sp": ["sp"],
            "tp": ["tp"],
        }.items():
            fixed = {axis: index for axis, index in places[rank].items() if axis not in along}
            ranks = [other for other, place in enumerate(places) if place.items() >= fixed.items()]
            assert (axes[name].rank, axes[name].size) == (ranks.index(rank), len(ranks))
            if len(ranks) > 1:
                assert dist.get_process_group_ranks(axes[name].group) == ranks
    finally:
        dist.destroy_process_group()


def timeouts() -> dict[str, float]:
    with World.start(ParallelConfig(timeout_s=77, dp_replicate=2, tp=2)) as world:
        groups = {name: axis.group for name, axis in world.axes.items() if axis.group is not None}
        return {
            name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            for name, group in groups.items()
        }


@pytest.mark.distributed
def test_the_timeout_holds_in_every_group(tmp_path):
    for found in run_ranks(timeouts, 4, tmp_path, timeout_s=120):
        assert found == dict.fromkeys(("dp_replicate", "fsdp", "tp"), 77)


CORES = len(os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.parametrize("ranks, given, most", [
    (1, "", CORES), (2, "", max(1, CORES // 2)), (1000, "", 1), (2, str(CORES), CORES),
])  # fmt: skip
def test_ranks_of_a_machine_share_its_cores_unless_told_otherwise(ranks, given, most):
    environment = {**os.environ, "OMP_NUM_THREADS": given}
    command = [sys.executable, "-c", THREADS, str(ranks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    threads = int(done.stdout.split("threads ")[1])
    # Alone it is PyTorch's choice, which may leave out the second thread of a core.
    assert threads == most or (ranks == 1 and 1 <= threads <= most)


@pytest.mark.distributed
def test_collectives_of_two_ranks(tmp_path):
    found = run_ranks(collectives, 2, tmp_path, timeout_s=120)
    assert [each["rank"] for each in found] == [0, 1]
    for rank, each in enumerate(found):
        assert each["size"] == 2
        assert each["sum"].tolist() == [3.0, 20.0]
        assert each["mine"].tolist() == [rank + 1.0, 10.0]
        assert (each["all"], each["some"], each["none"]) == (True, False, False)
        assert each["message"] == MESSAGE
        assert each["empty"] == ""


@pytest.mark.distributed
def test_one_process_is_a_world_of_its_own(tmp_path):
    [found] = run_ranks(collectives, 1, tmp_path, timeout_s=120, launched=False)
    assert (found["rank"], found["size"], found["some"]) == (0, 1, True)
    assert found["sum"].tolist() == [1.0, 10.0]
    assert found["message"] == MESSAGE


def one_fails() -> None:
    with World.start(ParallelConfig(timeout_s=600)) as world:
        world.barrier()
        if world.rank == 1:
            raise RuntimeError("the disk is full")
        world.barrier()


@pytest.mark.distributed
def test_a_failing_rank_does_not_leave_the_other_waiting(tmp_path):
    with pytest.raises(RankFailedError) as failure:
        run_ranks(one_fails, 2, tmp_path, timeout_s=120)
    assert "the disk is full" in failure.value.reports[1]
    assert failure.value.reports[0] == "exit code 75"


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("given", [None, "3"])
def test_nccl_leaves_the_end_of_a_process_to_the_monitor_unless_told_otherwise(no_launcher, given):
    name, joined = "TORCH_NCCL_ASYNC_ERROR_HANDLING", []

    def join(backend, **options):
        joined.append((backend, os.environ[name]))
        raise RuntimeError

    no_launcher.setenv(name, given or "0")
    if given is None:
        no_launcher.delenv(name)
    no_launcher.setattr(world, "_device", lambda *given: torch.device("cuda", 0))
    no_launcher.setattr(torch.cuda, "set_device", lambda device: None)
    no_launcher.setattr(dist, "init_process_group", join)
    with pytest.raises(RuntimeError):
        World.start(ParallelConfig())
    assert joined == [("nccl", given or "0")]


def test_placement_without_launcher(no_launcher):
    # accelerate sets these two even when it starts a single process
    no_launcher.setenv("MASTER_ADDR", "127.0.0.1")
    no_launcher.setenv("MASTER_PORT", "29500")
    assert placement() == Placement(0, 1, 0, 1)


def test_placement_of_a_launcher(no_launcher):
    for name, value in {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        no_launcher.setenv(name, value)
    assert placement() == Placement(5, 8, 1, local_size=8)
    no_launcher.setenv("LOCAL_SIZE", "4")  # deepspeed
    assert placement() == Placement(5, 8, 1, local_size=4)
    no_launcher.delenv("LOCAL_SIZE")
    no_launcher.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun, accelerate
    assert placement() == Placement(5, 8, 1, local_size=2)


def test_placement_of_half_a_launcher(no_launcher):
    no_launcher.setenv("RANK", "0")
    no_launcher.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing"):
        placement()


def test_a_checkpoint_of_another_layout_is_told_apart():
    saved = ParallelConfig(engine="deepspeed", zero_stage=3).layout(2)
    axes = {"dp_replicate": 1, "dp_shard": 2, "sp": 1, "tp": 1}
    assert saved == {"engine": "deepspeed", "zero_stage": 3, "world_size": 2, **axes}
    assert layout_changes(saved, ParallelConfig(engine="deepspeed", dp_shard=2).layout(2)) == ""
    other = layout_changes(saved, ParallelConfig(engine="fsdp", tp=2).layout(4))
    assert other == "parallel.engine deepspeed -> fsdp, processes 2 -> 4, parallel.tp 1 -> 2"
