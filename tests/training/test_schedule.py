"""The learning rate over a run, as a function of the step alone."""

import itertools
import math

import pytest

from mega_scale.training.schedule import ScheduleConfig, learning_rate

BASE, TOTAL = 1e-3, 110


def _rate(step: int, **settings) -> float:
    return learning_rate(step, ScheduleConfig(**settings), BASE, TOTAL)


def test_rise_is_linear_and_ends_at_the_base_rate():
    rates = [_rate(step, warmup_steps=10, warmup_init_lr=1e-4) for step in range(10)]
    assert rates[0] == pytest.approx(1e-4 + 9e-4 / 10)  # the first update is not spent at the initial rate
    steps = [after - before for before, after in itertools.pairwise(rates)]
    assert steps == pytest.approx([9e-5] * 9)
    assert rates[-1] == pytest.approx(BASE)


def test_a_rise_below_one_is_a_share_of_the_run():
    assert [_rate(step, warmup_steps=0.1) for step in range(TOTAL)] == [
        _rate(step, warmup_steps=11) for step in range(TOTAL)
    ]
    assert [ScheduleConfig(warmup_steps=0.3).warmup(steps) for steps in (1, 6, 200)] == [0, 1, 60]
    assert [ScheduleConfig(warmup_steps=whole).warmup(1000) for whole in (0, 1, 60, 60.0)] == [0, 1, 60, 60]


def test_no_rise_starts_at_the_base_rate():
    assert _rate(0) == BASE


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_fall_reaches_the_least_rate_at_the_end_and_stays_there(decay):
    settings = {"decay": decay, "warmup_steps": 10, "min_lr": 1e-5}
    assert _rate(10, **settings) == pytest.approx(BASE)
    assert _rate(60, **settings) == pytest.approx((BASE + 1e-5) / 2)  # halfway in either shape
    assert 1e-5 < _rate(TOTAL - 1, **settings) < 3e-5
    assert _rate(TOTAL, **settings) == _rate(10 * TOTAL, **settings) == pytest.approx(1e-5)
    rates = [_rate(step, **settings) for step in range(10, TOTAL)]
    assert rates == sorted(rates, reverse=True)


def test_shapes_follow_their_formulas():
    done = 25 / 100
    assert _rate(35, decay="linear", warmup_steps=10) == pytest.approx(BASE * (1 - done))
    assert _rate(35, decay="cosine", warmup_steps=10) == pytest.approx(BASE * (1 + math.cos(math.pi * done)) / 2)


def test_constant_stays_at_the_base_rate():
    assert {_rate(step, decay="constant", warmup_steps=10, min_lr=1e-5) for step in range(10, 2 * TOTAL)} == {BASE}


def test_a_rise_as_long_as_the_run_never_falls():
    assert _rate(TOTAL - 1, warmup_steps=TOTAL) == pytest.approx(BASE)


@pytest.mark.parametrize(
    ("step", "settings", "named"), [(-1, {}, "-1"), (0, {"decay": "exponential"}, "schedule.decay 'exponential'")]
)
def test_refusals_name_the_value(step, settings, named):
    with pytest.raises(ValueError, match=named):
        _rate(step, **settings)
