"""Durations, the clock, who may ask a run to stop, and how ranks agree; no ranks are started."""

import json
import os
import signal
import time

import pytest
import torch

from mega_scale.process import DIVERGED, PEER_LOST, STOPPED
from mega_scale.training.config import TrainConfig, seconds_of
from mega_scale.training.stopping import RunStatus, Stopping


def test_exit_codes_are_those_that_the_readme_lists():
    assert (STOPPED, PEER_LOST, DIVERGED) == (85, 75, 65)


@pytest.mark.parametrize(
    "text,seconds",
    [(90, 90), ("90", 90), ("1:30", 90), ("3:50:00", 13800), ("100:00", 6000), ("1-00:00:10", 86410), ("0:00:01", 1)],
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "3:60:00", "1:2:3:4", "-5", -5, 0, "0:00", "1.5", "1-2", "1-2:3", "٣", "1:-2", ":", "1:"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"train\.max_time=.* is no duration"):
        seconds_of(text)


def test_only_signals_that_may_ask_are_taken():
    TrainConfig(stop_signals=["SIGTERM", "SIGUSR1", "SIGINT"]).validate(100)
    TrainConfig(stop_signals=[]).validate(100)
    for name in ("SIGKILL", "SIGSEGV", "SIGCHLD", "TERM", "15"):
        with pytest.raises(ValueError, match=name):
            TrainConfig(stop_signals=[name]).validate(100)


def test_the_clock_leaves_time_for_a_step_and_a_save():
    now = time.time()
    stopping = Stopping(None, Asked(None), 100, since=now - 60)
    stopping.step_s = 5
    assert not stopping.time_over() and not stopping.wanted()  # 60 + 1.2 (5 + 10) + 2
    stopping.save_s = 30
    assert stopping.time_over() and stopping.wanted()  # 60 + 1.2 (5 + 30) + 2
    stopping.save_s, stopping.step_s = 1, 25
    assert not stopping.time_over()
    stopping.step_s = 32
    assert stopping.time_over()
    assert not Stopping(None, Asked(None), 3600).wanted() and Stopping(None, Asked(None), 1).wanted()
    assert not Stopping(None, Asked(None)).time_over()


class Asked:
    """Signals of which one came, or none."""

    def __init__(self, asked):
        self.asked = asked


class OneRank:
    """Rank 1 of two, where the other one says what it is told to."""

    def __init__(self, other):
        self.other = other

    def sum(self, value):
        return value + self.other.any()

    def all_gather(self, value):
        return torch.stack([self.other, value])


def test_ranks_stop_when_any_of_them_wants_to_and_say_who():
    quiet, asked, late = torch.tensor([0, 0]), torch.tensor([signal.SIGUSR1, 0]), torch.tensor([0, 1])
    assert not Stopping(OneRank(quiet), Asked(None)).agreed()
    for other, own, reason in (
        (asked, None, "SIGUSR1 on rank 0"),
        (quiet, "SIGTERM", "SIGTERM on rank 1"),
        (asked, "SIGUSR1", "SIGUSR1 on all ranks"),
        (late, None, "train.max_time is nearly over"),
    ):
        stopping = Stopping(OneRank(other), Asked(own))
        assert stopping.wanted() == (own is not None)
        assert stopping.agreed()
        assert stopping.reason() == reason
        assert stopping.agreed(0)  # and it stays so, without another question


def test_the_status_is_replaced_as_a_whole_and_by_the_first_rank_only(tmp_path):
    RunStatus(tmp_path, 1).write("failed", 3, "no")
    assert not list(tmp_path.iterdir())
    status = RunStatus(tmp_path, 0)
    status.write("running", 0)
    inode = (tmp_path / "status.json").stat().st_ino
    status.write("stopped", 7, "SIGTERM\non rank 1")
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": "stopped", "step": 7, "reason": "SIGTERM on rank 1",
    }  # fmt: skip
    assert (tmp_path / "status.json").stat().st_ino != inode and os.listdir(tmp_path) == ["status.json"]


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"stop_signals": ["SIGKILL"]}, "SIGKILL"),
        ({"max_time": "1:75"}, "train.max_time='1:75'"),
        ({"hang_timeout_s": 76}, r"train.hang_timeout_s=76 is not possible: give at most 75.* parallel.timeout_s=100"),
        ({"hang_timeout_s": -2}, r"train.hang_timeout_s=-2"),
        ({"hang_timeout_s": float("nan")}, r"train.hang_timeout_s=nan"),
        ({"slow_rank_factor": 0.5}, "train.slow_rank_factor=0.5"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**changes).validate(100)


def test_the_hang_timeout_follows_the_timeout_of_the_ranks():
    assert TrainConfig().hang_timeout(100) == 50 and TrainConfig(hang_timeout_s=0).hang_timeout(100) == 0
