"""Going on from a checkpoint: verified by all ranks together, before anything in memory changes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mega_scale.checkpoint.folder import (
    RANDOM,
    STATE,
    find_checkpoint,
    is_checkpoint,
    large_files,
    newest_first,
    pointer_problem,
    read_state,
    stray_notes,
    verify_quickly,
)
from mega_scale.checkpoint.manifest import CheckpointError, content_problem, own_files, read_manifest
from mega_scale.checkpoint.state import StateReader
from mega_scale.parallel import Engine, World


def choose_checkpoint(path: Path, world: World, key: bytes | None = None, log: Callable[[str], None] = print) -> Path:
    """The checkpoint to go on from, proven whole by all ranks, which share the reading; collective.

    Of a run folder the newest valid checkpoint is taken, and every newer one that is not valid is reported; a
    checkpoint that was named itself is taken or refused.

    Args:
        path: of a checkpoint or run folder, the same on all ranks.
        world: all ranks.
        key: secret with which it must be signed, if there is one.
        log: is given, on rank 0, what is wrong with newer ones.

    Raises:
        ValueError: there is none; CheckpointError: the named one is damaged, or all of the run are.
    """
    names = world.broadcast([str(folder) for folder in _candidates(path)])
    if not names:
        find_checkpoint(path, key)  # says why
    problems: list[str] = []
    for name in names:
        problem = verify_together(Path(name), world, key)
        if problem is None:
            pointer = None if problems or is_checkpoint(path) else pointer_problem(path, Path(name))
            if world.rank == 0:
                for line in (*([pointer] if pointer else []), *stray_notes(Path(name), read_manifest(Path(name), key))):
                    log(line)
            return Path(name)
        problems.append(problem)
        if world.rank == 0 and not is_checkpoint(path):
            log(f"{problem}; an older one is tried")
    raise CheckpointError("; ".join(problems) + ": no valid checkpoint is left to go on from")


def verify_together(folder: Path, world: World, key: bytes | None = None) -> str | None:
    """Verify a checkpoint, each rank some of its files; collective. Returns what is wrong, the same on all ranks."""
    problem = None
    try:
        manifest = verify_quickly(folder, key)
        problem = content_problem(folder, manifest, large_files(manifest)[world.rank :: world.size], key)
    except CheckpointError as error:
        problem = str(error)
    if problem is not None and str(folder) not in problem:
        problem = f"{folder} is no valid checkpoint: {problem}"
    first: str | None = world.first(problem)
    return first


def load_checkpoint(folder: Path, engine: Engine, world: World) -> dict[str, Any]:
    """Bring engine and random state to where a verified checkpoint left them, whichever layout wrote it; collective.

    Returns:
        What `trainer.json` holds.

    Raises:
        ValueError: it holds another model, or what no trainer wrote; nothing was changed.
    """
    state = read_state(folder)
    # Nothing in training draws from it that ranks do not draw alike, so other ranks than before go on without.
    random = f"{RANDOM}/rank-{world.rank:05d}.safetensors"
    random_state = _read_random_state(folder / random) if random in own_files(folder) else None
    with torch.no_grad():
        StateReader(folder / STATE).load(engine.state())
    engine.loaded(state["step"])
    if random_state is not None:
        _set_random_state(random_state)
    world.barrier()
    return state


def _candidates(path: Path) -> Iterator[Path]:
    return iter([path] if is_checkpoint(path) else newest_first(path))


def _read_random_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = load_file(path)
        torch.Generator().set_state(found["cpu"])
        if torch.cuda.is_available() and "cuda" in found:
            torch.Generator("cuda").set_state(found["cuda"])
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(repr(error).split())[:200]
        raise ValueError(f"{path} holds no random state ({reason}): choose another checkpoint") from None
    return found


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
