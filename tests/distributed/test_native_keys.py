"""Native keys of DeepSpeed that move numbers: each run is that of one process, and checkpoints hold what they say."""

from pathlib import Path

import native_keys_study
import pytest
import state_folder
import torch
from native_keys_study import CUT, RUNS
from ranks import run_ranks

from mega_scale.parallel.deepspeed_config import KEYS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("native-keys")


@pytest.fixture(scope="module")
def alone(folder):
    [found] = run_ranks(native_keys_study.alone, 1, folder / "alone", folder, launched=False)
    return found


@pytest.fixture(scope="module")
def found(folder, alone):
    return run_ranks(native_keys_study.study, 2, folder / "ranks", folder)


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_one_process_does(alone, found, name):
    losses, norms = alone
    for rank in found:
        straight, resumed = rank[name]
        assert straight[0] == pytest.approx(losses, rel=1e-5) and straight[1] == pytest.approx(norms, rel=1e-5)
        assert resumed[0] == pytest.approx(losses[CUT:], rel=1e-5)
        assert resumed[1] == pytest.approx(norms[CUT:], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_hold_each_parameter_under_its_name(folder, found, name):
    for when in ("start", "cut"):
        one, other = (state_folder.canonical(place / when) for place in (folder / name, folder))
        assert state_folder.differing(one, other) == []
    expected, end = (state_folder.canonical(place / "end") for place in (folder, folder / name))
    for key, tensor in expected.items():
        torch.testing.assert_close(end[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_every_key_that_is_passed_on_took_part():
    passed = {key.split(".")[1] for key in KEYS if key.startswith("zero_optimization.")}
    taken = {key for _, keys in RUNS.values() for key in keys}
    taken |= {f"stage3_{key}" for key in taken}
    # Weights are offloaded by the newer name in test_offloaded_state.py; quantised gradients are refused.
    assert passed - taken == {"offload_param", "zero_quantized_gradients"}


def test_numbers_that_lie_elsewhere_than_deepspeed_says_are_refused_at_the_start(tmp_path):
    for said in run_ranks(native_keys_study.shuffled, 2, tmp_path):
        assert said.keys() == {1, 2, 3}
        assert all("keeps other numbers than the model's for" in words for words in said.values())
