"""Whether two runs are the same to the bit: what their last checkpoints hold, and every loss on the way."""

import json
from pathlib import Path

import torch

from mega_scale.checkpoint.state import StateReader

KEYS = ("loss", "grad_norm", "lr", "tokens")


def rows(run_dir: Path) -> list[dict]:
    """The training rows of metrics.jsonl, in their order; half a line at the end is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in found if row["part"] == "train"]


def metric_problems(reference: Path, run_dir: Path, steps: int) -> list[str]:
    """What differs in the rows of the first steps, each of which must be there once, in order."""
    want, got = ([row for row in rows(run) if row["step"] <= steps] for run in (reference, run_dir))
    if [row["step"] for row in got] != list(range(1, steps + 1)):
        return [f"metrics.jsonl has steps {[row['step'] for row in got]}, not 1 to {steps}"]
    return [
        f"step {one['step']}: {key} is {other[key]!r}, not {one[key]!r}"
        for one, other in zip(want, got, strict=True)
        for key in KEYS
        if one[key] != other[key]
    ]


def state_problems(reference: Path, checkpoint: Path) -> list[str]:
    """What differs between two checkpoints: weights, moments, buffers, random state, and trainer.json."""
    found = []
    one, other = (StateReader(folder / "state") for folder in (reference, checkpoint))
    if one.shapes != other.shapes or one.kinds != other.kinds or one.optimizer_steps != other.optimizer_steps:
        return ["other parameters, moments or optimizer steps"]
    if one.averaged != other.averaged:
        return [f"the average is of {other.averaged} steps, not {one.averaged}"]
    for name in one.shapes:
        for kind in one.kinds[name]:
            if not _same(one.whole(name, kind), other.whole(name, kind)):
                found.append(f"{kind} of {name} differs")
    found += [f"buffer {name} differs" for name in one.buffers if not _same(one.buffer(name), other.buffer(name))]
    names = ["trainer.json", *(f"random/{path.name}" for path in sorted((reference / "random").iterdir()))]
    for name in names:
        if (reference / name).read_bytes() != (checkpoint / name).read_bytes():
            found.append(f"{name} differs")
    return found


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit, so that a NaN equals itself, and zeros of two signs do not."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )
