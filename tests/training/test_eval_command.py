"""A command beside the training: what it is given, where its figures go, and what happens where it fails or hangs."""

import json
import shlex
import sys
import time
from pathlib import Path

import pytest
from small_runs import MODEL, TINY, run

from mega_scale.training import eval_command
from mega_scale.training.eval_command import EvalCommand, figures_of, words_of

PYTHON = shlex.quote(sys.executable)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes the command of a run whose exports are a file each; its lines and figures are in `said` and `reported`."""
    launch = tmp_path / "shipped"
    launch.mkdir()
    (launch / "export.py").write_text(
        "import pathlib, sys\nif sys.argv[1].endswith('bad'): sys.exit(3)\n"
        "pathlib.Path(sys.argv[2]).mkdir()\npathlib.Path(sys.argv[2], 'weights').write_text(' '.join(sys.argv[1::2]))\n"
    )
    monkeypatch.setattr(eval_command, "shipped", lambda name: launch)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    commands = []

    def make(program: str, timeout_s: float = 60, words: str = "{model} {output} {step}") -> EvalCommand:
        path = tmp_path / "program.py"
        path.write_text(program)
        found = EvalCommand(
            f"{PYTHON} {path} {words}", timeout_s, tmp_path, None, found_held, said.append,
            lambda step, part, figures: reported.append((step, part, dict(figures))),
        )  # fmt: skip
        commands.append(found)
        return found

    said, reported, found_held = [], [], set()
    make.said, make.reported, make.held = said, reported, found_held
    yield make
    for one in commands:
        one.end("the test ends")


def wait(command: EvalCommand) -> None:
    until = time.monotonic() + 60
    while not command.poll():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_it_is_given_a_fresh_export_and_its_json_is_reported(made, tmp_path):
    program = (
        "import json, os, pathlib, sys\n"
        "assert not {'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR'} & set(os.environ)\n"
        "print('noise')\n"
        "source = pathlib.Path(sys.argv[1], 'weights').read_text()\n"
        "tasks = {'a': 0.5, 'name': source, 'nan': float('nan')}\n"
        "print(json.dumps({'tasks': tasks, 'at': int(sys.argv[3]), 'step': 1}))"
    )
    command = made(program)
    command.start(7, Path("checkpoint"), last=False)
    assert made.held == {7}  # not deleted while it is exported
    wait(command)
    assert made.reported == [(7, "eval_command", {"tasks/a": 0.5, "at": 7})] and made.held == set()
    assert made.said == ["step 7 | eval_command: tasks/a 0.5, at 7"]
    assert not (tmp_path / "eval_command" / "step-00000007" / "model").exists()


def test_it_is_given_the_average_of_the_weights_where_it_asks_for_it(made, tmp_path):
    program = (
        "import json, pathlib, sys\n"
        "found = [pathlib.Path(name, 'weights').read_text() for name in sys.argv[1:]]\n"
        "print(json.dumps({'as asked': float(found == ['checkpoint --average', 'checkpoint'])}))"
    )
    command = made(program, words="{average} {model}")
    command.start(7, Path("checkpoint"), last=False)
    wait(command)
    assert made.said == ["step 7 | eval_command: as asked 1"]
    assert {path.name for path in (tmp_path / "eval_command/step-00000007").iterdir()} == {"log.txt", "out.txt"}
    with pytest.raises(ValueError, match=r"no average of its weights, set train\.weight_average"):
        words_of(f"{PYTHON} {{average}}", averages=False)


def test_a_file_that_it_writes_comes_before_what_it_prints(made):
    program = (
        "import json, pathlib, sys\nfolder = pathlib.Path(sys.argv[2], 'model')\nfolder.mkdir(parents=True)\n"
        "found = {'results': {'piqa': {'acc,none': 0.75, 'alias': 'piqa'}}, 'n-samples': {'piqa': 10}}\n"
        "(folder / 'results_1.json').write_text(json.dumps(found))\nprint('{\"a\": 1}')"
    )
    command = made(program)
    command.start(1, Path("checkpoint"), last=False)
    wait(command)
    assert made.reported == [(1, "eval_command", {"piqa/acc,none": 0.75})]


def test_one_runs_at_a_time_and_the_last_one_waits(made):
    command = made("import sys, time\ntime.sleep(1)\nprint('{\"x\": %s}' % sys.argv[3])")
    command.start(1, Path("checkpoint"), last=False)
    command.start(2, Path("checkpoint"), last=False)
    command.start(3, Path("checkpoint"), last=True)
    wait(command)
    assert [(step, figures) for step, _, figures in made.reported] == [(1, {"x": 1}), (3, {"x": 3})]
    assert made.said[0] == "step 2 | eval_command is left out: that of step 1 still runs"


@pytest.mark.parametrize(
    ("program", "checkpoint", "said"),
    [
        ("raise SystemExit(4)", "good", "the command ended with exit code 4"),
        ("print('done')", "good", "it gave no figures"),
        ("print('{not json')", "good", "property name"),
        ("print('{\"a\": true}')", "good", "it gave no figures"),
        ("print('{}')", "bad", "the export ended with exit code 3"),
    ],
)
def test_a_failure_is_a_line(made, program, checkpoint, said):
    command = made(program)
    command.start(5, Path(checkpoint), last=False)
    wait(command)
    [line] = made.said
    assert line.startswith("step 5 | eval_command failed: ") and line.endswith("step-00000005")
    assert said in line or (said == "JSON" and "delimiter" in line) or "property name" in line
    assert not made.reported and made.held == set()


def test_one_that_takes_too_long_is_ended_with_what_it_started(made, tmp_path):
    program = (
        "import pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\ntime.sleep(60)"
    )
    command = made(program, timeout_s=4)
    began = time.monotonic()
    command.start(5, Path("checkpoint"), last=False)
    wait(command)
    assert "took longer than train.eval_command_timeout_s=4" in made.said[0] and time.monotonic() - began < 30
    assert ended(int((tmp_path / "pid").read_text()))


def ended(pid: int) -> bool:
    for _ in range(200):
        path = Path(f"/proc/{pid}/stat")
        if not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_end_of_the_run_ends_it(made):
    command = made("import time\ntime.sleep(60)")
    command.start(5, Path("checkpoint"), last=False)
    command.start(6, Path("checkpoint"), last=True)
    command.end("the run stops")
    assert command.poll() and made.said[-1].startswith("step 5 | eval_command failed: the run stops")
    command.end("again")


@pytest.mark.parametrize(
    ("command", "fragments"),
    [
        ("", ["it is empty"]),
        ("lm_eval 'open", ["quotes"]),
        (f"{PYTHON} -c 1", ["{model}"]),
        ("no-such-program {model}", ["no program no-such-program"]),
    ],
)
def test_a_command_that_cannot_run_is_refused(command, fragments):
    with pytest.raises(ValueError, match=r"train\.eval_command=") as refused:
        words_of(command)
    assert all(fragment in str(refused.value) for fragment in fragments), refused.value


def test_figures_are_the_numbers_of_nested_objects():
    assert dict(figures_of({"a": {"b": 1, "c": [1, 2], "d": None}, "e": 2.5, "f": False})) == {"a/b": 1, "e": 2.5}
    assert dict(figures_of([1, 2])) == {}


def test_a_run_waits_for_it_at_the_end(tmp_path):
    """With the real export: an evaluation of launch/evaluate.py on it finds the loss of the run's own weights."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {n} to train on"}) for n in range(100)))
    words = f"{PYTHON} launch/evaluate.py {{model}} {text} --source json --sequence-length 32 --device cpu --json"
    settings = [*TINY, *(f"model.{key}={value}" for key, value in MODEL.items()), f"data.path={text}"]
    settings += [f"train.eval_command={words}", "train.steps=3", f"run_dir={tmp_path / 'run'}", "checkpoint.every=0"]
    code, output = run(*settings)
    assert code == 0, output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [row] = [row for row in rows if row["part"] == "eval_command"]
    assert row["step"] == 3 and row["loss"] > 0 and row["tokens"] > 100
    [line] = [line for line in output.splitlines() if "eval_command" in line]
    assert f"step 3 | eval_command: loss {row['loss']:.6g}" in line
    code, output = run(*settings, "train.eval_command=gone {model}", "overwrite=true")
    assert code == 2 and "no program gone" in output
