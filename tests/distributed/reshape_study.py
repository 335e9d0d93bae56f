"""One state, saved and loaded by every layout: on 1, 2 and 4 ranks, by both engines, and read by each of the others."""

from pathlib import Path
from typing import NamedTuple

import engine_study
import layout_study
import state_folder
import tiny_run
import torch

from mega_scale.parallel import Engine, LazyWeights, ParallelConfig, StateReader, World, parallelize, seeded_values
from mega_scale.parallel.mesh import MeshShape

CUT, MORE = 20, 20


class Layout(NamedTuple):
    engine: str
    shape: MeshShape


_DATA_PARALLEL = {
    f"{engine}-x{ranks}": Layout(engine, MeshShape(1, ranks, 1, 1))
    for ranks in (1, 2, 4)
    for engine in ("fsdp-3", "zero-1", "zero-2", "zero-3")
}
_CUT = {
    f"{engine}-{name}": Layout(engine, shape)
    for name, shape in {
        "sp2": MeshShape(1, 1, 2, 1),
        "tp2": MeshShape(1, 1, 1, 2),
        "sp2xtp2": MeshShape(1, 1, 2, 2),
    }.items()
    for engine in ("fsdp-3", "zero-1", "zero-3")
}
LAYOUTS = _DATA_PARALLEL | _CUT


def make_engine(world: World, engine: str) -> Engine:
    config = layout_study.config()
    return parallelize(
        tiny_run.meta_model(config),
        seeded_values(config, 77),  # other weights than those that are loaded
        ParallelConfig(**engine_study.ENGINES[engine], **world.shape._asdict()),
        dtype="fp32",
        micro_batch_size=layout_study.ROWS // world.shape.dp,
        accumulation=1,
        max_grad_norm=0.4,
        build_optimizer=tiny_run.build_optimizer,
        world=world,
        seed=5,
    )


def uninterrupted(folder: Path) -> list[float]:
    """One process trains to the cut, saves, and goes on; returns the losses after the cut."""
    with World.start(ParallelConfig()) as world:
        engine = make_engine(world, "fsdp-3")
        layout_study.train(engine, world, range(CUT))
        state_folder.save(engine, folder, world)
        losses, _ = layout_study.train(engine, world, range(CUT, CUT + MORE))
        engine.close()
        return losses


def passed_on(source: Path, folder: Path, size: int) -> dict[str, list[float]]:
    """Every layout of so many ranks loads the state, saves it, and goes on; returns its losses."""
    found = {}
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        for name, layout in LAYOUTS.items():
            if layout.shape.size == size:
                world = ranks.lay_out(layout.shape)
                engine = make_engine(world, layout.engine)
                state_folder.load(engine, source, world)
                state_folder.save(engine, folder / name, world)
                found[name], _ = layout_study.train(engine, world, range(CUT, CUT + MORE))
                engine.close()
    return found


def matrix(source: Path, folder: Path, size: int) -> dict[tuple[str, str], list[str]]:
    """Every layout of so many ranks loads what every other one saved; returns what is not bit-equal to the source."""
    found = {}
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        for name, layout in LAYOUTS.items():
            if layout.shape.size == size:
                world = ranks.lay_out(layout.shape)
                engine = make_engine(world, layout.engine)
                for other in LAYOUTS:
                    _spoil(engine)
                    state_folder.load(engine, folder / other, world)
                    found[other, name] = _different(engine, StateReader(source), world)
                engine.close()
    return found


def _spoil(engine: Engine) -> None:
    state = engine.state()
    with torch.no_grad():
        for held in state.held.values():
            for tensor in held.tensors.values():
                tensor.fill_(float("nan"))
        for step in state.steps:
            step.fill_(-1)


def _different(engine: Engine, source: StateReader, world: World) -> list[str]:
    """Parameters and moments of which this rank does not hold what the source holds, and weights that are not whole."""
    state, found = engine.state(), []
    for name, held in state.held.items():
        where = state.names.table[name].dim, world.axis("tp")
        for kind, tensor in held.tensors.items():
            expected = source.read(name, kind, held.start, held.start + len(tensor), *where)
            if not torch.equal(tensor.cpu(), expected):
                found.append(f"{kind}/{name}")
    found += ["steps"] * any(int(step) != source.optimizer_steps for step in state.steps)
    weights = LazyWeights(source)
    computed_with = layout_study.whole_weights(engine, world)
    return found + [f"model {name}" for name, tensor in computed_with.items() if not torch.equal(tensor, weights[name])]
