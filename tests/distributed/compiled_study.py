"""Two ranks train with compiled blocks and without, in both engines, for the tests to compare."""

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import tiny_run
import torch
import torch.distributed as dist
from layout_study import MEGALODON, lay_out
from torch._dynamo.utils import counters

from mega_scale.parallel import EngineConfig, ParallelConfig, Place, World, parallelize, seeded_values

DROPOUT = {"dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
DIVISIBLE = {"hidden_size": 24, "intermediate_size": 20, "nffn_hidden_size": 22}
SAVED = {"activation_checkpoint": 1, "activation_checkpoint_policy": "save_matmuls"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fsdp, rows shared, recomputed, documents": (
        {"engine": "fsdp", "sp": 2, "activation_checkpoint": 1},
        {"model_type": "megalodon"},
        "fp32",
    ),
    "fsdp, channels shared, matmuls saved, documents, weights dropped": (
        {"engine": "fsdp", "tp": 2} | SAVED,
        MEGALODON | DIVISIBLE | {"attention_probs_dropout_prob": 0.1},
        "fp32",
    ),
    "fsdp, segments, bf16": (
        {"engine": "fsdp", "activation_checkpoint_segment": 8, "activation_checkpoint": 1},
        {},
        "bf16",
    ),
    "ZeRO-3": (
        {"engine": "deepspeed", "ds_config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
        {},
        "fp32",
    ),
    "ZeRO-3, channels shared, recomputed, bf16": (
        {"engine": "deepspeed", "tp": 2, "activation_checkpoint": 1},
        DIVISIBLE,
        "bf16",
    ),
}
STEPS = 3
COLLECTIVES = ("all_gather_single", "reduce_scatter_single", "all_reduce")


def study() -> dict[str, Any]:

    # Inductor would take the time; what it compiles are these graphs.
    with (
        World.start(ParallelConfig(timeout_s=300)) as world,
        patch.object(torch, "compile", partial(torch.compile, backend="aot_eager_default_partitioner")),
    ):
        return {name: [_run(world, *case, compiled) for compiled in (False, True)] for name, case in CASES.items()}


def _run(
    world: World, settings: dict[str, Any], changes: dict[str, Any], dtype: str, compiled: bool
) -> tuple[list[float], list[float], int, int]:
    """Losses, norms of gradients, collectives of the last forward and backward, and graphs."""
    counters.clear()
    config = tiny_run.tiny_config(**DROPOUT | changes, num_hidden_layers=2)
    parallel = ParallelConfig(**settings)
    shared = parallel.sp * parallel.tp > 1  # rows
    world = lay_out(world, parallel.mesh(world.size))
    engine = parallelize(
        tiny_run.meta_model(config),
        seeded_values(config, tiny_run.SEED),
        EngineConfig(parallel, dtype=dtype, micro_batch_size=2, max_grad_norm=0.4, seed=5, compile=compiled),
        world,
        tiny_run.build_optimizer,
    )
    engine.module.train()
    losses, norms = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        first = 0 if shared else 2 * world.rank
        tokens = torch.randint(3, 67, (4, 33), generator=generator)[first : first + 2]
        starts = (torch.rand(4, 32, generator=generator) < 0.15)[first : first + 2] if shared else None
        with ExitStack() as stack:
            calls = [stack.enter_context(patch.object(dist, name, wraps=getattr(dist, name))) for name in COLLECTIVES]
            loss = engine.forward(tokens[:, :-1], tokens[:, 1:], 64, Place(step, first), document_starts=starts)
            engine.backward(loss, last=True)
        losses.append(float(world.sum(loss.detach(), alike=("tp",))))
        norms.append(engine.step(1e-2))
    engine.close()
    return losses, norms, sum(call.call_count for call in calls), counters["stats"].get("unique_graphs", 0)
