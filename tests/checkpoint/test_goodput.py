"""The share of time that lasts, and the interval between saves: against a simulation of failures, and at limits."""

import math
import random
from itertools import pairwise

import pytest

from mega_scale.checkpoint import goodput
from mega_scale.checkpoint.goodput import Costs, Storage, daly, estimate, report, row, table, young


def simulated(progress_s, costs, mtbf_s, failures, seed=0):
    """Goodput of a run, followed event by event until it has failed so often."""
    draw = random.Random(seed).expovariate
    now = lasting = 0.0
    for _ in range(failures):
        fails = now + draw(1 / mtbf_s)
        saves = (fails - now) // (progress_s + costs.stall_s)  # whole ones before the failure
        ended = now + saves * (progress_s + costs.stall_s)
        while saves and ended + costs.lag_s > fails:  # not complete yet
            saves, ended = saves - 1, ended - progress_s - costs.stall_s
        lasting += saves * progress_s
        now = fails
        while (again := draw(1 / mtbf_s)) < costs.restart_s:  # starting again fails, too
            now += again
        now += costs.restart_s
        # The next failure is as far away as ever: the process has no memory.
    return lasting / now


@pytest.mark.parametrize(
    ("mtbf_s", "costs", "every"),
    [
        (10_000.0, Costs(2.0, 2.0, 300.0), None), (3_000.0, Costs(20.0, 20.0, 600.0), None),
        (10_000.0, Costs(1.0, 90.0, 240.0), None), (10_000.0, Costs(5.0, 5.0, 0.0), 3_000),
        (500.0, Costs(40.0, 40.0, 200.0), 30),
    ],
)  # fmt: skip
def test_the_formula_is_what_a_simulation_finds(mtbf_s, costs, every):
    found = row(1, 1.0, costs, gpu_mtbf_h=mtbf_s / 3600, every=every)
    assert simulated(float(found.every), costs, mtbf_s, 20_000) == pytest.approx(found.goodput, abs=0.006)
    assert found.goodput + found.saving + found.restarting + found.repeating == pytest.approx(1)


@pytest.mark.parametrize(("stall_s", "mtbf_s"), [(1.0, 10_000.0), (30.0, 10_000.0), (300.0, 3_000.0)])
def test_daly_s_interval_is_the_best_and_young_s_near_it(stall_s, mtbf_s):
    costs, best = Costs(stall_s, stall_s, 100.0), daly(stall_s, mtbf_s)

    def share(progress_s):
        return progress_s / goodput.wall_s(progress_s, costs, mtbf_s)

    searched = max((share(best * factor / 100), factor) for factor in range(20, 400))
    assert share(best) == pytest.approx(searched[0], rel=1e-3)
    assert share(best) >= share(young(stall_s, mtbf_s)) >= 0.98 * share(best)


def test_limits():
    assert daly(1e-9, 1e6) == pytest.approx(young(1e-9, 1e6), rel=1e-3)
    assert daly(50.0, 20.0) == 20.0  # a save takes longer than two failures are apart
    costs = Costs(1.0, 1.0, 60.0)
    rare = row(8, 1.0, costs, gpu_mtbf_h=1e12)
    assert rare.goodput > 0.99999 and rare.failures_a_day < 1e-6
    hopeless = row(8, 1.0, Costs(1.0, 1.0, 1e6), gpu_mtbf_h=0.01)
    assert hopeless.goodput == 0 and hopeless.restarting == 1
    never = row(8, 1.0, Costs(0.0, 0.0, 0.0))  # saves for nothing, at every step: half a step is lost to a failure
    assert never.every == 1 and never.goodput == pytest.approx(1, abs=1e-6)
    assert row(8, 10.0, Costs(0.1, 95.1, 60.0), gpu_mtbf_h=1.0).every >= 10  # not before the last one is complete
    assert row(8, 1.0, costs, every=123).every == 123


def test_more_gpus_fail_more_often_and_measured_times_win():
    rows = table(7_100_000_000, 5.0)
    assert [each.gpus for each in rows] == list(goodput.GPUS)
    assert all(first.goodput > second.goodput for first, second in pairwise(rows[1:]))
    assert rows[-1].mtbf_s == pytest.approx(54 * 86_400 / 419)
    measured = table(7_100_000_000, 5.0, (1024,), stall_s=2.0, write_s=30.0, restart_s=200.0)[0]
    assert measured.costs == Costs(2.0, 30.0, 200.0)
    assert math.isclose(measured.young_s, math.sqrt(4.0 * measured.mtbf_s))
    faster = table(7_100_000_000, 5.0, (1024,), storage=Storage(system_bytes_s=1e12, host_bytes_s=1e11))[0]
    assert faster.costs.write_s < rows[3].costs.write_s and faster.goodput > rows[3].goodput
    assert estimate(10**9, 8).stall_s == pytest.approx(12e9 / 8 / 20e9)
    text = report(rows, 5.0)
    assert "checkpoint.every" in text and len(text.splitlines()) == len(rows) + 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parameters": 0}, "parameters=0"), ({"step_s": 0.0}, r"step_s=0\.0"), ({"gpus": (8, 0)}, "gpus=0"),
        ({"stall_s": -1.0}, r"stall_s=-1\.0"), ({"gpu_mtbf_h": math.nan}, "gpu_mtbf_h=nan"), ({"every": 0}, "every=0"),
        ({"restart_s": math.nan}, "restart_s=nan"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        table(**({"parameters": 10**9, "step_s": 1.0} | changes))
