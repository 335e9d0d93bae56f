"""What counts as a bad step, what is remembered of it, and which data a run takes after it went back."""

import json
import math
import random
import statistics
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mega_scale.parallel.mesh import MeshShape
from mega_scale.training.config import BadStepsConfig
from mega_scale.training.stopping import BadSteps, Progress, rows_of

SPIKES = BadStepsConfig(spike_deviations=3.0, spike_window=4)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_bad(loss):
    assert str(loss) in Progress(BadStepsConfig()).problem(loss)
    assert Progress(BadStepsConfig()).problem(1e30) is None


def test_a_spike_is_measured_against_the_last_good_losses_only():
    now = Progress(SPIKES)
    for loss in (9.0, 2.0, 2.2, 1.8):
        assert now.problem(1e9) is None  # too few to know
        now.count(1, loss, True)
    now.count(1, 2.0, True)  # 9.0 is forgotten
    limit = 2.0 + 3 * statistics.pstdev([2.0, 2.2, 1.8, 2.0])
    assert now.problem(limit - 1e-9) is None and now.problem(limit + 1e-9) is not None
    now.count(1, 1e9, False)
    assert now.problem(limit + 1e-9) is not None and now.bad.losses == [2.0, 2.2, 1.8, 2.0]


def test_its_state_is_json_and_the_same_to_the_bit():
    now, random_ = Progress(SPIKES), random.Random(0)
    for _ in range(7):
        now.count(1, random_.random(), True)
    now.count(1, math.nan, False)
    now.bad.skipped, now.bad.rollbacks = [[3, 5]], 1
    again = Progress.resume(SPIKES, None, json.loads(json.dumps(state_at(now.step, now.bad))))
    assert again.bad == now.bad and again.problem(0.9) == now.problem(0.9)
    assert Progress.resume(SPIKES, None, {"step": 3, "tokens": 1}).bad == BadSteps()


def test_bad_steps_in_a_row_are_those_since_the_last_good_one():
    now = Progress(BadStepsConfig())
    seen = []
    for taken in (False, True, False, False):
        now.count(1, 1.0, taken)
        seen.append(now.bad.in_a_row)
    assert seen == [1, 0, 1, 2] and now.bad.total == 3


def state_at(step, bad):
    return {"step": step, "tokens": 10 * step, "bad_steps": asdict(bad)}


def test_going_back_leaves_out_the_data_of_the_bad_steps(tmp_path):
    config = BadStepsConfig(in_a_row=3, rollbacks=2)
    now = Progress(config)
    at_5 = state_at(5, now.bad)
    now.step = 7
    for _ in range(3):  # steps 8, 9, 10
        now.count(10, math.nan, False)
    assert now.go_back(tmp_path, at_5) == [7, 10]
    assert (now.step, now.tokens, now.saved, now.folder) == (5, 50, 5, tmp_path)
    assert (now.bad.total, now.bad.in_a_row, now.bad.rollbacks) == (3, 0, 1)
    assert [now.data_step(step) for step in range(1, 10)] == [0, 1, 2, 3, 4, 5, 6, 10, 11]
    # Again, right behind them
    at_5 = state_at(5, now.bad)
    now.step = 7
    for _ in range(3):
        now.count(10, math.nan, False)
    assert now.go_back(tmp_path, at_5) == [10, 13]
    assert [now.data_step(step) for step in range(6, 10)] == [5, 6, 13, 14]


def test_a_checkpoint_between_bad_steps_keeps_what_lies_before_it(tmp_path):
    """A run that was asked to stop there saved it."""
    now = Progress(BadStepsConfig(in_a_row=3, rollbacks=1))
    now.step = 7
    now.count(10, math.nan, False)
    at_8 = state_at(8, now.bad)
    for _ in range(2):
        now.count(10, math.nan, False)
    assert now.go_back(tmp_path, at_8) == [8, 10]
    assert [now.data_step(step) for step in (8, 9, 10)] == [7, 10, 11]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 3))
def test_every_step_of_data_is_taken_once_or_left_out(gaps, length):
    """Whatever is left out, the rest keeps its order, and nothing is taken twice."""
    config = BadStepsConfig(in_a_row=length, rollbacks=99)
    now, step = Progress(config), 0
    left_out = set()
    for gap in gaps:
        start = state_at(step, now.bad)
        now.step = step + gap
        for _ in range(length):
            now.count(10, math.nan, False)
        left_out |= set(range(*now.go_back(None, start)))
        step += gap
    taken = [now.data_step(number) for number in range(1, step + 10)]
    assert taken == [number for number in range(taken[-1] + 1) if number not in left_out]


def test_rows_of_a_bad_step_are_named_by_rank_and_micro_batch():
    shares = torch.zeros(2, 3)
    shares[1, 2] = math.nan
    rows, where = rows_of(4, shares, MeshShape(1, 2, 1, 1), rows=2)
    assert rows == [48, 60] and where == ["rank 1, rows 58 to 59"]


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"in_a_row": 0}, "bad_steps.in_a_row=0"),
        ({"rollbacks": -1}, "bad_steps.rollbacks=-1"),
        ({"rollbacks": 1}, "checkpoint.every=0"),
        ({"spike_deviations": -1.0}, "bad_steps.spike_deviations=-1.0"),
        ({"spike_deviations": math.nan}, "bad_steps.spike_deviations=nan"),
        ({"spike_window": 1}, "bad_steps.spike_window=1"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        BadStepsConfig(**changes).validate(0)
