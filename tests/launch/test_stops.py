"""A run that is asked to stop, by a signal on one rank or by the clock, saves, ends with a known code, and goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import warm
from faults import (
    ENGINES,
    STOPPED,
    assert_same_steps,
    command_of,
    faulty,
    listens,
    saved,
    status,
    text,
    undisturbed,
    until_step,
)
from launching import ROOT, TINY, _popen, metrics, start

pytestmark = [pytest.mark.launch, pytest.mark.slow]

STEPS = 8
COMMON = [f"train.steps={STEPS}", "checkpoint.every=4", "train.eval_every=4", "train.sample_every=4"]


@pytest.fixture(scope="module", params=ENGINES[:1], ids=["fsdp"])
def engine(request, tmp_path_factory, text_file):
    """Launcher, settings of the run, and the folder of one that nobody disturbed."""
    launcher, name = request.param
    changes = [*text(text_file), *COMMON, f"parallel.engine={name}"]
    whole = tmp_path_factory.mktemp("whole")
    undisturbed("two forked", whole, *changes)
    assert status(whole) == {"state": "finished", "step": STEPS, "reason": ""}
    return launcher, changes, whole


def at(place, rank=1, do="SIGTERM", **more):
    return {"at": place, "rank": rank, "do": do, "times": 1, **more}


PHASES = {  # the fault, and the step at which the run has to have stopped
    "start-up": (at("import", do="SIGUSR1"), 0),
    "data": (at("data", steps=[2]), 2),
    "step": (at("forward", steps=[2], do="SIGUSR1"), 3),
    "evaluation": (at("evaluate", rank=0), 4),
    "generation": (at("token", do="SIGUSR1"), 4),
    "save": (at("save", rank=0), 4),
}


# What neither steps nor saves does not depend on the engine.
@pytest.mark.parametrize(
    "engine,phase",
    [(ENGINES[0], phase) for phase in PHASES] + [(ENGINES[1], phase) for phase in ("step", "save")],
    indirect=["engine"],
    ids=[*PHASES, "deepspeed-step", "deepspeed-save"],
)
def test_a_signal_on_one_rank_stops_all_and_the_run_goes_on_as_if_nothing_had_been(tmp_path, engine, phase):
    launcher, changes, whole = engine
    fault, step = PHASES[phase]
    if phase not in ("start-up", "step"):  # what the launcher makes of it, these two show
        launcher = "two forked"
    code, output = faulty(launcher, tmp_path, [fault], *changes)
    assert code == STOPPED[launcher], output
    found = status(tmp_path)
    assert (found["state"], found["step"]) == ("stopped", step)
    assert found["reason"] == f"{fault['do']} on rank {fault['rank']}"
    assert saved(tmp_path) == [step], "one save, and no more"
    assert output.count("| saved ") == 1 and 'launch/pretrain.py", line' not in output
    if phase in ("evaluation", "generation"):
        assert (4 in metrics(tmp_path, "validation")) == (phase == "generation")
        assert "sample:" not in output
    undisturbed("two forked", tmp_path, *changes, "--resume", "auto")
    assert status(tmp_path) == {"state": "finished", "step": STEPS, "reason": ""}
    assert_same_steps(tmp_path, whole, range(1, STEPS + 1))
    assert metrics(tmp_path, "validation")[STEPS] == metrics(whole, "validation")[STEPS]


INTERRUPTED = {  # where Ctrl-C comes, to all ranks, and once more from the launcher; and the step that is saved
    "data": (at("data", steps=[2]), 2),
    "step": (at("forward", steps=[2]), 3),
    "evaluation": (at("evaluate"), 4),
    "generation": (at("token"), 4),
    "save": (at("save"), 4),
}


@pytest.mark.parametrize("phase", INTERRUPTED)
def test_an_interrupt_of_all_ranks_saves_and_stops(tmp_path, engine, phase):
    _, changes, _ = engine
    fault, step = INTERRUPTED[phase]
    code, output = faulty("two forked", tmp_path, [fault | {"rank": "all", "do": "SIGINT", "twice": 2}], *changes)
    assert code == STOPPED["two forked"] and "Traceback" not in output, output
    assert status(tmp_path) == {"state": "stopped", "step": step, "reason": "SIGINT on all ranks"}
    assert saved(tmp_path) == [step] and output.count("SIGINT: the run saves") == 1


def test_signals_that_come_again_and_in_a_save_change_nothing(tmp_path, engine):
    _, changes, _ = engine
    faults = [
        at("data", steps=[1], twice=3),
        at("data", rank=0, steps=[1], do="SIGUSR1"),
        at("save", rank="all", twice=2),
    ]
    code, output = faulty("two forked", tmp_path, faults, *changes)
    assert code == STOPPED["two forked"], output
    assert status(tmp_path) == {"state": "stopped", "step": 1, "reason": "SIGUSR1 on rank 0 and SIGTERM on rank 1"}
    assert saved(tmp_path) == [1] and output.count("| saved ") == 1


def test_a_resumed_run_that_is_stopped_at_once_saves_nothing(tmp_path, engine):
    launcher, changes, _ = engine
    code, output = faulty("two forked", tmp_path, [at("data", steps=[2])], *changes)
    assert code == STOPPED["two forked"] and saved(tmp_path) == [2], output
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    code, output = faulty(launcher, tmp_path, [at("import")], *changes, "--resume=auto")
    assert code == STOPPED[launcher] and "| saved " not in output, output
    assert status(tmp_path)["state"] == "stopped" and status(tmp_path)["step"] == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")} == before


def test_a_run_stopped_in_its_last_evaluation_evaluates_when_it_goes_on(tmp_path, engine):
    _, changes, whole = engine
    code, output = faulty("two forked", tmp_path, [at("evaluate", steps=[STEPS - 1])], *changes)
    assert code == STOPPED["two forked"] and saved(tmp_path) == [4, STEPS], output
    undisturbed("two forked", tmp_path, *changes, "--resume=auto")
    assert metrics(tmp_path, "validation")[STEPS] == metrics(whole, "validation")[STEPS]
    assert status(tmp_path)["state"] == "finished"


def ranks_of(process, count=2, deadline=60):
    """The processes of the ranks that a launcher started, once there are as many."""
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        family = psutil.Process(process.pid).children(recursive=True)
        found = [child for child in family if _is_rank(child)]
        found = [child for child in found if child.ppid() not in {other.pid for other in found}]  # no loader workers
        if len(found) >= count:
            return found
        time.sleep(0.05)
    pytest.fail("the ranks did not start")


def _is_rank(process):
    try:
        line = process.cmdline()
        return any("pretrain.py" in word for word in line[1:4]) and "RANK" in process.environ()
    except psutil.Error:
        return False


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.alone), "accelerate"])
def test_sigterm_to_the_launcher_with_data_workers_ends_in_a_checkpoint(tmp_path, text_file, launcher):
    """deepspeed sends it to loader workers too, torchrun to ranks only."""
    engine = "deepspeed" if launcher == "deepspeed" else "fsdp"
    changes = [*text(text_file), "train.steps=100000", f"parallel.engine={engine}", "data.workers=2"]
    process = _popen(["env", "FAULTS=[]", *command_of(launcher)], [*TINY, f"run_dir={tmp_path}", *changes])
    try:
        assert until_step(5, process)
        # The deepspeed command itself passes nothing on: the process that it starts for this machine does.
        [ranks_parent] = {rank.ppid() for rank in ranks_of(process)}
        os.kill(ranks_parent, signal.SIGTERM)
        began = time.monotonic()
        rest = process.stdout.read()
        process.wait(timeout=60)
        assert time.monotonic() - began < 25, rest
    finally:
        process.kill()
    assert status(tmp_path)["state"] == "stopped", rest
    assert saved(tmp_path) == [status(tmp_path)["step"]]
    assert "DataLoader worker" not in rest


def test_a_signal_to_every_process_of_a_job_ends_in_a_checkpoint(tmp_path, text_file):
    """As Slurm sends it."""
    changes = [*text(text_file), "train.steps=100000", "parallel.engine=fsdp", "data.workers=2"]
    process = _popen(["env", "FAULTS=[]", *command_of("torchrun")], [*TINY, f"run_dir={tmp_path}", *changes])
    try:
        assert until_step(5, process)
        for rank in ranks_of(process):
            for one in [rank, *rank.children(recursive=True)]:
                one.send_signal(signal.SIGUSR1)
        rest = process.stdout.read()
        process.wait(timeout=60)
    finally:
        process.kill()
    assert status(tmp_path)["state"] == "stopped", rest
    assert "DataLoader worker" not in rest and not [
        p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])
    ]


@pytest.mark.parametrize(
    "launcher,again",
    [("torchrun", False), ("torchrun", True), pytest.param("deepspeed", False, marks=pytest.mark.alone)],
)
def test_an_interrupt_at_a_terminal_saves_and_the_next_one_ends_at_once(tmp_path, text_file, launcher, again):
    """The launcher and all that it started get it, loader workers too; torchrun passes it on once more."""
    engine = "deepspeed" if launcher == "deepspeed" else "fsdp"
    changes = [*text(text_file), "train.steps=100000", f"parallel.engine={engine}", "data.workers=1"]
    faults = [at("save", rank=0, do="sleep", seconds=60)] if again else []
    process = _popen(
        ["env", f"FAULTS={json.dumps(faults)}", *command_of(launcher)], [*TINY, f"run_dir={tmp_path}", *changes]
    )
    try:
        assert until_step(5, process)
        os.killpg(process.pid, signal.SIGINT)
        if again:
            assert any("SIGINT: the run saves" in line for line in process.stdout)
            time.sleep(3)
            os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        rest = process.stdout.read()
        process.wait(timeout=60)
        assert time.monotonic() - began < 25, rest
    finally:
        process.kill()
    if again:
        assert rest.count("SIGINT again: the run ends at once") == 1 and not saved(tmp_path), rest
    else:
        assert status(tmp_path)["state"] == "stopped" and saved(tmp_path) == [status(tmp_path)["step"]], rest
    assert 'launch/pretrain.py", line' not in rest and "DataLoader worker" not in rest, rest


def test_an_interrupt_ends_other_commands_in_one_line_and_what_is_half_done_is_not_whole(tmp_path, text_file):
    run_dir, made, output = tmp_path / "run", tmp_path / "made", tmp_path / "output"
    undisturbed("forked", run_dir, *text(text_file), "parallel.engine=fsdp", "train.steps=3")
    (tmp_path / "text.jsonl").write_text(text_file.read_text() * 12)
    prepare = [str(made), "--processes=2", "--shard-mb=1", *text(tmp_path / "text.jsonl"), "data.tokenizer=byte"]
    for tool, arguments, begun in (
        ("generate", [str(run_dir), "--max-new-tokens=1000000"], lambda: "text by" in output.read_text()),
        ("prepare", prepare, lambda: list(made.glob("0*.json"))),
    ):
        output.write_text("")
        process = warm.CONTEXT.Process(
            target=warm._script, args=(f"launch/{tool}.py", arguments, str(output), warm.variables(0, 0, 0))
        )
        process.start()
        try:
            while not begun():
                assert process.is_alive(), output.read_text()
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGINT)
            process.join(20)
        finally:
            process.kill()  # if it is still there, it would compute for hours
        assert process.exitcode == 130 and output.read_text().count("error: ") == 1, output.read_text()
        assert "error: interrupted" in output.read_text() and "Traceback" not in output.read_text()
    assert not (made / "manifest.json").exists()
    code, printed = start(["forked", "launch/prepare.py"], prepare)
    assert code == 0 and (made / "manifest.json").exists(), printed


def test_python_alone_ends_with_85_and_an_unlisted_signal_does_what_it_did(tmp_path, text_file):
    changes = [*text(text_file), "parallel.engine=fsdp", "train.steps=5"]
    code, output = faulty(
        "forked",
        tmp_path / "one",
        [at("data", rank=0, steps=[3], do="SIGINT")],
        *changes,
        'train.stop_signals=["SIGINT"]',
    )
    assert code == 85 and status(tmp_path / "one")["step"] == 3, output
    listed = ["train.stop_signals=SIGUSR1"]
    for launcher, place in (("forked", at("data", rank=0, steps=[3])), ("python", at("import", rank=0))):
        code, output = faulty(launcher, tmp_path / place["at"], [place], *changes, *listed)
        assert code == -signal.SIGTERM, output


@pytest.mark.alone
def test_max_time_stops_before_the_limit(tmp_path, text_file):
    """Of a process alone, whose start is that of the test; a launcher's own start does not count."""
    began = time.monotonic()
    changes = [*text(text_file), "parallel.engine=fsdp", "train.steps=100000", "train.log_every=100"]
    code, output = faulty("python", tmp_path, [], *changes, "--max-time=0:25")
    assert code == 85 and time.monotonic() - began < 25, output
    assert status(tmp_path)["reason"] == "train.max_time is nearly over"
    [step] = saved(tmp_path)
    assert step == status(tmp_path)["step"] > 0
    rest = json.loads((tmp_path / f"checkpoints/step-{step:08d}/trainer.json").read_text())
    assert rest["step"] == step


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_the_first_moment_is_remembered(tmp_path, text_file, name):
    """Sent from outside, as soon as the program has begun: long before its imports are done."""
    command = [
        sys.executable,
        "launch/pretrain.py",
        *TINY,
        *text(text_file),
        f"run_dir={tmp_path}",
        "parallel.engine=fsdp",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not listens(process.pid):
        time.sleep(0.002)
    process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85, output
    assert saved(tmp_path) == [0] and status(tmp_path)["reason"] == f"{name} on rank 0"
