"""A rank that hangs, or that is slow, in a run by the real launchers."""

import re

import pytest
from faults import ENGINES, faulty, status, text
from launching import start

pytestmark = [pytest.mark.launch, pytest.mark.slow]

WATCHED = ["train.steps=8", "train.hang_timeout_s=10", "parallel.timeout_s=60"]


@pytest.mark.parametrize(
    "launcher,engine,timeout_s",
    [(*ENGINES[0], 10), (*ENGINES[1], 30)],  # DeepSpeed's first steps take seconds
)
def test_a_rank_that_hangs_is_named_and_both_ranks_print_their_stacks(tmp_path, text_file, launcher, engine, timeout_s):
    fault = {"at": "data", "rank": 1, "steps": [3], "do": "sleep"}
    changes = [*text(text_file), *WATCHED, f"parallel.engine={engine}", "checkpoint.every=2"]
    changes += [f"train.hang_timeout_s={timeout_s}"]
    code, output = faulty(launcher, tmp_path, [fault], *changes)
    assert code in (1, 75), output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert lines and all("rank 1 (" in line and "hangs: no progress for" in line for line in lines), lines
    assert "in step 4, waiting for data; the others wait" in lines[0]
    for rank in (0, 1):
        assert f"rank {rank} makes no progress: step 4" in output
    assert re.search(
        r'^rank 1 \|   File ".*faulty_pretrain\.py", line \d+ in batches$', output, re.MULTILINE
    )  # it sleeps
    assert re.search(r"^rank 0 \|   File .* in all_reduce$", output, re.MULTILINE)  # it waits
    found = status(tmp_path)
    assert (found["state"], found["step"]) == ("failed", 4) and "rank 1 (" in found["reason"]


def test_a_rank_that_keeps_the_interpreters_lock_is_named_and_prints_its_stacks(tmp_path, text_file):
    """The launcher ends it: it cannot do that itself."""
    fault = {"at": "data", "rank": 1, "steps": [3], "do": "lock"}
    changes = [*text(text_file), *WATCHED, "parallel.engine=fsdp"]
    code, output = faulty("torchrun", tmp_path, [fault], *changes)
    assert code == 1, output
    assert "rank 1 (" in output and "gave no sign of life when asked" in output
    assert "Timeout (0:00:09" in output and " in batches" in output


@pytest.mark.parametrize("do,code", [("sleep", 75), ("lock", 1)])
def test_a_process_alone_that_hangs_ends(tmp_path, text_file, do, code):
    fault = {"at": "evaluate", "rank": 0, "do": do}
    changes = [*text(text_file), *WATCHED, "parallel.engine=fsdp", "train.eval_every=2", "train.hang_timeout_s=8"]
    found, output = faulty("forked", tmp_path, [fault], *changes)
    assert found == code, output
    assert " in forward" in output and " in evaluate" in output
    if do == "sleep":
        assert re.search(r"error: the run hangs: no progress for (8|9|1\d) s in step 2, evaluating", output), output
        assert status(tmp_path)["state"] == "failed"


def test_work_between_steps_is_progress(tmp_path, text_file):
    """Evaluation batches and tokens, each shorter than the timeout, together longer."""
    faults = [{"at": at, "rank": 0, "do": "sleep", "seconds": 1.0, "times": 8} for at in ("evaluate", "token")]
    changes = [
        *text(text_file),
        "train.steps=1",
        "schedule.warmup_steps=0",
        "train.hang_timeout_s=6",
        "parallel.engine=fsdp",
        "train.sample_every=1",
    ]
    code, output = faulty("forked", tmp_path, faults, *changes, "train.eval_batches=8", "train.micro_batch_size=8")
    assert code == 0, output


@pytest.mark.alone
def test_a_slow_rank_is_named(tmp_path, text_file):
    fault = {"at": "data", "rank": 1, "do": "sleep", "seconds": 0.3}
    changes = [*text(text_file), "train.steps=4", "parallel.engine=fsdp"]
    code, output = faulty("two forked", tmp_path, [fault], *changes)
    assert code == 0, output
    assert "step 2 | rank 1 is slow: it waits for data for 30" in output
    assert "rank 0 is slow: it waits" not in output


@pytest.mark.parametrize(
    "change,words",
    [
        ("train.hang_timeout_s=100", "train.hang_timeout_s=100"),
        ("train.slow_rank_factor=1", "train.slow_rank_factor=1"),
        ("train.max_time=soon", "train.max_time='soon'"),
        ("--max-time=0", "train.max_time=0"),
        ("train.stop_signals=SIGKILL", "SIGKILL"),
        ("bad_steps.rollbacks=2", "checkpoint.every=0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(tmp_path, text_file, change, words):
    from launching import TINY  # noqa: PLC0415

    code, output = start(["forked", "launch/pretrain.py"], [*TINY, *text(text_file), f"run_dir={tmp_path}", change])
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and words in line, output
