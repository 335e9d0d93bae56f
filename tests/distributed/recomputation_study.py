"""Two ranks recompute blocks in bf16, in every engine and way, for the tests to compare."""

from typing import Any

import tiny_run

from mega_scale.parallel import EngineConfig, ParallelConfig, World, parallelize, seeded_values

ENGINES = {"fsdp-3": ("fsdp", 3), "fsdp-1": ("fsdp", 1), "zero-2": ("deepspeed", 2)}
# Every, policy, tokens of a segment.
WAYS: dict[str, tuple[int, str, int]] = {
    "not": (0, "full", 0),
    "save_matmuls": (1, "save_matmuls", 0),
    "every second": (2, "save_matmuls", 0),
    "segments": (1, "full", 8),
    "save_matmuls of segments": (1, "save_matmuls", 8),
}
RUNS = [("fsdp-3", "plain"), ("fsdp-3", "dropout"), ("fsdp-1", "plain"), ("zero-2", "plain")]
_DROPOUT = {"dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "nffn_activation_dropout_prob": 0.1}


def study() -> dict[tuple[str, str, str], tuple[list[float], list[float]]]:
    with World.start(ParallelConfig(timeout_s=120)) as world:
        return {(engine, model, way): _run(world, engine, model, way) for engine, model in RUNS for way in WAYS}


def _run(world: World, engine: str, model: str, way: str) -> tuple[list[float], list[float]]:
    config = tiny_run.tiny_config(**(_DROPOUT if model == "dropout" else {}), num_hidden_layers=2)
    named, stage = ENGINES[engine]
    every, policy, segment = WAYS[way]
    settings: dict[str, Any] = {
        "engine": named,
        "zero_stage": stage,
        "activation_checkpoint": every,
        "activation_checkpoint_policy": policy,
        "activation_checkpoint_segment": segment,
    }
    made = parallelize(
        tiny_run.meta_model(config),
        seeded_values(config, tiny_run.SEED),
        EngineConfig(
            ParallelConfig(**settings),
            dtype="bf16",
            micro_batch_size=2,
            accumulation=tiny_run.ACCUMULATION,
            max_grad_norm=tiny_run.MAX_GRAD_NORM,
        ),
        world,
        tiny_run.build_optimizer,
    )
    found = tiny_run.train(made, world, range(2))
    made.close()
    return found
