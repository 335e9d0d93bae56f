"""Kill jobs that upload checkpoints, again and again: is what an object store holds ever wrong, or lost?

    PYTHONPATH=tests/support python tests/campaigns/store_kills.py --kills 20

A job saves small checkpoints one after the other, and announces each; it is killed at a random moment. After every
kill, in an empty folder, all checkpoints of the store are verified, the newest must be the last that was announced or a
later one, and the next job goes on from it.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import object_store

from mega_scale.checkpoint import folder as store
from mega_scale.checkpoint.remote import RemoteRun
from mega_scale.checkpoint.saver import flush_and_hash

BYTES = 400_000  # of a state, whose content tells its step
KEEP = 3


def save(run: RemoteRun, step: int) -> None:
    """As a `Saver` of one rank: write, upload, complete, delete what is too old."""
    folder = store.folder_of(run.folder, step)
    (folder / store.STATE).mkdir(parents=True, exist_ok=True)
    (folder / store.STATE / store.state_file(0)).write_bytes(f"{step:08d}".encode() * (BYTES // 8))
    facts: dict[str, Any] = {"step": step, "tokens": step, "data": {}, "layout": {}}
    (folder / store.TRAINER).write_text(json.dumps(facts))
    names = [f"{store.STATE}/{store.state_file(0)}", store.TRAINER]
    files = {name: flush_and_hash(folder / name, None) for name in names}
    run.withdraw(folder.name)
    run.upload(folder, folder.name, files)
    store.write_manifest(folder, store.Manifest(step, step, files), None)
    run.complete(folder)
    run.keep(KEEP, 0, [folder.name])


def job(url: str, disk: str, begin: int, announced: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    run = RemoteRun(url, Path(disk))
    for step in range(begin, begin + 10_000):
        save(run, step)
        with open(announced, "a") as file:
            file.write(f"{step}\n")


def problems(url: str, last: int) -> tuple[list[str], int]:
    """What is wrong with the run as another host finds it, and the step from which it goes on."""
    found: list[str] = []
    with tempfile.TemporaryDirectory() as disk:
        run = RemoteRun(url, Path(disk))
        names = list(run.checkpoints())
        for name in names:
            manifest = run.verify(name)
            content = run.objects.read(f"checkpoints/{name}/{store.STATE}/{store.state_file(0)}") or b""
            if content != f"{manifest.step:08d}".encode() * (BYTES // 8):
                found.append(f"{name} verifies, and holds something else")
        run.prepare(found.append, resumes=True)
        newest = store.checkpoints(run.folder)[-1:]
        step = int(newest[0].name.removeprefix("step-")) if newest else 0
        if step < last:
            found.append(f"step {last} was announced, and the newest is {step}")
        if len(names) > KEEP + 2:
            found.append(f"{len(names)} checkpoints are kept")
    return found, step


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    chance, url, last, wrong = random.Random(args.seed), f"{object_store.BUCKET}/run", 0, 0
    context = multiprocessing.get_context("spawn")
    with object_store.served() as server, tempfile.TemporaryDirectory() as folder:
        os.environ.update(server.environment)
        announced = Path(folder) / "announced"
        announced.touch()
        for kill in range(args.kills):
            before = len(server.requests)
            process = context.Process(
                target=job, args=(url, f"{folder}/disk{kill}", last + 1, str(announced), server.environment)
            )
            process.start()
            # By requests, so that kills fall everywhere among them however slow the machine is.
            goal = before + chance.randint(1, 90)
            object_store.wait_for(lambda goal=goal: len(server.requests) >= goal, 300)  # type: ignore[misc]
            time.sleep(chance.random() * 0.02)
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            time.sleep(0.2)  # the server ends what it was sent
            said = [int(line) for line in announced.read_text().split()]
            found, step = problems(url, max(said, default=0))
            wrong += len(found)
            print(json.dumps({"kill": kill, "announced": max(said, default=0), "resumed": step, "problems": found}))
            last = step
    print(f"{args.kills} kills, {len(said)} checkpoints announced, {wrong} problems")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
