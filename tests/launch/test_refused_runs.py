"""What cannot run is refused: one clear line, an exit code, no rank left behind, within 20 seconds."""

import json
import resource
import shutil
import time

import psutil
import pytest
import warm
from launching import LAUNCHERS, TINY, start

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(scope="module")
def places(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("a few words")
    return {
        "text": str(text_file), "empty": str(folder / "empty.txt"), "short": str(folder / "short.txt"),
        "file": str(folder / "short.txt"), "folder": str(folder),
    }  # fmt: skip


def refused(launcher, arguments, places, words, within_s=20):
    changes = [argument.format(**places) for argument in arguments]
    began = time.monotonic()
    code, output = start(LAUNCHERS[launcher], [*TINY, f"run_dir={places['folder']}/run", *changes], timeout=90)
    seconds = time.monotonic() - began
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(lines) == 1, output[-3000:]
    assert "Traceback" not in "".join(output.splitlines()[: output.splitlines().index(lines[0]) + 1])
    missing = [word for word in words if word not in lines[0]]
    assert not missing, (missing, lines[0])
    assert seconds < within_s
    return output


def test_refused_by_an_interpreter_of_its_own_in_three_seconds_of_its_time(places):
    """A typo is answered before models and engines are imported."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Traceback" not in refused("python", ["train.stepz=10"], places, ["train.stepz", "train.steps"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "accelerate"])
def test_refused_on_all_ranks_under_a_launcher(launcher, places):
    """Two ranks with micro-batches of two cannot share ten sequences; nobody waits for the timeout of 120 seconds.

    Most of the time is the launcher's own, and longer beside other tests.
    """
    words = ["train.global_batch_size=10", "2 data-parallel ranks"]
    refused(launcher, ["train.global_batch_size=10"], places, words, within_s=60)
    left = [
        p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if "launch/pretrain.py" in (p.info["cmdline"] or [])
    ]
    assert not [command for command in left if f"run_dir={places['folder']}/run" in command]


@pytest.mark.parametrize("tool,arguments,words", [
    ("export", ["{folder}", "{folder}/out"], ["no checkpoint", "step"]),
    ("generate", ["{folder}"], ["manifest.json"]),
    ("evaluate", ["{folder}", "{text}"], ["manifest.json"]),
])  # fmt: skip
def test_other_commands_refuse_too(tool, arguments, words, places):
    code, output = start(
        ["forked", f"launch/{tool}.py"], [argument.format(**places) for argument in arguments], timeout=60
    )
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in output, output
    assert any(word in lines[0] for word in words), lines[0]


def test_resuming_with_other_data_is_refused(tmp_path, places):
    common = [*TINY, "data.source=json", f"data.path={places['text']}", f"run_dir={tmp_path}", "train.steps=4"]
    common += ["data.validation_fraction=0.2", "parallel.engine=fsdp"]
    code, output = start(LAUNCHERS["forked"], [*common, "train.steps=3"])
    assert code == 0, output
    state = json.loads((tmp_path / "checkpoints/step-00000003/trainer.json").read_text())
    assert state["layout"]["engine"] == "fsdp" and state["data"]["fingerprint"]
    for change, words in (
        ("data.sequence_length=32", ["data.sequence_length=32", "64"]),
        ("data.max_documents=39", ["fingerprint"]),
    ):
        code, output = start(LAUNCHERS["forked"], [*common, change, "--resume"])
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1, output
        assert all(word in lines[0] for word in words), lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory, places):
    """Two runs that saved after every step, of other models, and the settings of both."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*TINY, "data.source=json", f"data.path={places['text']}", "data.validation_fraction=0.2"]
    common += ["train.steps=3", "checkpoint.every=1", "checkpoint.keep=0", "parallel.engine=fsdp"]
    for name, width in (("wide", 48), ("narrow", 16)):
        code, output = start(LAUNCHERS["forked"], [*common, f"run_dir={folder / name}", f"model.hidden_size={width}"])
        assert code == 0, output
    return folder, common


def test_falling_back_to_a_checkpoint_of_another_model_is_refused_in_one_line_on_all_ranks(tmp_path, runs):
    """Only the hash of the newest one's state is wrong, which the ranks find out together."""
    folder, common = runs
    shutil.copytree(folder / "wide", tmp_path / "run")
    for name in ("step-00000001", "step-00000002"):
        shutil.rmtree(tmp_path / "run/checkpoints" / name)
    part = tmp_path / "run/checkpoints/step-00000003/state/part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    arguments = [*common, f"run_dir={tmp_path / 'run'}", "--resume", "model.hidden_size=48", "train.steps=4"]
    for older, word in ((None, "none of the 1 checkpoints"), ("step-00000002", "model.hidden_size=48 (there: 16)")):
        if older is not None:
            shutil.copytree(folder / "narrow/checkpoints" / older, tmp_path / "run/checkpoints" / older)
        code, output = start(LAUNCHERS["two forked"], arguments)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert code == 2 and "Traceback" not in output and len(errors) == 1 and word in errors[0], output
        assert older is None or older in errors[0]


@pytest.mark.parametrize("what,word", [("text", "different text"), ("checkpoint", "different checkpoints")])
def test_ranks_that_do_not_mean_the_same_run_are_refused_in_one_line(tmp_path, runs, what, word):
    """As on machines whose home folders differ."""
    folder, common = runs
    texts = [json.dumps({"text": f"{number} is a number of many words"}) for number in range(900)]
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}/text.jsonl").write_text("\n".join(texts[rank * (what == "text") :]))
        shutil.copytree(folder / "narrow", tmp_path / f"{rank}/run")
    changes = {"text": ["data.path=~/text.jsonl"], "checkpoint": ["--resume=~/run", "model.hidden_size=16"]}[what]
    port = warm.free_port()
    tasks = [warm.variables(rank, 2, port) | {"HOME": str(tmp_path / f"{rank}")} for rank in range(2)]
    arguments = [*common, f"run_dir={tmp_path / 'new'}", *changes, "train.steps=4"]
    code, output = warm.run_script("launch/pretrain.py", arguments, 0, 60, tasks=tasks)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in output and len(errors) == 1 and word in errors[0], output
    assert not list((tmp_path / "new").glob("checkpoints/step-*"))
