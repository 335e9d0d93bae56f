"""Runs that are cut and go on in other layouts, recording which tokens every rank was given at every step.

    PYTHONPATH=tests/support python tests/support/token_stream.py FOLDER          writes FOLDER/findings.json

All ranks of a leg kill themselves when they are asked for a certain step, as if the machines had lost power; the next
leg goes on from the newest checkpoint with another number of ranks, another mesh or the other engine.
"""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import forks

STEPS, GLOBAL_BATCH, LENGTH, EVERY = 16, 8, 64, 4
LIMIT_S = 240


class Leg(NamedTuple):
    """A part of a run.

    Args:
        size: ranks.
        engine: fsdp or deepspeed.
        stage: of ZeRO.
        cut: the step (1 for the first) at whose beginning all ranks die; 0 where it ends by itself.
        sp: ranks that share a sequence.
        tp: ranks that share layers.
        workers: processes of each rank that read ahead.
    """

    size: int
    engine: str
    stage: int
    cut: int = 0
    sp: int = 1
    tp: int = 1
    workers: int = 0


WHOLE = (Leg(2, "fsdp", 3),)
# Saves come every 4 steps, so a cut before step 6 has trained step 5, which the next leg does again.
RUNS = {
    "2-1-4-2 ranks": (
        Leg(2, "fsdp", 3, cut=5), Leg(1, "deepspeed", 1, cut=10), Leg(4, "fsdp", 2, cut=13), Leg(2, "deepspeed", 3),
    ),
    "sp and tp, workers": (
        Leg(2, "deepspeed", 3, cut=6, workers=2), Leg(4, "fsdp", 3, cut=9, sp=2, tp=2, workers=2),
        Leg(1, "fsdp", 3, cut=14, workers=2), Leg(2, "deepspeed", 2, sp=2, workers=2),
    ),
}  # fmt: skip


def main() -> int:
    """Run the command; returns its exit code."""
    folder = Path(sys.argv[1])
    forks.prepare()
    from launching import write_sources  # noqa: PLC0415  its imports count as the ranks' own

    text = write_sources(folder / "text.jsonl", 20)
    found = {name: run(legs, text, folder / name.replace(" ", "-")) for name, legs in {"whole": WHOLE, **RUNS}.items()}
    (folder / "findings.json").write_text(json.dumps(found))
    return 0


def run(legs: Sequence[Leg], text: Path, folder: Path) -> dict:
    """Run all legs one after the other.

    Returns:
        `ids`, for every leg the steps it read, each with the token ids of the global batch in order; `from_step` of
        every leg; `losses` by step.

    Raises:
        ValueError: a leg failed, or ranks that share rows were given others.
    """
    from same_runs import rows  # noqa: PLC0415

    run_dir = folder / "run"
    found: dict = {"ids": [], "from_step": []}
    for number, leg in enumerate(legs):
        records = folder / f"ids-{number}"
        records.mkdir(parents=True)
        resume = ["--resume"] if number else []
        ranks = forks.start(
            [*_arguments(leg, text, run_dir), *resume],
            leg.size,
            folder,
            before=lambda rank, leg=leg, records=records: _record(records / f"{rank}.jsonl", leg.cut),
            name=f"leg-{number}",
        )
        ranks.wait(LIMIT_S)
        left = forks.survivors()
        said = re.search(r"from step (\d+) of", ranks.text())
        expected = -signal.SIGKILL if leg.cut else 0
        if said is None or left or set(ranks.codes.values()) != {expected}:
            raise ValueError(f"leg {number} ended with {ranks.codes}, left {left}:\n{ranks.text()[-6000:]}")
        found["from_step"].append(int(said[1]))
        found["ids"].append(_laid_together([records / f"{rank}.jsonl" for rank in range(leg.size)], leg))
    found["losses"] = {row["step"]: row["loss"] for row in rows(run_dir)}
    shutil.rmtree(run_dir)
    return found


def _arguments(leg: Leg, text: Path, run_dir: Path) -> list[str]:
    from launching import TINY  # noqa: PLC0415

    return [
        *TINY, "data.source=json", f"data.path={text}", "data.validation_fraction=0", "model.vocab_size=260",
        f"data.sequence_length={LENGTH}", f"train.global_batch_size={GLOBAL_BATCH}", f"train.steps={STEPS}",
        # Every save is complete before the next step, so that it is known which one a cut leaves.
        f"checkpoint.every={EVERY}", "checkpoint.asynchronous=false", "parallel.timeout_s=60", "optimizer.eps=1e-6",
        "optimizer.lr=0.003", f"run_dir={run_dir}", f"parallel.engine={leg.engine}",
        f"parallel.zero_stage={leg.stage}", f"parallel.sp={leg.sp}", f"parallel.tp={leg.tp}",
        f"data.workers={leg.workers}",
    ]  # fmt: skip


def _record(path: Path, cut: int) -> None:
    """In a rank: write down what its loader gives, and die where the leg is cut."""
    from mega_scale.data import Loader  # noqa: PLC0415

    read = Loader.batches
    file = path.open("a", buffering=1)

    def batches(self: Loader, step: int) -> list:
        if cut and step + 1 == cut:
            os.kill(os.getpid(), signal.SIGKILL)
        found = read(self, step)
        ids = [[batch[name].tolist() for name in ("input_ids", "shift_labels")] for batch in found]
        file.write(json.dumps([step + 1, ids]) + "\n")
        return found

    Loader.batches = batches  # type: ignore[method-assign]


def _laid_together(files: list[Path], leg: Leg) -> list:
    """What the ranks were given, by step: [step, rows of the global batch in order, each inputs and labels]."""
    read = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    share = leg.sp * leg.tp  # neighbours, who are given the same rows
    for first in range(0, leg.size, share):
        if any(read[rank] != read[first] for rank in range(first, first + share)):
            raise ValueError(f"ranks {first} to {first + share - 1} share rows, but were given others: {leg}")
    found = []
    for of_step in zip(*read[::share], strict=True):
        rows = []
        # Micro-batch by micro-batch, and in each of them rank by rank.
        for micro in zip(*(ids for _, ids in of_step), strict=True):
            for inputs, labels in micro:
                rows += [list(row) for row in zip(inputs, labels, strict=True)]
        if len({step for step, _ in of_step}) != 1:
            raise ValueError(f"ranks read other steps at once: {[step for step, _ in of_step]}")
        found.append([of_step[0][0], rows])
    return found


if __name__ == "__main__":
    sys.exit(main())
