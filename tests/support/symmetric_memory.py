"""PyTorch's operators over symmetric memory on CPUs.

`REFERENCE` is what PyTorch has for tensors without memory: a collective, and a product. `DIVIDED` is what it does on
GPUs, products by ranks with their sums and roundings, but for how parts travel, which is simulated over gloo.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric

from mega_scale.parallel import World

_MM = torch.ops.aten.mm.out


class _Event:
    """In place of CUDA's: on a CPU, everything happens in order."""

    def wait(self) -> None: ...

    def record(self) -> None: ...


def _gather(shard: Tensor, consume: Callable[[Tensor, int], None], out: Tensor, name: Any, needed: bool = True) -> None:
    group: Any = dist.distributed_c10d._resolve_process_group(name)
    parts = out.chunk(group.size())
    dist.all_gather(list(parts), shard.contiguous(), group=group)
    for step in range(group.size()):  # this rank's own part comes first
        rank = (group.rank() + step) % group.size()
        consume(parts[rank], rank)


def _scatter(produce: Callable[[int, Tensor], None], out: Tensor, name: Any, out_chunk_dim: int = 0) -> None:
    group: Any = dist.distributed_c10d._resolve_process_group(name)
    parts = out.chunk(group.size(), out_chunk_dim)
    made = [torch.empty(part.shape, dtype=part.dtype) for part in parts]
    for rank, part in enumerate(made):
        produce(rank, part)
    received = torch.empty(len(parts), *parts[0].shape, dtype=out.dtype)
    dist.all_to_all_single(received.view(-1), torch.stack(made).view(-1), group=group)
    for part, own in zip(parts, received, strict=True):
        part.copy_(own)


def _divided_gather(x: Tensor, factors: list[Tensor], dim: int, name: Any, *, return_A: bool = True) -> Any:
    dtypes: list[torch.dtype | None] = [factor.dtype for factor in factors]
    return symmetric._fused_all_gather_matmul_impl(
        _MM, x, factors, None, [{} for _ in factors], dtypes, dim, name, return_A
    )


def _divided_scatter(x: Tensor, factor: Tensor, operation: str, dim: int, name: Any) -> Tensor:
    return symmetric._fused_matmul_reduce_scatter_impl(_MM, x, factor, {}, x.dtype, operation, dim, name)


REFERENCE = symmetric._fused_all_gather_matmul_fallback, symmetric._fused_matmul_reduce_scatter_fallback
DIVIDED = _divided_gather, _divided_scatter


@contextmanager
def on_cpus(form: tuple[Callable[..., Any], Callable[..., Any]] = REFERENCE) -> Iterator[None]:
    """Give the operators a form on CPUs."""
    library = torch.library.Library("symm_mem", "IMPL")
    for name, function in zip(("fused_all_gather_matmul", "fused_matmul_reduce_scatter"), form, strict=True):
        library.impl(name, function, "CPU")
    try:
        with (
            patch.object(symmetric, "_pipelined_all_gather_and_consume_last_dim", _gather),
            patch.object(symmetric, "_pipelined_produce_and_all2all", _scatter),
            patch.object(torch.cuda, "Event", _Event),
        ):
            yield
    finally:
        library._destroy()


def overlapping(world: World) -> World:
    """The same ranks, whose products and collectives of tp are one operator."""
    return replace(world, axes=world.axes | {"tp": replace(world.axes["tp"], overlaps=True)}, waits="")
