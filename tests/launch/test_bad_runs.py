"""Runs with bad steps: counted, reported with rows and ranks, ended after too many, taken back; both engines."""

import json

import pytest
from faults import ENGINES, STOPPED, assert_same_steps, faulty, saved, status, text
from launching import metrics

from mega_scale.process import DIVERGED

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(params=ENGINES, ids=["fsdp", "deepspeed"])
def engine(request, text_file):
    """A launcher, and settings of the run."""
    launcher, name = request.param
    changes = [
        *text(text_file),
        "train.steps=10",
        "checkpoint.every=2",
        "checkpoint.keep=0",
        f"parallel.engine={name}",
        "train.eval_batches=1",
    ]
    return launcher, [*changes, "train.micro_batch_size=2", "data.validation_fraction=0"]


def nan(*steps, rank=1, **more):
    return {"at": "forward", "rank": rank, "do": "nan", "steps": list(steps), **more}


def trainer(run_dir, step):
    return json.loads((run_dir / f"checkpoints/step-{step:08d}/trainer.json").read_text())


def test_bad_steps_are_left_out_counted_and_named(tmp_path, engine):
    launcher, changes = engine
    if launcher != "deepspeed":  # rows are those that were read, not what a schedule cuts them to
        changes = [*changes, "data.length_schedule=[[0, 32], [5, 64]]"]
    # The second micro-batch of rank 1 only.
    code, output = faulty("two forked", tmp_path, [nan(3, times=1), nan(6, 7)], *changes)
    assert code == 0, output
    assert "step 4 | bad step 1, not taken: the loss is nan | rows 24 to 31: rank 1, rows 26 to 27" in output
    assert "| bad steps 3 |" in output
    rows = metrics(tmp_path, "bad_step")
    assert list(rows) == [4, 7, 8] and rows[7]["rows"] == [48, 56] and rows[7]["loss"] is None
    assert rows[7]["where"] == ["rank 1, rows 50 to 51", "rank 1, rows 54 to 55"]
    train = metrics(tmp_path)
    assert [train[step]["bad_steps"] for step in range(1, 11)] == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert train[9]["loss"] == pytest.approx(train[6]["loss"], abs=0.5)
    assert trainer(tmp_path, 10)["bad_steps"]["total"] == 3
    assert saved(tmp_path) == [2, 6, 10], "none while the last step was bad"
    assert status(tmp_path)["state"] == "finished"


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tmp_path, engine):
    launcher, changes = engine
    if launcher == "torchrun":  # ends with 1 whatever its ranks end with
        launcher = "two forked"
    code, output = faulty(launcher, tmp_path, [nan(3), nan(5, 6, 7, 8, rank=0)], *changes, "bad_steps.in_a_row=3")
    assert code == DIVERGED, output
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "3 bad steps in a row up to step 8: the loss is nan" in line
    assert str(tmp_path / "checkpoints/step-00000002") in line
    assert saved(tmp_path) == [2]
    assert status(tmp_path)["state"] == "failed" and "3 bad steps in a row" in status(tmp_path)["reason"]


def test_a_run_that_goes_back_leaves_out_rows_and_resumes_as_if_uninterrupted(tmp_path, engine):
    _, changes = engine
    changes += [
        "bad_steps.in_a_row=2",
        "bad_steps.rollbacks=1",
        "bad_steps.spike_deviations=50",
        "bad_steps.spike_window=3",
    ]
    poison = [nan(5, 6)]
    code, output = faulty("two forked", tmp_path / "whole", poison, *changes)
    assert code == 0, output
    assert "went back to step 4, and leave out rows 40 to 55 (1 of 1 rollbacks)" in output
    found = trainer(tmp_path / "whole", 10)
    assert found["bad_steps"]["skipped"] == [[5, 7]] and found["data"]["rows"] == 96
    assert found["bad_steps"]["total"] == 2 and len(found["bad_steps"]["losses"]) == 3

    # The same, interrupted before it goes back, and after.
    stop = {"at": "data", "rank": 1, "do": "SIGTERM", "times": 1}
    for step, stopped in ((5, 5), (9, 7)):
        code, output = faulty(
            "two forked", tmp_path / "parts", [*poison, {**stop, "steps": [step]}], *changes, "--resume=auto"
        )
        assert code == STOPPED["two forked"] and status(tmp_path / "parts")["step"] == stopped, output
    code, output = faulty("two forked", tmp_path / "parts", poison, *changes, "--resume=auto")
    assert code == 0, output
    # It went back to the checkpoint of step 5, which the whole run did twice, then with two bad steps behind it.
    assert_same_steps(tmp_path / "parts", tmp_path / "whole", [*range(1, 5), *range(6, 11)])
    first, second = metrics(tmp_path / "parts")[5], metrics(tmp_path / "whole")[5]
    assert (first["bad_steps"], second["bad_steps"]) == (0, 2)
    assert all(first[key] == second[key] for key in ("loss", "grad_norm", "lr", "tokens"))
    assert trainer(tmp_path / "parts", 10) == found


def test_rollbacks_have_an_end(tmp_path, engine):
    _, changes = engine
    changes += ["bad_steps.in_a_row=2", "bad_steps.rollbacks=1"]
    code, output = faulty("two forked", tmp_path, [nan(*range(5, 20))], *changes)
    assert code != 0 and output.count("went back to step 4") == 1
    assert "2 bad steps in a row up to step 7" in status(tmp_path)["reason"]
