"""What two and four ranks do in every layout of the mesh, for the tests to compare with one process."""

from dataclasses import replace
from typing import Any

import engine_study
import tiny_run
import torch
from torch import Tensor

from mega_scale.parallel import (
    BuildOptimizer,
    Engine,
    EngineConfig,
    ParallelConfig,
    Place,
    World,
    parallelize,
    seeded_values,
)
from mega_scale.parallel.mesh import MeshShape
from mega_scale.parallel.shard import assemble, by_source, shardings
from mega_scale.parallel.world import join_axes

STEPS = 20  # of the plain variant, on two ranks
STEPS_OF_FOUR = 8  # of it on four, whose layouts combine those of two; campaigns/layout_steps.py takes 20
FEWER_STEPS = {"dropout-recomputed": 6, "bf16": 5}
FEWER_STEPS |= {"megalodon-plain": 5, "megalodon-dropout-recomputed": 4, "megalodon-bf16": 3}
ROWS = 4
LENGTH = 61  # fills 8 chunks of 8 but for 3 tokens
DROPOUT = dict.fromkeys(
    ("dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob", "nffn_activation_dropout_prob"), 0.1
) | {"embedding_dropout_prob": 0.1}
LAYOUTS = {
    "dp2": MeshShape(1, 2, 1, 1),
    "sp2": MeshShape(1, 1, 2, 1),
    "tp2": MeshShape(1, 1, 1, 2),
    "sp4": MeshShape(1, 1, 4, 1),
    "tp4": MeshShape(1, 1, 1, 4),
    "dp2-sp2": MeshShape(1, 2, 2, 1),
    "dp2-tp2": MeshShape(1, 2, 1, 2),
    "sp2-tp2": MeshShape(1, 1, 2, 2),
    "replicate2-sp2": MeshShape(2, 1, 2, 1),
}
# Two heads: one a rank of two, or for two ranks of four. Four: several a rank, or one.
MEGALODON: dict[str, Any] = {
    "model_type": "megalodon",
    "num_attention_heads": 2,
    "shared_representation_size": 16,
    "timestep_norm_groups": 4,
}
OTHER_MEGALODON = MEGALODON | {
    "num_attention_heads": 4,
    "swiglu": False,
    "rescale_nffn": False,
    "norm_affine": False,
    "tie_word_embeddings": True,
    "scale_embeddings": True,
    **dict.fromkeys(("dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1),
}
# Name: changes of the model, activation checkpointing, number format.
VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "plain": ({}, 0, "fp32"),
    "recomputed": ({}, 1, "fp32"),
    "dropout-recomputed": (DROPOUT, 1, "fp32"),
    "bf16": ({}, 0, "bf16"),
    "megalodon-plain": (MEGALODON, 0, "fp32"),
    "megalodon-dropout-recomputed": (OTHER_MEGALODON, 1, "fp32"),
    "megalodon-bf16": (MEGALODON, 0, "bf16"),
}
# Other models that share the arithmetic of tensor and sequence parallelism, in one layout that has both.
MODELS: dict[str, dict[str, Any]] = {
    "laplace-simple-scalenorm-untied": {
        "attention_activation": "laplace",
        "relative_positional_bias": "simple",
        "max_positions": 16,
        "normalization_type": "scalenorm",
        "tie_word_embeddings": False,
        "add_token_type_embeddings": True,
    },
    "relu2-rmsnorm-post-final": {
        "attention_activation": "relu2",
        "normalization_type": "rmsnorm",
        "normalize_before_mega": False,
        "normalize_before_ffn": False,
        "final_norm": True,
        "final_norm_affine": True,
        "add_lm_hidden_dense_layer": False,
        "lm_head_bias": False,
        "scale_embeddings": True,
    },
    "no-ffn-plain-norm-feature-dropout": {
        "use_normalized_ffn": False,
        "norm_affine": False,
        "use_feature_dropout": True,
        **DROPOUT,
    },
}


def lay_out(world: World, shape: MeshShape) -> World:
    """The same ranks on another mesh."""
    return replace(world, shape=shape, axes=join_axes(shape, world.rank, world.timeout_s))


def config(**changes: Any) -> Any:
    sizes = {"hidden_size": 24, "intermediate_size": 20, "nffn_hidden_size": 28, "vocab_size": 68}
    return tiny_run.tiny_config(**(sizes | {"num_hidden_layers": 2} | changes))


def global_batch(step: int, vocabulary: int = 68) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, vocabulary, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(ROWS):
        labels[row, 50 - 9 * row :] = -100
    return tokens[:, :-1].contiguous(), labels, int((labels != -100).sum())


def make_engine(
    world: World,
    engine: str,
    changes: dict[str, Any] | None = None,
    activation_checkpoint: int = 0,
    dtype: str = "fp32",
    values: int = tiny_run.SEED,
    build_optimizer: BuildOptimizer = tiny_run.build_optimizer,
    compile: bool = False,
    **recomputation: Any,
) -> Engine:
    """One of `engine_study.ENGINES` in the layout of a world, of a model with some changes and seeded values.

    `recomputation` are further keys of `ParallelConfig`.
    """
    shape = config(**(changes or {}))
    settings = engine_study.ENGINES[engine] | {"activation_checkpoint": activation_checkpoint} | recomputation
    return parallelize(
        tiny_run.meta_model(shape),
        seeded_values(shape, values),
        EngineConfig(
            ParallelConfig(**settings, **world.shape._asdict()),
            dtype=dtype,
            micro_batch_size=ROWS // world.shape.dp,
            max_grad_norm=0.4,
            seed=5,
            compile=compile,
        ),
        world,
        build_optimizer,
    )


def train(engine: Engine, world: World, steps: range, vocabulary: int = 68) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    dp, dp_rank = world.shape.dp, world.shape.dp_rank(world.rank)
    engine.module.train()
    rows = ROWS // dp
    for step in steps:
        inputs, labels, count = global_batch(step, vocabulary)
        mine = slice(dp_rank * rows, (dp_rank + 1) * rows)
        loss = engine.forward(inputs[mine], labels[mine], count, Place(step, dp_rank * rows))
        engine.backward(loss, last=True)
        losses.append(float(world.sum(loss, alike=("tp",))))
        norms.append(engine.step(3e-3))
    return losses, norms


def whole_weights(engine: Engine, world: World) -> dict[str, Tensor]:
    """The state dict's tensors, whole and on every rank, by their Hugging Face names; collective."""
    table, local = shardings(engine.module), engine_study.parts(engine.module)
    for name, sharding in table.items() if world.shape.tp > 1 else ():
        shards = [torch.empty_like(local[name]) for _ in range(world.shape.tp)]
        torch.distributed.all_gather(shards, local[name].contiguous(), group=world.axes["tp"].group)
        local[name] = sharding.join(shards)
    return {source: assemble(names, local.__getitem__) for source, names in by_source(table).items()}


def read_elsewhere(engine: Engine) -> list[tuple[str, str]]:
    """Modules that compute with a parameter of another one, and the parameter, as far as ZeRO-3 knows of them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return sorted(
        (name, names[key])
        for name, module in engine.module.named_modules()
        for key in getattr(module, "_external_params", ())
    )


def run(world: World, engine: str, variant: tuple[dict[str, Any], int, str], steps: int = STEPS) -> dict[str, Any]:
    made = make_engine(world, engine, *variant)
    start, known = whole_weights(made, world), read_elsewhere(made)
    losses, norms = train(made, world, range(steps))
    found = {"losses": losses, "norms": norms, "start": start, "end": whole_weights(made, world)}
    found["read elsewhere"] = known, read_elsewhere(made)
    made.close()
    return found


MODEL_STEPS = 4


def steps_of(layout: str, variant: str) -> int:
    return FEWER_STEPS.get(variant, STEPS if LAYOUTS[layout].size == 2 else STEPS_OF_FOUR)


def alone() -> dict[tuple[str, int], dict[str, Any]]:
    """One process, by variant or model, and steps."""
    runs = {(variant, steps_of(name, variant)): VARIANTS[variant] for name, _, variant in RUNS}
    runs |= {(name, MODEL_STEPS): (model, 0, "fp32") for name, model in MODELS.items()}
    with World.start(ParallelConfig()) as world:
        return {key: run(world, "fsdp-3", made, key[1]) for key, made in runs.items() if made[2] == "fp32"}


# Every pair of layout and engine, of layout and variant, and of engine and variant. Recomputation comes with dropout:
# without it, there is less that could differ.
RUNS = [
    (layout, ("fsdp-3", "zero-3")[(row + column) % 2], variant)
    for row, layout in enumerate(LAYOUTS)
    for column, variant in enumerate(("plain", "dropout-recomputed", "bf16"))
]
# Every layout, and every pair of engine and variant; campaigns/layout_steps.py has all of them.
RUNS += [
    (layout, ("fsdp-3", "zero-3")[row % 2], ("megalodon-plain", "megalodon-dropout-recomputed")[row // 2 % 2])
    for row, layout in enumerate(LAYOUTS)
]
RUNS += [("sp2-tp2", "zero-3", "megalodon-bf16")]


def study(size: int) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Every layout of so many ranks."""
    found = {}
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        for name, engine, variant in RUNS:
            if LAYOUTS[name].size == size:
                world = lay_out(ranks, LAYOUTS[name])
                found[name, engine, variant] = run(world, engine, VARIANTS[variant], steps_of(name, variant))
    return found


def study_models() -> dict[tuple[str, str], dict[str, Any]]:
    """Other models, in the layout that cuts both rows and channels."""
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        world = lay_out(ranks, LAYOUTS["sp2-tp2"])
        return {
            (name, engine): run(world, engine, (model, 1, "fp32"), MODEL_STEPS)
            for name, model in MODELS.items()
            for engine in ("fsdp-3", "zero-3")
        }
