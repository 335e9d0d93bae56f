"""What ranks of tp do with products beside their collectives and without, for the tests to compare."""

from functools import partial
from typing import Any
from unittest.mock import patch

import layout_study
import torch
from layout_study import DROPOUT, LAYOUTS, MEGALODON, MODELS, OTHER_MEGALODON
from symmetric_memory import on_cpus, overlapping
from torch._dynamo.utils import counters

from mega_scale.parallel import ParallelConfig, Place, World
from mega_scale.parallel.meter import Meter, Sent

STEPS = 4
_BOTH = OTHER_MEGALODON | {"swiglu": True}
# Changes of the model, keys of `ParallelConfig`, number format.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mega": ({}, {}, "fp32"),
    "mega, dropout, recomputed": (DROPOUT, {"activation_checkpoint": 1}, "fp32"),
    "mega, no feed-forward network": (MODELS["no-ffn-plain-norm-feature-dropout"], {}, "fp32"),
    "mega, norms after": (MODELS["relu2-rmsnorm-post-final"], {"activation_checkpoint": 1}, "fp32"),
    "mega, bf16": ({}, {}, "bf16"),
    "megalodon": (MEGALODON, {}, "fp32"),
    "megalodon, dropout, recomputed": (OTHER_MEGALODON, {"activation_checkpoint": 1}, "fp32"),
    "megalodon, SwiGLU, products saved": (
        _BOTH,
        {"activation_checkpoint": 1, "activation_checkpoint_policy": "save_matmuls"},
        "fp32",
    ),
    "megalodon, every second block": (_BOTH, {"activation_checkpoint": 2}, "fp32"),
    "megalodon, segments": (MEGALODON, {"activation_checkpoint": 1, "activation_checkpoint_segment": 32}, "fp32"),
    "megalodon, segments, products saved": (
        MEGALODON,
        {
            "activation_checkpoint": 1,
            "activation_checkpoint_segment": 32,
            "activation_checkpoint_policy": "save_matmuls",
        },
        "fp32",
    ),
    "megalodon, bf16": (MEGALODON, {}, "bf16"),
}
COMPILED = ("mega, dropout, recomputed", "megalodon", "megalodon, SwiGLU, products saved", "megalodon, bf16")
LAYOUT = {2: ("tp2",), 4: ("tp4", "dp2-tp2", "sp2-tp2")}
FEW = ("mega", "megalodon, dropout, recomputed")  # of layouts with other axes
TOKENS = 61


def train(world: World, case: str, compile: bool = False) -> dict[str, Any]:
    changes, how, dtype = CASES[case]
    made = layout_study.make_engine(world, "fsdp-3", changes, dtype=dtype, compile=compile, **how)
    losses, norms = layout_study.train(made, world, range(STEPS))
    found = {"losses": losses, "norms": norms, "end": layout_study.whole_weights(made, world)}
    made.close()
    return found


def alone() -> dict[str, dict[str, Any]]:
    """One process."""
    with World.start(ParallelConfig()) as world:
        return {case: train(world, case) for case, (*_, dtype) in CASES.items() if dtype == "fp32"}


def study(size: int) -> dict[Any, dict[str, Any]]:
    """Losses, norms and weights by layout, case, and whether products and collectives are one."""
    found = {}
    with World.start(ParallelConfig(timeout_s=300)) as ranks, on_cpus():
        for layout in LAYOUT[size]:
            waiting = layout_study.lay_out(ranks, LAYOUTS[layout])
            for case in CASES if layout.startswith("tp") else FEW:
                for world in (waiting, overlapping(waiting)):
                    found[layout, case, world.axes["tp"].overlaps] = train(world, case)
    return found


def compiled() -> dict[str, tuple[dict[str, Any], int]]:
    """The same in compiled blocks, and their graphs."""
    found = {}
    # Inductor would take the time; what it compiles are these graphs.
    backend = partial(torch.compile, backend="aot_eager_default_partitioner")
    with World.start(ParallelConfig(timeout_s=300)) as ranks, patch.object(torch, "compile", backend), on_cpus():
        world = overlapping(layout_study.lay_out(ranks, LAYOUTS["tp2"]))
        for case in COMPILED:
            counters.clear()
            found[case] = train(world, case, compile=True), counters["stats"].get("unique_graphs", 0)
    return found


def sent(world: World, case: str) -> list[tuple[Sent, ...]]:
    """What goes over tp in a forward and in a backward pass."""
    changes, how, _ = CASES[case]
    made = layout_study.make_engine(world, "fsdp-3", changes, **how)
    made.module.train()
    inputs = torch.arange(TOKENS).repeat(layout_study.ROWS, 1) % 60
    with Meter(made.module) as meter:
        loss = made.forward(inputs, inputs + 1, inputs.numel(), Place())
        began = len(meter.over(world.axes["tp"].group))
        made.backward(loss, last=True)
    made.close()
    calls = meter.over(world.axes["tp"].group)
    return [tuple(calls[:began]), tuple(calls[began:])]


def metered() -> dict[tuple[str, bool], list[tuple[Sent, ...]]]:
    found = {}
    with World.start(ParallelConfig(timeout_s=300)) as ranks, on_cpus():
        waiting = layout_study.lay_out(ranks, LAYOUTS["tp2"])
        for case in CASES:
            for world in (waiting, overlapping(waiting)):
                found[case, world.axes["tp"].overlaps] = sent(world, case)
    return found
