"""Runs launch/pretrain.py with faults under real launchers, and reads what is left."""

import json
import re
import signal

from launching import LAUNCHERS, TINY, metrics, start

ENGINES = [("torchrun", "fsdp"), ("deepspeed", "deepspeed")]
# What a launcher makes of ranks that end with 85.
STOPPED = {"torchrun": 1, "deepspeed": 85, "python": 85, "accelerate": 1, "forked": 85, "two forked": 85}


def faulty(launcher, run_dir, faults, *changes, timeout=240):
    """Train the tiny run with faults; returns (exit code of the launcher, output)."""
    command = command_of(launcher)
    return start(command, [*TINY, f"run_dir={run_dir}", *changes], timeout, {"FAULTS": json.dumps(faults)})


def undisturbed(launcher, run_dir, *changes):
    """Train the tiny run without faults; returns its output, and fails unless it ends well."""
    code, output = faulty(launcher, run_dir, [], *changes)
    assert code == 0, output[-6000:]
    return output


def command_of(launcher):
    """The launcher's command for the faulty program."""
    return [
        "tests/support/faulty_pretrain.py" if word == "launch/pretrain.py" else word for word in LAUNCHERS[launcher]
    ]


def listens(pid):
    """Whether a process has a handler for SIGTERM, or keeps it for later."""
    with open(f"/proc/{pid}/status") as file:
        kept = [int(line.split()[1], 16) for line in file if line.startswith(("SigBlk", "SigCgt"))]
    return any(signals & 1 << signal.SIGTERM - 1 for signals in kept)


def until_step(step, process):
    """Read a run's output until it reports a step; says whether it did."""
    return any(re.match(rf"step +{step}/", line) for line in process.stdout)


def text(text_file):
    return ["data.source=json", f"data.path={text_file}", "data.validation_fraction=0.2"]


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def saved(run_dir):
    """Steps of the checkpoints of a run; nothing unfinished may lie beside them."""
    names = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    assert all(name.removeprefix("step-").isdigit() for name in names), names
    return [int(name.removeprefix("step-")) for name in names]


def assert_same_steps(run_dir, expected, steps):
    got, want = metrics(run_dir), metrics(expected)
    for step in steps:
        for key in ("loss", "grad_norm", "lr", "tokens", "bad_steps"):
            assert got[step][key] == want[step][key], (step, key)
