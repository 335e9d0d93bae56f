"""What two real ranks hold and send in a step, beside what a plan of the same run says."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mega_scale.config import RunConfig, parse
from mega_scale.parallel import ParallelConfig, World
from mega_scale.parallel.costs import tensors_in
from mega_scale.parallel.devices import Device
from mega_scale.planner.trace import Cluster, Trace, follow, follow_in, prepare

SIZES = """model.vocab_size=512 model.hidden_size=64 model.intermediate_size=128 model.nffn_hidden_size=128
    model.shared_representation_size=32 model.ema_projection_size=4 model.num_hidden_layers=2 model.chunk_size=64
    data.sequence_length=256 train.global_batch_size=4 train.micro_batch_size=1 train.eval_every=0 train.sample_every=0
    train.steps=10 schedule.warmup_steps=0 parallel.device=cpu"""
MEGALODON = "model.type=megalodon model.num_attention_heads=2 model.timestep_norm_groups=4"
RECOMPUTED = "parallel.activation_checkpoint=1"
MUON = "optimizer.name=muon"
CASES = {
    "fsdp dp2, two micro-batches": "parallel.engine=fsdp",
    "fsdp sp2": "parallel.engine=fsdp parallel.sp=2",
    "fsdp tp2": "parallel.engine=fsdp parallel.tp=2",
    "fsdp dp2, bf16": "parallel.engine=fsdp train.dtype=bf16",
    "fsdp sp2, recomputed": f"parallel.engine=fsdp parallel.sp=2 {RECOMPUTED}",
    "fsdp tp2, products kept": "parallel.engine=fsdp parallel.tp=2 parallel.activation_checkpoint_policy=save_matmuls "
    + RECOMPUTED,
    "fsdp dp2, segments": f"parallel.engine=fsdp parallel.activation_checkpoint_segment=64 {RECOMPUTED}",
    "fsdp stage 2": "parallel.engine=fsdp parallel.zero_stage=2",
    "fsdp stage 1": "parallel.engine=fsdp parallel.zero_stage=1",
    "fsdp sp2, megalodon": f"parallel.engine=fsdp parallel.sp=2 {MEGALODON}",
    "fsdp tp2, megalodon, recomputed": f"parallel.engine=fsdp parallel.tp=2 {RECOMPUTED} {MEGALODON}",
    "fsdp dp2, documents": "parallel.engine=fsdp data.packing=reset",
    "fsdp sp2, megalodon, documents, recomputed": f"parallel.engine=fsdp parallel.sp=2 data.packing=reset {RECOMPUTED} "
    + MEGALODON,
    "zero-3 dp2": "parallel.engine=deepspeed",
    "zero-2 sp2": "parallel.engine=deepspeed parallel.zero_stage=2 parallel.sp=2",
    "zero-1 dp2, bf16": "parallel.engine=deepspeed parallel.zero_stage=1 train.dtype=bf16",
    "fsdp dp2, muon": f"parallel.engine=fsdp {MUON}",
    "fsdp sp2, muon, megalodon": f"parallel.engine=fsdp parallel.sp=2 {MUON} {MEGALODON}",
    "fsdp tp2, muon, bf16": f"parallel.engine=fsdp parallel.tp=2 train.dtype=bf16 {MUON}",
    "zero-1 tp2, muon": f"parallel.engine=deepspeed parallel.zero_stage=1 parallel.tp=2 {MUON}",
    "zero-2 sp2, muon": f"parallel.engine=deepspeed parallel.zero_stage=2 parallel.sp=2 {MUON}",
    "zero-3 dp2, muon": f"parallel.engine=deepspeed {MUON}",
}


class _OnCopies(TorchDispatchMode):
    """Collectives work on copies, and are done when they are called.

    A thread of gloo holds its tensors for a moment after it has told that a collective is done, or for long where the
    machine is busy, so that a peak would have them by chance.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d" or "Work" not in str(func._schema.returns[-1].type):
            return func(*args, **(kwargs or {}))
        copies = tree_map_only(Tensor, Tensor.clone, args)
        result = func(*copies, **(kwargs or {}))
        work = result[-1] if isinstance(result, tuple | list) else result
        dist.Work.unbox(work).wait()
        for tensor, copied in zip(tensors_in(args), tensors_in(copies), strict=True):
            tensor.copy_(copied)
        return (args[0], work) if isinstance(result, tuple | list) else work


def run_of(words: str, sizes: str = SIZES) -> RunConfig:
    return parse([*sizes.split(), *words.split()])


def as_planned(config: RunConfig, ranks: int = 2) -> tuple[Any, Any, Cluster]:
    cluster = Cluster(1, ranks, Device.named("cpu"))
    return *prepare(config, cluster), cluster


def real(cases: dict[str, str], sizes: str = SIZES) -> dict[str, dict[str, Any]]:
    """Traces of real tensors, on every rank."""
    with World.start(ParallelConfig(device="cpu")) as world:
        return _real(world, cases, sizes)


def _real(
    world: World, cases: dict[str, str], sizes: str, change: Callable[[World], World] | None = None
) -> dict[str, dict[str, Any]]:
    found = {}
    torch.manual_seed(0)
    for case, words in cases.items():
        config, model, cluster = as_planned(run_of(words, sizes), world.size)
        own = lay_out(world, config)
        with _OnCopies():
            found[case] = asdict(follow_in(own if change is None else change(own), config, model, cluster))
    return found


def both(cases: dict[str, str], beside: dict[str, str]) -> dict[Any, dict[str, Any]]:
    """The same, and by (case, True) those of products with collectives beside them."""
    from symmetric_memory import on_cpus, overlapping  # noqa: PLC0415

    with World.start(ParallelConfig(device="cpu")) as world, on_cpus():
        overlapped = _real(world, beside, SIZES, overlapping)
        return {**_real(world, cases, SIZES), **{(case, True): found for case, found in overlapped.items()}}


def lay_out(world: World, config: RunConfig) -> World:
    """The same ranks on the mesh of a run."""
    from mega_scale.parallel.world import join_axes  # noqa: PLC0415

    shape = config.parallel.mesh(world.size)
    return replace(world, shape=shape, axes=join_axes(shape, world.rank, world.timeout_s))


def planned(words: str, rank: int, sizes: str = SIZES, ranks: int = 2) -> Trace:
    config, model, cluster = as_planned(run_of(words, sizes), ranks)
    return follow(config, model, cluster, rank)
