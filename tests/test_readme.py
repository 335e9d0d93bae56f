"""Every command that a README prints runs, in order, in a fresh copy of the project, or a table says why not."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
import warm

from launch.benchmark.__main__ import COMMANDS, parse

ROOT = pathlib.Path(__file__).parents[1]
PRETRAIN = "launch/pretrain.py"
# So that a run takes seconds; what a line says itself comes after, and wins.
SHORT = [
    "train.steps=2", "train.eval_every=0", "train.sample_every=0", "train.global_batch_size=4",
    "train.micro_batch_size=2", "data.sequence_length=128", "parallel.self_test=false", "parallel.timeout_s=120",
]  # fmt: skip
# Lines, by their beginning, that are not run, and why.
NOT_RUN = {
    "bash .ci/run": "runs every test, this one included",
    "tensorboard --logdir": "serves until it is stopped",
    "lm_eval ": "no dependency of this project, and its tasks are downloaded",
    "python -c 'import mega_scale; from lm_eval": "no dependency of this project, and its tasks are downloaded",
    "source .venv/bin/activate": "the tests' own environment is used",
    "pip install": "the tests' own environment is used",
    "mega-scale --nproc-per-node": "tests/test_packaging.py runs it, from a wheel",
    "pytest": "runs tests, this one included",
    "python launch/plan.py --config configs/megalodon-7b.yaml": "takes a minute; tests/planner plans small models",
    "python launch/pretrain.py --rehearse": "the same",
}
# Those for several hosts or GPUs: their run is resolved and printed, and their launcher knows its options.
CLUSTER = ("deepspeed --quiet --hostfile", "torchrun --nnodes", "sbatch ", "srun ", "mpirun ", "accelerate launch")
# Those that measure for minutes: their command takes its options, and tests/launch/test_benchmark_commands.py runs it.
MEASURES = ("python launch/benchmark",)
# Those that take minutes: they start, and say what their options are.
CAMPAIGNS = ("PYTHONPATH=tests/support python tests/", "PYTHONPATH=tests/support:tests/distributed python tests/")


def printed(language):
    """Commands of the fenced blocks of every README, in order; one that goes on in further lines is one."""
    for path in sorted(ROOT.rglob("README.md")):
        if not any(part.startswith(".") or part in ("runs", "shared") for part in path.relative_to(ROOT).parts):
            for block in re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
                for line in block.replace("\\\n", " ").splitlines() if language == "bash" else [block]:
                    if line.strip() and not line.startswith("#"):
                        yield line


LINES = list(dict.fromkeys(printed("bash")))  # several READMEs may print a command


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What git has of the project, in a folder of its own, with the corpus that the README supposes."""
    folder = tmp_path_factory.mktemp("checkout")
    archive = folder / "project.zip"
    subprocess.run(["git", "archive", "-o", archive, "HEAD"], cwd=ROOT, check=True)
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    (folder / "corpus").mkdir()
    texts = [json.dumps({"text": f"def f{number}(): return {number}\n" * 40}) for number in range(400)]
    command = "import sys, pyarrow as pa; pa.CompressedOutputStream(sys.argv[1], 'zstd').write(sys.stdin.buffer.read())"
    corpus = str(folder / "corpus/part.jsonl.zst")
    subprocess.run([sys.executable, "-c", command, corpus], input="\n".join(texts).encode(), check=True)
    return folder


