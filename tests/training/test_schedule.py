"""The learning rate by step: how it rises, stays and falls, and what a resumed run says of it."""

import itertools
import math
from dataclasses import replace

import pytest

from mega_scale.config import RunConfig
from mega_scale.training.config import OptimizerConfig, Schedule, ScheduleConfig, TrainConfig, schedule_changes

BASE, TOTAL = 1e-3, 110


def _run(schedule: ScheduleConfig, lr: float, steps: int) -> RunConfig:
    return RunConfig(optimizer=OptimizerConfig(lr=lr), schedule=schedule, train=TrainConfig(steps=steps))


def _rate(step: int, **settings) -> float:
    return Schedule(_run(ScheduleConfig(**settings), BASE, TOTAL)).lr(step)


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

    def risen(warmup_steps, steps):
        schedule = ScheduleConfig("constant", warmup_steps)
        return next(step for step in range(steps) if Schedule(_run(schedule, 1.0, steps)).lr(step) == 1.0)

    assert [risen(0.3, steps) for steps in (1, 6, 200)] == [0, 0, 59]
    assert [risen(whole, 1000) for whole in (0, 1, 60, 60.0)] == [0, 0, 59, 59]


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


# Warmup, stable, decay


def test_wsd_stays_at_the_base_rate_until_its_fall():
    settings = {"decay": "wsd", "warmup_steps": 10, "decay_steps": 20, "min_lr": 1e-5}
    assert _rate(4, **settings) == pytest.approx(BASE / 2)
    assert {_rate(step, **settings) for step in range(10, TOTAL - 20 + 1)} == {BASE}
    rates = [_rate(step, **settings) for step in range(TOTAL - 20, TOTAL + 1)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
    assert rates[-1] == _rate(2 * TOTAL, **settings) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("shape", "left"),
    [("linear", 0.75), ("sqrt", 0.5), ("cosine", (1 + math.cos(math.pi / 4)) / 2)],
)
@pytest.mark.parametrize("length", [20, 20 / TOTAL])
def test_wsd_falls_in_the_shape_and_length_that_are_asked_for(shape, left, length):
    settings = {"decay": "wsd", "decay_steps": length, "decay_shape": shape, "min_lr": 1e-4}
    assert _rate(TOTAL - 15, **settings) == pytest.approx(1e-4 + (BASE - 1e-4) * left)


def test_the_stable_part_does_not_depend_on_the_length_of_the_run():
    schedule = ScheduleConfig("wsd", warmup_steps=7, decay_steps=10)
    short, long = (Schedule(_run(schedule, BASE, steps)) for steps in (50, 500))
    assert [short.lr(step) for step in range(41)] == [long.lr(step) for step in range(41)]
    assert short.stable_step == 40 and long.stable_step == 490
    for other in ({"decay_steps": 0}, {"decay": "cosine"}, {"decay_steps": 50, "warmup_steps": 0}):
        assert Schedule(_run(replace(schedule, **other), BASE, 50)).stable_step is None


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"decay_steps": -1}, "decay_steps"),
        ({"decay_steps": 1.5}, "decay_steps"),
        ({"decay_steps": 101}, "decay_steps"),
        ({"decay_steps": 60, "warmup_steps": 50}, "decay_steps"),
        ({"decay_steps": 0.6, "warmup_steps": 0.5}, "decay_steps"),
        ({"decay_shape": "steep"}, "decay_shape"),
    ],
)
def test_a_fall_that_does_not_fit_is_refused(settings, key):
    with pytest.raises(ValueError, match=rf"schedule\.{key}=.* is not possible: .*"):
        ScheduleConfig("wsd", **settings).validate(BASE, 100)
    ScheduleConfig("wsd", decay_steps=60, warmup_steps=40).validate(BASE, 100)


def test_a_resume_says_what_other_keys_do_to_the_rate():
    before = _run(ScheduleConfig("cosine"), BASE, 100)
    after = replace(before, train=TrainConfig(steps=200))
    said = schedule_changes(after, before, 50)
    assert said.startswith("the cosine fall now ends at step 200 (was 100); the learning rate of step 51 is ")
    # Before the first update the rates are the same, but not those that follow.
    assert schedule_changes(after, before, 0) == "the cosine fall now ends at step 200 (was 100)"
    assert schedule_changes(before, before, 50) == ""
    stable = [_run(ScheduleConfig("wsd", decay_steps=10), BASE, steps) for steps in (100, 200)]
    assert schedule_changes(*stable, 50) == ""
    rate = BASE * (1 - math.sqrt(0.5))
    assert schedule_changes(*stable, 95) == f"the learning rate of step 96 is {rate:.4g} (was {BASE:.4g})"
