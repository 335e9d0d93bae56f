"""Checkpoints of a run: one folder a step, complete once it bears its name.

A folder `run_dir/checkpoints/step-00000030` holds `engine/` (weights and optimizer, written by every rank),
`rng-00000.safetensors` and so on (random state of each rank), `config.yaml` (the run), `model/` (the model's
configuration and tokenizer) and `trainer.json` (step, tokens, position in the data, layout). It is written under
another name, and renamed when every rank has finished.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mega_scale.parallel import Engine, World

_UNFINISHED = ".unfinished"


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many are kept; one is always written at the end."""

    every: int = 0
    """Steps between two checkpoints; 0 writes one at the end only (steps)."""

    keep: int = 0
    """Newest checkpoints to keep, older ones are deleted after a new one is complete; 0 keeps all (checkpoints)."""


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = run_dir.glob("checkpoints/step-*/trainer.json")
    return sorted(path.parent for path in found if not path.parent.name.endswith(_UNFINISHED))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest one of a run folder.

    Raises:
        ValueError: there is none.
    """
    if (path / "trainer.json").is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise ValueError(
            f"{path} is neither a checkpoint (it has no trainer.json) nor a run folder with one in checkpoints/: "
            "give a step-... folder, or the run_dir of a run that has saved"
        )
    return found[-1]


def save_checkpoint(
    run_dir: Path,
    step: int,
    engine: Engine,
    world: World,
    state: dict[str, Any],
    describe: Callable[[Path], None],
    keep: int = 0,
) -> Path:
    """Write a checkpoint; collective.

    Args:
        run_dir: folder of the run, shared by all ranks.
        step: optimizer steps done.
        engine: what is saved.
        world: all ranks.
        state: plain JSON to find again in `trainer.json`.
        describe: writes `config.yaml` and `model/` into a folder.
        keep: number of newest checkpoints to keep, 0 for all.

    Returns:
        The folder.

    Raises:
        RuntimeError: a rank could not write its part; nothing is renamed, and older checkpoints stay.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    folder = final.with_name(final.name + _UNFINISHED)
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "engine").mkdir(parents=True)
    world.barrier()
    engine.save(folder / "engine")

    def write() -> None:
        save_file(_random_state(), folder / f"rng-{world.rank:05d}.safetensors")
        if world.rank == 0:
            describe(folder)
            (folder / "trainer.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    _together(write, world, final)
    # Once every rank has written: before, files of others may still bear temporary names. One rank a host flushes all.
    _together(lambda: _flush(folder) if world.local_rank == 0 else None, world, final)
    if world.rank == 0:
        shutil.rmtree(final, ignore_errors=True)  # a run that was resumed from before this step writes it anew
        folder.rename(final)
        _flush(final.parent)
        for old in checkpoints(run_dir)[:-keep] if keep else []:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return final


def load_checkpoint(folder: Path, engine: Engine, world: World) -> dict[str, Any]:
    """Bring engine and random state back to where `save_checkpoint` left them; collective.

    Args:
        folder: of the checkpoint.
        engine: of the same kind and number of ranks.
        world: all ranks.

    Returns:
        The state in `trainer.json`.
    """
    state = read_state(folder)
    engine.load(folder / "engine")
    _set_random_state(load_file(folder / f"rng-{world.rank:05d}.safetensors"))
    world.barrier()
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Read `trainer.json` of a checkpoint.

    Raises:
        ValueError: it is missing or no JSON.
    """
    try:
        return json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}/trainer.json cannot be read ({error}): choose another checkpoint") from None


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _together(act: Callable[[], None], world: World, final: Path) -> None:
    """Do something on every rank, and go on only if all could; collective.

    Raises:
        RuntimeError: a rank could not; names the checkpoint.
    """
    problem: OSError | None = None
    try:
        act()
    except OSError as error:
        problem = error
    if not world.all_agree(problem is None):
        reason = f"rank {world.rank}: {problem}" if problem else "another rank could not write its part"
        raise RuntimeError(f"checkpoint {final} is incomplete ({reason}); older checkpoints are untouched") from problem


def _flush(folder: Path) -> None:
    """Have the file system keep what a folder holds, before its name says that it is complete."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