def run(folder, words, **variables):
    """As in a shell where the environment is activated; returns what it prints."""
    own = {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own | variables
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
    return done.stdout


def fork(folder, script, *arguments):
    """The same of a script, in a process that has imported what it needs."""
    code, output = warm.run_script(str(folder / script), arguments, 0, 300, folder=folder)
    assert code == 0, f"{script} {arguments}: exit code {code}\n{output[-3000:]}"
    return output


def shortened(line):
    """The line, with settings that make a run of it short, and a port of its own."""
    line = re.sub(r"^python3 -m venv .*? deepspeed", "deepspeed", line)
    words = shlex.split(line, comments=True)
    if PRETRAIN in words:
        place = words.index(PRETRAIN) + 1
        words[place:place] = SHORT
        option = {"deepspeed": "--master_port", "torchrun": "--master-port"}.get(words[0])
        words[1:1] = [option, str(warm.free_port())] if option else []
        if "--resume" in words:  # goes on for two steps each time
            words = [word for word in words if word != "train.steps=600"]
            words.append(f"train.steps={4 if words[0] == 'deepspeed' else 6}")
    return words


@pytest.mark.launch
@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_order(checkout):
    """A script starts as it is printed once; when it comes again, it is forked."""
    started = set()
    for line in LINES:
        if line.startswith((*NOT_RUN, *CLUSTER, *MEASURES, *CAMPAIGNS)):
            continue
        words = shortened(line)
        again = words[0] == "python" and words[1] in started
        output = fork(checkout, *words[1:]) if again else run(checkout, words)
        assert "[INFO]" not in output, f"{line}: noise of a library"
        started.update(word for word in words if word.startswith("launch/"))
    for block in printed("python"):
        (checkout / "block.py").write_text(block)
        fork(checkout, "block.py")


# A script does not find modules in the folder where it is started, as `-c` does, nor those that another one found.
HELP = """
import os, runpy, sys
from pathlib import Path
for words in map(str.split, sys.argv[1:]):
    variable, _, script, *_ = words
    before, sys.argv = list(sys.path), [script, "--help"]
    sys.path[:1] = [str(Path(script).parent), *variable.partition("=")[2].split(":")]
    try:
        runpy.run_path(script, run_name="__main__")
        sys.exit(f"{script} has no --help")
    except SystemExit as end:
        if end.code:
            raise
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "launch"]:
        del sys.modules[name]
"""


@pytest.mark.launch
@pytest.mark.slow
def test_campaigns_start_and_say_what_their_options_are(checkout):
    """One after the other in one process: what they import takes seconds."""
    lines = [line for line in LINES if line.startswith(CAMPAIGNS)]
    printed = run(checkout, [sys.executable, "-c", HELP, *lines])
    assert printed.count("usage: ") == len(lines) > 5
    for line in lines:
        options = re.findall(r" (--[a-z-]+)", line.partition("#")[0])
        assert all(option in printed for option in options), line


@pytest.mark.launch
@pytest.mark.slow
def test_commands_for_a_cluster_describe_a_run_and_use_options_that_their_launcher_has(checkout):
    helps = {}
    for line in LINES:
        if not line.startswith(CLUSTER):
            continue
        words = shlex.split(line, comments=True)
        script = next(number for number, word in enumerate(words) if word.startswith("launch/"))
        if words[0] in ("deepspeed", "torchrun", "accelerate"):
            command = words[: 2 if words[0] == "accelerate" else 1]
            known = helps.setdefault(command[0], run(checkout, [*command, "--help"]).replace("_", "-"))
            assert all(word.replace("_", "-") in known for word in words[:script] if word.startswith("--")), line
        settings = words[script + 1 :] if words[script] == PRETRAIN else words[script + 2 :]
        code, resolved = warm.run_script(PRETRAIN, [*settings, "--print-config"], 0, 60)
        assert code == 0 and "run_dir:" in resolved, resolved


def test_every_line_names_a_script_that_exists():
    for line in LINES:
        for script in re.findall(r"\b(?:launch|configs|tests)/[\w./-]+\.\w+", line):
            assert (ROOT / script).exists(), line


def test_benchmarks_have_the_options_that_are_printed():
    lines = [line for line in LINES if line.startswith(MEASURES[0])]
    assert {shlex.split(line)[2] for line in lines} == set(COMMANDS)
    for line in lines:
        assert parse(shlex.split(line)[2:]).command in line


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("script", ["benchmark", "checkpoint.py", "import_fairseq.py", "pretrain.py"])
def test_scripts_start_from_any_folder(tmp_path, script):
    assert "usage:" in run(tmp_path, [sys.executable, str(ROOT / f"launch/{script}"), "--help"])
