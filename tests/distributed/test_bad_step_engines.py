"""A step with NaN or Inf on one rank, or one that is refused, leaves no trace on any rank, whatever the engine."""

import math

import pytest
import torch
from bad_step_study import KEYS, PROBLEMS, study
from ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad steps")
    return run_ranks(study, 2, folder, folder, timeout_s=300)


def assert_same(found, expected):
    assert found.keys() == expected.keys() and len(found) > 50
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("key", KEYS)
def test_weights_moments_and_counts_stay_as_they_are_on_every_rank(ranks, key, problem):
    for found in ranks:
        assert_same(found[key]["after"][problem], found[key]["before"])
        norm = found[key]["bad"][problem]
        # A refused step tells its norm, which is that of the step when it is taken after all.
        assert norm == found[key]["norms"][1] if problem == "refused" else not math.isfinite(norm)


@pytest.mark.parametrize("key", KEYS)
def test_what_follows_is_what_follows_without_bad_steps(ranks, key):
    for found in ranks:
        assert found[key]["norms"] == found[key]["expected"]
        assert_same(found[key]["end"], found[key]["undisturbed"])
