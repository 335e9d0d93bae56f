"""Packed rows on ranks that share rows, channels or both: loss, gradients and logits of their documents."""

from typing import Any

import documents_alone
import layout_study
import tiny_run
import torch

from mega_scale.model import MegaConfig
from mega_scale.parallel import EngineConfig, ParallelConfig, Place, World, parallelize, seeded_values
from mega_scale.parallel.mesh import MeshShape

LAYOUTS = {
    "sp2": MeshShape(1, 1, 2, 1),
    "tp2": MeshShape(1, 1, 1, 2),
    "sp4": MeshShape(1, 1, 4, 1),
    "sp2-tp2": MeshShape(1, 1, 2, 2),
}
# Name: changes of the model, activation checkpointing.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "softmax-rotary": ({}, 0),
    "softmax-simple-recomputed": ({"relative_positional_bias": "simple"}, 1),
    "laplace-simple": ({"attention_activation": "laplace", "relative_positional_bias": "simple"}, 0),
    "relu2-rotary-recomputed": ({"attention_activation": "relu2"}, 1),
}


# Every pair of layout and model, of layout and engine, and of model and engine.
RUNS = [
    (layout, ("fsdp", "deepspeed")[(row + column) % 2], model)
    for row, layout in enumerate(LAYOUTS)
    for column, model in enumerate(MODELS)
]


def config(changes: dict[str, Any]) -> MegaConfig:
    return layout_study.config(max_positions=documents_alone.CHUNK, **changes)


def _engine(world: World, engine: str, changes: dict[str, Any], activation_checkpoint: int) -> Any:
    shape = config(changes)
    settings = {"zero_stage": 3} if engine == "deepspeed" else {}
    parallel = ParallelConfig(
        engine=engine, activation_checkpoint=activation_checkpoint, **settings, **world.shape._asdict()
    )
    return parallelize(
        tiny_run.meta_model(shape),
        seeded_values(shape, tiny_run.SEED),
        EngineConfig(parallel, micro_batch_size=len(documents_alone.STARTS), max_grad_norm=0.0, seed=5),
        world,
        # One step at rate 1 moves every weight by its gradient.
        lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
    )


def run(world: World, engine: str, changes: dict[str, Any], activation_checkpoint: int) -> dict[str, Any]:
    """Loss of all ranks, gradients by name, and this rank's part of the logits."""
    made = _engine(world, engine, changes, activation_checkpoint)
    tokens, labels, starts = documents_alone.packed()
    before, sp = layout_study.whole_weights(made, world), world.axes["sp"]
    with torch.no_grad():
        length = documents_alone.LENGTH // world.shape.sp
        part = slice(sp.rank * length, (sp.rank + 1) * length)
        made.module.eval()
        made.row_slice.take(Place(), tokens, labels)
        with made.row_slice:
            logits = made.module(
                input_ids=tokens[:, part].contiguous(), document_starts=starts[:, part].contiguous(), use_cache=False
            ).logits
    made.module.train()
    loss = made.forward(tokens, labels, int((labels != -100).sum()), Place(), starts)
    made.backward(loss, last=True)
    total = float(world.sum(loss, alike=("tp",)))
    made.step(1.0)
    after = layout_study.whole_weights(made, world)
    made.close()
    gradients = {name: before[name] - after[name] for name in before}
    return {"loss": total, "gradients": gradients, "logits": logits.clone(), "part": sp.rank, "start": before}


def study(size: int) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Every layout of so many ranks."""
    found = {}
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        for layout, engine, model in RUNS:
            if LAYOUTS[layout].size == size:
                found[layout, engine, model] = run(layout_study.lay_out(ranks, LAYOUTS[layout]), engine, *MODELS[model])
    return found
