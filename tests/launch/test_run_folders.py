"""Two runs in one folder, one after the other or at once: the first one's work stays, whoever is killed."""

import json
import re
import signal
import time

import pytest
import warm
from faults import faulty, saved, status, text
from launching import LAUNCHERS, TINY, metrics, start

pytestmark = [pytest.mark.launch, pytest.mark.slow]

COMMON = ["train.steps=4", "checkpoint.every=2", "checkpoint.asynchronous=false"]
COMMON += ["parallel.engine=fsdp"]
OTHER = ["model.hidden_size=16", "train.steps=3"]


def content(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(run_dir, text_file, *changes, launcher="forked"):
    """The exit code, the output, and its error lines."""
    code, output = start(LAUNCHERS[launcher], [*TINY, *text(text_file), *COMMON, f"run_dir={run_dir}", *changes])
    return code, output, [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    code, output, _ = run(run_dir, text_file)
    assert code == 0, output
    return run_dir


@pytest.mark.parametrize("launcher", ["forked", "two forked"])
def test_a_second_run_in_a_folder_is_refused_on_all_ranks_and_changes_nothing(trained, text_file, launcher):
    before = content(trained)
    code, output, errors = run(trained, text_file, *OTHER, launcher=launcher)
    assert code == 2 and len(errors) == 1 and "Traceback" not in output, output
    assert all(word in errors[0] for word in (str(trained), "--resume", "--overwrite"))
    assert content(trained) == before


def background(run_dir, text_file, faults, output, *changes, ranks=0):
    """A run with faults, in processes of this one's fork server."""
    output.write_text("")
    arguments = [*TINY, *text(text_file), *COMMON, f"run_dir={run_dir}", *changes]
    port = warm.free_port()
    processes = [
        warm.CONTEXT.Process(
            target=warm._script,
            args=(
                "tests/support/faulty_pretrain.py",
                arguments,
                str(output),
                warm.variables(rank, ranks, port) | {"FAULTS": json.dumps(faults)},
            ),
        )
        for rank in range(max(ranks, 1))
    ]
    for process in processes:
        process.start()
    return processes


def await_text(output, words, seconds=60):
    deadline = time.monotonic() + seconds
    while words not in output.read_text():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)


def test_of_two_jobs_at_once_the_second_is_refused_and_a_killed_owner_is_succeeded_at_once(tmp_path, text_file):
    run_dir, output = tmp_path / "run", tmp_path / "output"
    sleep = [{"at": "data", "rank": "all", "do": "sleep", "steps": [2]}]
    first = background(run_dir, text_file, sleep, output, ranks=2)
    try:
        await_text(output, "| saved ")
        before = content(run_dir)
        for launcher, changes in (("two forked", ["--resume=auto"]), ("forked", [*OTHER, "--overwrite"])):
            code, printed, errors = run(run_dir, text_file, *changes, launcher=launcher)
            assert code == 2 and len(errors) == 1 and "Traceback" not in printed, printed
            assert re.search(rf"in use by another job \(host \S+, process {first[0].pid}, since 20", errors[0])
            assert f"delete {run_dir}/run.lock" in errors[0]
            assert content(run_dir) == before
    finally:
        for process in first:
            process.kill()
        warm.end(first, 10)
    assert status(run_dir)["state"] == "running" and (run_dir / "run.lock").exists()
    code, printed, _ = run(run_dir, text_file, "--resume=auto", launcher="two forked")
    assert code == 0 and "from step 2 of" in printed, printed
    assert not (run_dir / "run.lock").exists() and status(run_dir)["state"] == "finished"


def test_an_overwriting_run_killed_before_its_first_save_does_not_go_on_from_the_old_one(tmp_path, text_file):
    code, output, _ = run(tmp_path, text_file)
    assert code == 0 and saved(tmp_path) == [2, 4], output
    old = metrics(tmp_path)[1]["loss"]
    (tmp_path / "notes.txt").write_text("mine")
    kill = [{"at": "data", "rank": 0, "do": "SIGKILL", "steps": [1]}]
    code, output = faulty("forked", tmp_path, kill, *text(text_file), *COMMON, *OTHER, "--overwrite")
    assert code == -signal.SIGKILL and saved(tmp_path) == [], output
    code, output, _ = run(tmp_path, text_file, *OTHER, "--resume=auto")
    assert code == 0 and "from step 0 of" in output, output
    assert saved(tmp_path) == [2, 3] and list(metrics(tmp_path)) == [1, 2, 3] and metrics(tmp_path)[1]["loss"] != old
    assert (tmp_path / "notes.txt").read_text() == "mine"
    code, output, _ = run(tmp_path, text_file, *OTHER, "--resume=auto")  # again and again
    assert code == 0, output


def test_an_overwriting_run_that_cannot_begin_loses_nothing_of_the_old_one(trained, text_file):
    before = content(trained)
    for changes in (["data.sequence_length=70"], ["train.global_batch_size=9"], ["data.tokenizer=./none"]):
        code, output, errors = run(trained, text_file, "--overwrite", *changes)
        assert code == 2 and len(errors) == 1, output
        assert content(trained) == before
