"""Real launchers on a small run: two CPU processes, real text, a minute at most."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import psutil
import pytest
import warm

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.intermediate_size=48", "model.nffn_hidden_size=40",
    "model.shared_representation_size=16", "model.ema_projection_size=4", "model.use_chunking=true",
    "model.chunk_size=16", "model.normalization_type=layernorm", "model.dropout_prob=0.1",
    "data.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=2", "train.log_every=1",
    "train.eval_every=0", "train.eval_batches=2", "train.sample_every=0", "train.sample_tokens=20",
    "optimizer.lr=0.01", "schedule.warmup_steps=3", "schedule.min_lr=0", "checkpoint.every=0", "parallel.timeout_s=120",
    "parallel.self_test=false",
]  # fmt: skip


def write_sources(path, count):
    """Real text, small: sources of Python's standard library as one jsonl file; returns its path."""
    sources = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:count]
    path.write_text("".join(json.dumps({"text": source.read_text(encoding="utf-8")}) + "\n" for source in sources))
    return path


def _popen(launcher, arguments, environment=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    # Tests that run side by side share the machine's ports.
    launcher = [str(warm.free_port()) if word == "PORT" else word for word in launcher]
    return subprocess.Popen(
        [*launcher, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def start(launcher, arguments, timeout=300, environment=None):
    """Run a command in its own process group, which is killed as a whole; returns (exit code, output).

    A launcher `["forked" or "two forked", script]` is none: one process, or two ranks, are forked from one that has
    imported everything.
    """
    if launcher[0] in RANKS:
        code, output = warm.run_script(launcher[1], arguments, RANKS[launcher[0]], timeout, environment)
        if code is None:
            pytest.fail(f"{launcher} did not end within {timeout} s:\n{output[-4000:]}")
        return code, output
    process = _popen(launcher, arguments, environment)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{launcher} did not end within {timeout} s:\n{output[-4000:]}")
    return process.returncode, output


def study(script, arguments, timeout):
    """Run a command of tests/campaigns or tests/support, which finds its own modules; returns (exit code, output)."""
    return start([sys.executable, str(script)], arguments, timeout, {"PYTHONPATH": str(ROOT / "tests/support")})


RANKS = {"forked": 0, "two forked": 2}
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "PORT", "launch/pretrain.py"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "launch/pretrain.py"],
    # --multi_gpu is how accelerate starts several processes of one machine, GPUs or not.
    "accelerate": [
        "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "PORT", "launch/pretrain.py",
    ],
    "python": ["python", "launch/pretrain.py"],
    **{name: [name, "launch/pretrain.py"] for name in RANKS},
}  # fmt: skip


def text(text_file):
    """Settings of a run on the text of `write_sources`."""
    return ["data.source=json", f"data.path={text_file}", "data.validation_fraction=0.2"]


def pretrain(launcher, run_dir, *changes, timeout=300, environment=None):
    """Train the tiny run; returns its output, and fails unless it ends well."""
    code, output = start(LAUNCHERS[launcher], [*TINY, f"run_dir={run_dir}", *changes], timeout, environment)
    assert code == 0, f"exit code {code}:\n{output[-6000:]}"
    return output


def pretrain_until(text, run_dir, *changes, timeout=300):
    """Train the tiny run on two ranks, and kill both with SIGKILL once it prints `text`."""
    arguments = [*TINY, f"run_dir={run_dir}", *changes]
    code, output = warm.run_script("launch/pretrain.py", arguments, 2, timeout, until=text)
    assert text in output and code in (None, -signal.SIGKILL), f"exit code {code}:\n{output[-6000:]}"


def _kill_all(pid):
    """Launchers give ranks sessions of their own, so a process group is not enough."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=30)


def metrics(run_dir, part="train"):
    """Rows of metrics.jsonl, by step, without the time of day."""
    rows = (json.loads(line) for line in (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if row["part"] == part and row.pop("time", True)}
