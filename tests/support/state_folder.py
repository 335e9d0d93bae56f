"""An engine's state in a folder, without manifest or run, and all that a folder holds as whole tensors."""

import json
from pathlib import Path

import torch
from torch import Tensor

from mega_scale.checkpoint.folder import state_file
from mega_scale.checkpoint.saver import INDEX, build_index, rank_tensors, write_tensors
from mega_scale.checkpoint.state import StateReader
from mega_scale.parallel import Engine, World


def save(engine: Engine, folder: Path, world: World) -> None:
    """Collective."""
    folder.mkdir(parents=True, exist_ok=True)
    state = engine.state()
    tensors, spans = rank_tensors(state, world.rank)
    write_tensors(folder / state_file(world.rank), tensors, lambda data: None)
    gathered = world.gather(spans)
    if gathered is not None:
        (folder / INDEX).write_text(json.dumps(build_index(state, gathered)))
    world.barrier()


def load(engine: Engine, folder: Path, world: World) -> None:
    """Collective."""
    with torch.no_grad():
        StateReader(folder).load(engine.state())
    engine.loaded(0)


def canonical(folder: Path) -> dict[str, Tensor]:
    """Everything in a folder, whichever layout wrote it."""
    reader = StateReader(folder)
    found = {"steps": torch.tensor(reader.optimizer_steps), "averaged": torch.tensor(reader.averaged)}
    for name in reader.shardings:
        found |= {f"{kind}/{name}": reader.whole(name, kind) for kind in reader.kinds[name]}
    return found | {f"buffer/{name}": reader.buffer(name) for name in reader.buffers}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name not in one or name not in other or not torch.equal(one[name], other[name])]
