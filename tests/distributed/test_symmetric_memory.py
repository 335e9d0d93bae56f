"""Whether collectives of tp travel beside products: what ranks find out together, and what a run says of it."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import run_ranks

from mega_scale.parallel import ParallelConfig, World, symmetric_memory
from mega_scale.parallel.mesh import MeshShape
from mega_scale.parallel.world import _overlapping, join_axes

pytestmark = pytest.mark.distributed
CONFIG = ParallelConfig(engine="fsdp", tp=2, device="cpu", timeout_s=60)
PEERS = "mega_scale.parallel.symmetric_memory.cuda.can_device_access_peer"
NO_PROBLEM = patch.object(ParallelConfig, "overlap_problem", lambda self: None)


def study() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with World.start(CONFIG) as world:
        found["cpu"] = world.waits, world.axes["tp"].overlaps
        group = join_axes(MeshShape(1, 1, 1, 2), world.rank, 60)["tp"].group
        own = torch.device("cpu", world.rank)
        with patch(PEERS, lambda a, b: True):
            found["none"] = symmetric_memory.unreachable(group, own)
            found["one number"] = symmetric_memory.unreachable(group, torch.device("cpu", 0))
        with patch(PEERS, lambda a, b: world.rank == 0):
            found["one rank"] = symmetric_memory.unreachable(group, own)
        axis = world.axes["tp"]
        for name, reason, wanted in (
            ("works", "", None),
            ("fails", "no", None),
            ("refused", "no", True),
            ("off", "", False),
        ):
            with NO_PROBLEM, patch.object(symmetric_memory, "unreachable", lambda *_, reason=reason: reason):
                try:
                    chosen, waits = _overlapping(axis, replace(CONFIG, tp_overlap=wanted), own)
                    found[name] = chosen.overlaps, waits
                except ValueError as error:
                    found[name] = str(error)
    return found


def test_ranks_agree_on_whether_they_reach_each_other(tmp_path):
    first, second = run_ranks(study, 2, tmp_path)
    for rank in (first, second):
        assert rank["cpu"] == ("symmetric memory needs NVIDIA GPUs, use them", False)
        assert rank["none"].startswith("PyTorch has no symmetric memory here (")
        assert rank["one number"].startswith("ranks number their GPUs [0, 0]")
        assert rank["works"] == (True, "") and rank["fails"] == (False, "no")
        assert rank["refused"] == "parallel.tp_overlap=True is not possible: no, or remove parallel.tp_overlap"
        assert rank["off"] == (False, "parallel.tp_overlap=false")
    assert first["one rank"].startswith("the GPUs of another rank cannot")
    assert second["one rank"].startswith("GPU 1 cannot read the memory of GPU 0")
