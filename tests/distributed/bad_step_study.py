"""Two ranks take steps of which some must not be taken, with every engine; the tests look at what is left."""

import math
from pathlib import Path
from typing import Any

import tiny_run
import torch
from engine_study import ENGINES
from torch import Tensor
from torch.distributed.tensor import DTensor

from mega_scale.parallel import Engine, ParallelConfig, World

# All that is small stays gathered, but after a step that ZeRO-3 discards.
KEYS = ENGINES | {"zero-3, gathered": {"engine": "deepspeed", "zero_stage": 3}}
# What is wrong in a step, on rank 1 only but for the last: no rank knows of it before gradients are summed.
PROBLEMS = ("nan loss", "inf gradient", "refused")


def state(engine: Engine) -> dict[str, Tensor]:
    """Everything that this rank would bring into the next step: weights, moments, counts."""
    own = engine._engine.optimizer if hasattr(engine, "_engine") else engine._adam  # type: ignore[attr-defined]
    optimizer = getattr(own, "optimizer", own)
    found = {name: engine.local_tensor(name).clone() for name in dict(engine.module.named_parameters())}
    for i, parameters in enumerate(optimizer.state.values()):
        for key, value in parameters.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            found[f"{i}.{key}"] = torch.as_tensor(local).clone()
    # ZeRO keeps the weights that it steps apart from those that compute.
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for i, part in enumerate(getattr(own, name, [])):
            found[f"{name}.{i}"] = part.detach().clone()
    return found


def step(engine: Engine, world: World, number: int, problem: str | None) -> float:
    batches, count = tiny_run.micro_batches(number, world)
    for i, (inputs, labels) in enumerate(batches):
        loss = engine.forward(inputs, labels, count)
        if i == 0 and world.rank == 1 and problem == "nan loss":
            loss = loss * math.nan
        if i == 0 and world.rank == 1 and problem == "inf gradient":
            loss = loss + torch.sqrt(loss * 0) * 0 + (loss - loss.detach()) * math.inf
        engine.backward(loss, last=i == len(batches) - 1)
    return engine.step(tiny_run.LEARNING_RATES[number], skip=problem == "refused")


def study(folder: Path) -> dict[str, dict[str, Any]]:
    with World.start(ParallelConfig(timeout_s=120)) as world:
        return {key: _study(key, world) for key in KEYS}


def _study(key: str, world: World) -> dict[str, Any]:
    engine = tiny_run.make_engine(world, KEYS[key])
    engine.loaded(0)  # as after a checkpoint
    norms = [step(engine, world, 0, None)]
    before, bad, after = state(engine), {}, {}
    for problem in PROBLEMS:
        bad[problem] = step(engine, world, 1, problem)
        after[problem] = state(engine)
    norms += [step(engine, world, number, None) for number in (1, 2)]
    end = state(engine)
    engine.close()

    engine = tiny_run.make_engine(world, KEYS[key])
    expected = [step(engine, world, number, None) for number in range(3)]
    undisturbed = state(engine)
    engine.close()
    return {
        "before": before,
        "after": after,
        "bad": bad,
        "norms": norms,
        "end": end,
        "expected": expected,
        "undisturbed": undisturbed,
    }
