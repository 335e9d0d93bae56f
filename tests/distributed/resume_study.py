"""Saving in a layout, going on from there, and reading the files in other layouts and without any ranks."""

from pathlib import Path
from typing import Any

import layout_study
import torch
from layout_study import LAYOUTS, VARIANTS
from torch import Tensor

from mega_scale.parallel import ParallelConfig, World

CUT, END = 2, 4
VARIANT = VARIANTS["dropout-recomputed"]
RESUMED = ("sp2-tp2", "dp2-tp2", "replicate2-sp2")
# FSDP's files hold whole tensors in parts, which any layout can read.
RESHARDED = ("tp4", "sp4", "dp2-sp2", "replicate2-sp2")


def folder_for(path: Path, world: World) -> Path:
    if world.rank == 0:
        path.mkdir(parents=True)
    world.barrier()
    return path


def straight(world: World, engine: str, folder: Path) -> dict[str, Any]:
    made = layout_study.make_engine(world, engine, VARIANT)
    layout_study.train(made, world, range(CUT))
    made.save(folder_for(folder, world))
    at_cut = layout_study.whole_weights(made, world)
    losses, norms = layout_study.train(made, world, range(CUT, END))
    end = layout_study.whole_weights(made, world)
    made.close()
    return {"at_cut": at_cut, "losses": losses, "norms": norms, "end": end}


def resumed(world: World, engine: str, folder: Path) -> dict[str, Any]:
    made = layout_study.make_engine(world, engine, VARIANT)
    made.load(folder)
    at_cut = layout_study.whole_weights(made, world)
    losses, norms = layout_study.train(made, world, range(CUT, END))
    end: dict[str, Tensor] = layout_study.whole_weights(made, world)
    made.close()
    return {"at_cut": at_cut, "losses": losses, "norms": norms, "end": end}


def refusal(world: World, engine: str, folder: Path) -> str:
    made = layout_study.make_engine(world, engine, VARIANT)
    try:
        made.load(folder)
    except ValueError as error:
        return str(error)
    finally:
        made.close()
    return "loaded"


def study(folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        worlds = {name: ranks.lay_out(LAYOUTS[name]) for name in dict.fromkeys((*RESUMED, *RESHARDED))}
        for engine in ("fsdp", "deepspeed"):
            for name in RESUMED:
                found[name, engine, "straight"] = straight(worlds[name], engine, folder / f"{name}-{engine}")
                found[name, engine, "resumed"] = resumed(worlds[name], engine, folder / f"{name}-{engine}")
        for name in RESHARDED:
            found[name, "resharded"] = resumed(worlds[name], "fsdp", folder / "sp2-tp2-fsdp")
        found["refused"] = refusal(worlds["sp4"], "deepspeed", folder / "sp2-tp2-deepspeed")
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
