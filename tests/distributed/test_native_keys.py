"""Native keys of DeepSpeed that move numbers: each run is that of one process, and checkpoints hold what they say."""

from pathlib import Path
from typing import Any

import continued_study
import pytest
import state_folder
import tiny_run
import torch
from continued_study import NATIVE, STEPS
from ranks import run_ranks

from mega_scale.parallel import ParallelConfig, World
from mega_scale.parallel.config import KEYS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("native-keys")


@pytest.fixture(scope="module")
def alone(folder):
    [found] = run_ranks(continued_study.native_alone, 1, folder / "alone", folder, launched=False)
    return found


@pytest.fixture(scope="module")
def found(folder, alone):
    return run_ranks(continued_study.native_keys, 2, folder / "ranks", folder)


@pytest.mark.parametrize("name", NATIVE)
def test_trains_as_one_process_does(alone, found, name):
    assert len(alone["first"][0]) + len(alone["more"][0]) == STEPS[1]
    for rank in found:
        for part, expected in (("first", "first"), ("more", "more"), ("resumed", "more")):
            for numbers, those in zip(rank[name][part], alone[expected], strict=True):
                assert numbers == pytest.approx(those, rel=1e-5), part


@pytest.mark.parametrize("name", NATIVE)
def test_checkpoints_hold_each_parameter_under_its_name(folder, found, name):
    for own, when in (("start", "start"), ("loaded", "cut")):
        one, other = state_folder.canonical(folder / name / own), state_folder.canonical(folder / when)
        assert state_folder.differing(one, other) == []
    expected, end = (state_folder.canonical(place / "end") for place in (folder, folder / name))
    for key, tensor in expected.items():
        torch.testing.assert_close(end[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_every_key_that_is_passed_on_took_part():
    passed = {key.split(".")[1] for key in KEYS if key.startswith("zero_optimization.")}
    taken = {key for _, keys in NATIVE.values() for key in keys}
    taken |= {f"stage3_{key}" for key in taken}
    # Weights are offloaded by the newer name in PLACES below; quantised gradients are refused.
    assert passed - taken == {"offload_param", "zero_quantized_gradients"}


def test_numbers_that_lie_elsewhere_than_deepspeed_says_are_refused_at_the_start(tmp_path):
    for said in run_ranks(continued_study.shuffled, 2, tmp_path):
        assert said.keys() == {1, 2, 3}
        assert all("keeps other numbers than the model's for" in words for words in said.values())


# State that DeepSpeed keeps in host memory is saved and loaded as any other is.

PLACES: dict[int, dict[str, Any]] = {
    1: {"offload_optimizer": {"device": "cpu"}},
    2: {"offload_optimizer": {"device": "cpu"}},
    3: {
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
    },
}


def offloaded(folder: Path) -> dict[int, tuple[Any, Any]]:
    found = {}
    with World.start(ParallelConfig(timeout_s=100)) as world:
        for stage, zero in PLACES.items():
            settings = {"engine": "deepspeed", "zero_stage": stage, "ds_config": {"zero_optimization": zero}}
            engine = tiny_run.make_engine(world, settings)
            tiny_run.train(engine, world, range(STEPS[0]))
            state_folder.save(engine, folder / str(stage), world)
            straight = tiny_run.train(engine, world, range(STEPS[0], tiny_run.STEPS))
            engine.close()
            engine = tiny_run.make_engine(world, settings)
            state_folder.load(engine, folder / str(stage), world)
            found[stage] = straight, tiny_run.train(engine, world, range(STEPS[0], tiny_run.STEPS))
            engine.close()
    return found


def test_offloaded_state_resumes_bit_for_bit(tmp_path):
    for rank in run_ranks(offloaded, 2, tmp_path / "ranks", tmp_path / "states"):
        for stage in PLACES:
            straight, resumed = rank[stage]
            assert resumed == straight, stage
