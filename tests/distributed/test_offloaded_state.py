"""State that DeepSpeed keeps in host memory is saved and loaded as any other is."""

from pathlib import Path
from typing import Any

import pytest
import state_folder
import tiny_run
from ranks import run_ranks

from mega_scale.parallel import ParallelConfig, World

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CUT = 2
PLACES: dict[int, dict[str, Any]] = {
    1: {"offload_optimizer": {"device": "cpu"}},
    2: {"offload_optimizer": {"device": "cpu"}},
    3: {
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
    },
}


def study(folder: Path) -> dict[int, tuple[Any, Any]]:
    found = {}
    with World.start(ParallelConfig(timeout_s=100)) as world:
        for stage, zero in PLACES.items():
            settings = {"engine": "deepspeed", "zero_stage": stage, "ds_config": {"zero_optimization": zero}}
            engine = tiny_run.make_engine(world, settings)
            tiny_run.train(engine, world, range(CUT))
            state_folder.save(engine, folder / str(stage), world)
            straight = tiny_run.train(engine, world, range(CUT, tiny_run.STEPS))
            engine.close()
            engine = tiny_run.make_engine(world, settings)
            state_folder.load(engine, folder / str(stage), world)
            found[stage] = straight, tiny_run.train(engine, world, range(CUT, tiny_run.STEPS))
            engine.close()
    return found


def test_offloaded_state_resumes_bit_for_bit(tmp_path):
    for rank in run_ranks(study, 2, tmp_path / "ranks", tmp_path / "states"):
        for stage in PLACES:
            straight, resumed = rank[stage]
            assert resumed == straight, stage
