"""Native keys of DeepSpeed that move numbers: each run is that of one process, and checkpoints hold what they say."""

from pathlib import Path

import continued_study
import pytest
import state_folder
import torch
from continued_study import NATIVE, STEPS
from ranks import run_ranks

from mega_scale.parallel.deepspeed_config import KEYS

pytestmark = pytest.mark.distributed


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
    # Weights are offloaded by the newer name in test_offloaded_state.py; quantised gradients are refused.
    assert passed - taken == {"offload_param", "zero_quantized_gradients"}


def test_numbers_that_lie_elsewhere_than_deepspeed_says_are_refused_at_the_start(tmp_path):
    for said in run_ranks(continued_study.shuffled, 2, tmp_path):
        assert said.keys() == {1, 2, 3}
        assert all("keeps other numbers than the model's for" in words for words in said.values())
