"""Which ranks are slow, by their own figures."""

import pytest
import torch

from mega_scale.training import metrics
from mega_scale.training.metrics import SlowRanks, probe, slower


@pytest.mark.parametrize(
    "seconds,at_least,found",
    [
        ([1.0, 1.0, 2.1, 1.9], 0.0, [2]),
        ([1.0, 3.0], 0.0, [1]),  # of two, the lower one is the median
        ([1.0, 3.0], 3.5, []),
        ([5.0, 5.0, 5.0], 0.0, []),
        ([0.0, 0.0, 0.4], 0.1, [2]),
    ],
)
def test_slower_than_a_multiple_of_the_median(seconds, at_least, found):
    assert slower(seconds, 2.0, at_least) == found


def test_the_probe_takes_time_but_little():
    assert 0 < probe(torch.device("cpu")) < 0.5


class Ranks:
    """Three ranks, of which this is the first; the others' figures are given."""

    device = torch.device("cpu")

    def __init__(self, *others):
        self.others = others

    def all_gather(self, value):
        return torch.stack([value, *(torch.tensor(other) for other in self.others)])


def test_a_rank_is_named_when_it_is_slow_twice(monkeypatch):
    monkeypatch.setattr(metrics, "probe", lambda device: 0.001)
    world = Ranks([0.3, 0.001, 1.0], [0.0, 0.004, 1.0])
    slow = SlowRanks(world, 2.0)
    assert slow.report(0.01, 1.0) == []
    assert slow.report(0.01, 1.0) == [
        "rank 1 is slow: it waits for data for 300 ms, the median is 10 ms (a step)",
        "rank 2 is slow: it computes for 4 ms, the median is 1 ms (a fixed product)",
    ]
    world.others = ([0.0, 0.001, 1.0], [0.0, 0.004, 1.0])
    assert [line.split(":")[0] for line in slow.report(0.01, 1.0)] == ["rank 2 is slow"]
