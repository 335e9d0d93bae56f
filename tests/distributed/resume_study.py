"""Saving in a layout, going on from there, and reading the files without any ranks."""

from pathlib import Path
from typing import Any

import layout_study
import state_folder
import torch
from layout_study import LAYOUTS, VARIANTS
from torch import Tensor

from mega_scale.parallel import ParallelConfig, World

CUT, END = 2, 4
VARIANT = VARIANTS["dropout-recomputed"]
RESUMED = ("sp2-tp2", "dp2-tp2", "replicate2-sp2")


def straight(world: World, engine: str, folder: Path) -> dict[str, Any]:
    made = layout_study.make_engine(world, engine, *VARIANT)
    layout_study.train(made, world, range(CUT))
    state_folder.save(made, folder, world)
    at_cut = layout_study.whole_weights(made, world)
    losses, norms = layout_study.train(made, world, range(CUT, END))
    end = layout_study.whole_weights(made, world)
    made.close()
    return {"at_cut": at_cut, "losses": losses, "norms": norms, "end": end}


def resumed(world: World, engine: str, folder: Path) -> dict[str, Any]:
    made = layout_study.make_engine(world, engine, *VARIANT)
    state_folder.load(made, folder, world)
    at_cut = layout_study.whole_weights(made, world)
    losses, norms = layout_study.train(made, world, range(CUT, END))
    end: dict[str, Tensor] = layout_study.whole_weights(made, world)
    made.close()
    return {"at_cut": at_cut, "losses": losses, "norms": norms, "end": end}


def study(folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        worlds = {name: layout_study.lay_out(ranks, LAYOUTS[name]) for name in RESUMED}
        for engine in ("fsdp-3", "zero-3"):
            for name in RESUMED:
                found[name, engine, "straight"] = straight(worlds[name], engine, folder / f"{name}-{engine}")
                found[name, engine, "resumed"] = resumed(worlds[name], engine, folder / f"{name}-{engine}")
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
