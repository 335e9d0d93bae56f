"""Signals at random moments to random ranks of two, with both engines: every run has to end in a checkpoint, and soon.

    PYTHONPATH=tests/support python tests/campaigns/signal_study.py --signals 50 --json signals.json

A run trains, evaluates, generates and saves again and again, so that a random moment meets all of it. The time from the
first signal to the end of the training is compared with the longest step plus the longest save of that very run.
"""

import argparse
import collections
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import psutil
from faults import ENGINES, command_of, listens, saved, status, until_step
from launching import ROOT, TINY, _kill_all, _popen, write_sources

STEPS = 100_000
BUSY = ["train.eval_every=3", "train.sample_every=4", "checkpoint.every=5", "checkpoint.keep=2", "train.log_every=1"]
# Before the first step; how long it takes is nothing that a step or a save could bound.
START_UP = ("imports", "start-up", "testing the layout", "building the model", "starting", "loading")
# What one step, one batch of an evaluation, or one token may cost, and one save.
PIECES = ("waiting for data", "computing", "evaluating", "generating text")
# For polls between two beats, and for leaving.
SLACK_S = 1.0


def ranks_of(process):
    """The ranks that a launcher has started so far, by number."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "tests/support/faulty_pretrain.py" in child.cmdline()[1:4] and "RANK" in child.environ():
                found.setdefault(int(child.environ()["RANK"]), child)
        except psutil.Error:
            continue
    return found


def one(number, folder, text_file, rng):
    """One run with one signal or several; says how it went."""
    launcher, engine = ENGINES[number % len(ENGINES)]
    run_dir, heard = folder / f"run-{number}", folder / f"heard-{number}"
    heard.mkdir()
    command = command_of(launcher)
    changes = ["data.source=json", f"data.path={text_file}", "data.validation_fraction=0.2", f"train.steps={STEPS}"]
    changes += [*BUSY, f"parallel.engine={engine}", f"run_dir={run_dir}"]
    process = _popen(["env", "FAULTS=[]", f"HEARD={heard}", *command], [*TINY, *changes])
    try:
        while len(ranks := ranks_of(process)) < 2:
            time.sleep(0.05)
        while not all(listens(rank.pid) for rank in ranks.values()):
            time.sleep(0.01)
        # Half of the moments lie in the start, half later.
        if number % 4 < 2:
            time.sleep(rng.random() * 8)
        else:
            until_step(1, process)
            time.sleep(rng.random() * 6)
        target, name = rng.randrange(2), rng.choice(["SIGTERM", "SIGUSR1"])
        for _ in range(rng.choice([1, 1, 2, 3])):
            ranks[target].send_signal(getattr(signal, name))
            time.sleep(rng.random() * 0.3)
        output = process.stdout.read()
        process.wait(timeout=120)
    finally:
        _kill_all(process.pid)
    reports = [json.loads(path.read_text()) for path in sorted(heard.iterdir())]
    first = min((report for report in reports if report["at"]), key=lambda report: report["at"], default=None)
    if len(reports) != 2 or first is None:
        return {"number": number, "engine": engine, "good": False, "why": output[-2000:]}
    longest = {phase: max(report["longest"].get(phase, 0.0) for report in reports) for phase in (*PIECES, "saving")}
    step_s = longest["waiting for data"] + longest["computing"]
    allowed = max(step_s, longest["evaluating"], longest["generating text"]) + longest["saving"] + SLACK_S
    took = max(report["ended"] for report in reports) - first["at"]
    started = first["phase"] not in START_UP
    state = status(run_dir)
    good = state["state"] == "stopped" and saved(run_dir)[-1] == state["step"] and (not started or took <= allowed)
    return {
        "number": number, "engine": engine, "signal": name, "rank": target, "phase": first["phase"],
        "step": state["step"], "took_s": round(took, 3), "allowed_s": round(allowed, 3) if started else None,
        "good": good,
    }  # fmt: skip


def study(numbers, folder, text_file, seed=0):
    """Runs of some numbers, which choose engine and half, one after the other; what `one` says of each."""
    rng = random.Random(seed)
    found = []
    for number in numbers:
        found.append(one(number, folder, text_file, rng))
        print(json.dumps(found[-1]), flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text_file = write_sources(Path(folder) / "text.jsonl", 40)
        os.chdir(ROOT)
        found = study(range(arguments.signals), Path(folder), text_file, arguments.seed)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    phases = collections.Counter(one.get("phase") for one in found)
    print(f"{sum(one['good'] for one in found)} of {len(found)} good; phases met: {dict(phases)}")


if __name__ == "__main__":
    main()
