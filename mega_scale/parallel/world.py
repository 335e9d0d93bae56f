"""The processes of a run: their groups along the dimensions of the mesh, and collectives with and without gradients.

A block that is recomputed in the backward pass repeats no collective of its forward pass (`Received`).

Legend: T ranks of the group, D width of the whole, (...) any leading sizes.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import register_constant

from mega_scale.ops import in_memory, once_differentiable, opaque, operator, tracing
from mega_scale.parallel.config import ParallelConfig
from mega_scale.parallel.mesh import MeshShape, placement
from mega_scale.settings import require

if TYPE_CHECKING:
    from mega_scale.parallel.monitor import PeerMonitor


class Pending:
    """A tensor on its way into a buffer, and the work to wait for."""

    def __init__(self, buffer: Tensor, work: Any) -> None:
        self.buffer, self._work = buffer, work

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self.buffer


class Received:
    """What a block that is recomputed got from other ranks in its forward pass: it gets it again, and sends nothing."""

    def __init__(self, saves_matmuls: bool = False) -> None:
        self.saves_matmuls = saves_matmuls  # whether results of products are saved, with what travelled beside them
        self._kept: deque[Tensor] | None = None  # in a block that is recomputed
        self._again = False

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a block's forward and of its recomputation, which takes what the forward received."""
        kept: deque[Tensor] = deque()
        return self._keeping(kept, again=False), self._keeping(kept, again=True)

    @contextmanager
    def _keeping(self, kept: deque[Tensor], again: bool) -> Iterator[None]:
        self._kept, self._again = kept, again
        try:
            yield
        finally:
            self._kept = None

    @property
    def keeps(self) -> bool:
        """Whether what is received now is kept for recomputation."""
        return self._kept is not None and not self._again

    def start(self, begin: Callable[[], Pending]) -> Pending:
        """What `begin` starts to receive, or what it received in the forward pass."""
        if self._kept is not None and self._again:
            return Pending(self._kept.popleft(), None)
        pending = begin()
        if self._kept is not None:
            self._kept.append(pending.buffer.detach())  # autograd will give the tensor itself a history
        return pending


# Operators take numbers and tensors: a graph names the axis of a collective by its number.
_numbered: WeakValueDictionary[int, "Axis"] = WeakValueDictionary()
_numbers = count()


@dataclass(unsafe_hash=True)  # frozen ones are no constants to compilers
class Axis:
    """One dimension of the mesh as this rank sees it, never changed; equal ones are alike to compilers."""

    group: dist.ProcessGroup | None  # None stands for a rank alone
    rank: int
    size: int
    received: Received | None = None  # of a model whose blocks may be recomputed
    overlaps: bool = False  # whether products and collectives that adjoin them are one operator, see `overlap`
    number: int = field(default_factory=_numbers.__next__, init=False, compare=False)

    def __post_init__(self) -> None:
        _numbered[self.number] = self

    def start(self, begin: Callable[[], Pending], *, product: bool = False) -> Pending:
        """Start a collective without gradients of a forward pass, which a recomputed block does not repeat.

        `product` says that it travels beside a matrix product: whoever saves results of these has it with them.
        """
        received = self.received
        return begin() if received is None or (product and received.saves_matmuls) else received.start(begin)

    @classmethod
    def numbered(cls, number: int) -> "Axis":
        """The axis of a number, by which operators name it."""
        return _numbered[number]


register_constant(Axis)
ALONE = Axis(None, 0, 1)


def start_gather(x: Tensor, axis: Axis) -> Pending:
    """Start to collect the x of all ranks: (T, *x.shape); without gradients."""
    out = x.new_empty(axis.size, *x.shape)
    work = dist.all_gather_single(out.view(-1), x.contiguous().view(-1), group=axis.group, async_op=True)
    return Pending(out, work)


def _gather(x: Tensor, axis: Axis) -> Tensor:
    return start_gather(x, axis).wait()


def _gather_columns(x: Tensor, axis: Axis) -> Tensor:
    return _gather(x, axis).movedim(0, -2).flatten(-2)


def _scatter_columns(x: Tensor, axis: Axis) -> Tensor:
    parts = x.unflatten(-1, (axis.size, -1)).movedim(-2, 0).contiguous()
    out = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_single(out.view(-1), parts.view(-1), group=axis.group)
    return out


def _sum(x: Tensor, axis: Axis) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total


def _join_moments(x: Tensor, axis: Axis) -> Tensor:
    # Means and squared distances from them combine without cancellation, unlike sums of squares.
    means, variances = _gather(x, axis).unbind(1)
    mean = means.mean(0)
    return torch.stack([mean, variances.mean(0) + (means - mean).square().mean(0)])


_COLLECTIVES = {
    "gather": _gather,  # (...) to (T, ...)
    "gather columns": _gather_columns,  # (..., D / T) to (..., D)
    "scatter columns": _scatter_columns,  # (..., D), summed, to (..., D / T)
    "sum": _sum,
    "join moments": _join_moments,  # (2, ...): mean and variance of as many numbers on each rank, to those of all
}


def collective(x: Tensor, axis: Axis, kind: str, forward: bool = True) -> Tensor:
    """A collective of `_COLLECTIVES` without gradients, awaited; a recomputed block repeats none of a forward pass."""
    if tracing() is not None:
        return _collective(x, kind, axis.size, axis.number, forward)
    if not forward:
        return _COLLECTIVES[kind](x, axis)
    return axis.start(lambda: Pending(_COLLECTIVES[kind](x, axis), None)).wait()


def _like_outcome(x: Tensor, kind: str, size: int, number: int, forward: bool) -> Tensor:
    *more, last = x.shape
    sizes = {"gather": (size, *more, last), "gather columns": (*more, last * size)}
    return x.new_empty(sizes.get(kind, (*more, last // size if kind == "scatter columns" else last)))


@operator(_like_outcome)
def _collective(x: Tensor, kind: str, size: int, number: int, forward: bool) -> Tensor:
    axis = Axis.numbered(number)
    outcome = collective(x, axis, kind, forward)
    # Compilers write into what an operator returned once they have read it.
    return outcome.clone() if forward and axis.received is not None and axis.received.keeps else outcome


_Map = Callable[[Tensor], Tensor]


class _WithBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: _Map, backward: _Map) -> Tensor:
        ctx.turned = backward
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.turned(gradient), None, None


def with_backward(x: Tensor, forward: _Map, backward: _Map) -> Tensor:
    """`forward(x)`, whose gradient is `backward` of its output's."""
    return _WithBackward.apply(x, forward, backward)


@opaque
def gather(x: Tensor, axis: Axis) -> Tensor:
    """The columns of all ranks side by side, (..., D / T) to (..., D); gradients are summed and scattered."""
    return with_backward(
        x,
        lambda x: collective(x, axis, "gather columns"),
        lambda gradient: collective(gradient, axis, "scatter columns", forward=False),
    )


def gather_replicated(x: Tensor, axis: Axis) -> Tensor:
    """The columns of all ranks side by side, of which every rank computes the same: gradients are not summed."""

    def own(gradient: Tensor) -> Tensor:
        return gradient.unflatten(-1, (axis.size, -1))[..., axis.rank, :].contiguous()

    return with_backward(x, lambda x: collective(x, axis, "gather columns"), own)


@opaque
def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Sum over ranks, each keeping its columns: (..., D) to (..., D / T); gradients are gathered."""
    return with_backward(
        x,
        lambda x: collective(x, axis, "scatter columns"),
        lambda gradient: collective(gradient, axis, "gather columns", forward=False),
    )


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total = collective(torch.cat([gradient.flatten() for gradient in gradients]), ctx.axis, "sum", forward=False)
        parts = total.split([gradient.numel() for gradient in gradients])
        return None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))


@opaque
def sum_gradients(axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as they are, every rank holding the same; their gradients, of which each has a part, are summed at once.

    All are of one dtype.
    """
    found: tuple[Tensor, ...] = _SumGradients.apply(axis, *tensors)
    return found


def share_cores(local_size: int) -> None:
    """Compute with no more threads than cores are left for each rank of this machine, unless OMP_NUM_THREADS is set."""
    # Deepspeed's launcher lets a process take as many threads as there are cores: the ranks' threads then wait for each
    # other, and a step on CPUs takes several times as long. torchrun and accelerate set the variable to 1.
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(min(torch.get_num_threads(), max(1, len(os.sched_getaffinity(0)) // local_size)))


@dataclass(frozen=True)
class World:
    """All ranks of a run; every method is collective, so all ranks call it in the same order.

    Use it in a `with` statement: when a rank fails, is killed or cannot be reached, the others end at once rather than
    after the timeout, with exit code 75 and one line that names it.
    """

    rank: int  # 0 to size - 1
    size: int
    local_rank: int  # on this machine
    device: torch.device
    shape: MeshShape  # ranks along each dimension of the mesh
    axes: dict[str, Axis]  # dp_replicate, fsdp (dp_shard and sp together), sp and tp
    monitor: "PeerMonitor | None"  # watches the other ranks; None where there are none
    timeout_s: float  # longest wait of one rank for the others
    store: dist.Store  # keys and values that all ranks share
    pretended: bool = False  # whether this rank has no others: see `pretend`
    waits: str = ""  # why collectives of tp are waited for; empty where `Axis.overlaps` or there are none
    # Around all that gives an engine's model and optimizer memory; entered once an engine.
    memory: Callable[[], AbstractContextManager[Any]] = nullcontext
    _gathers: Iterator[int] = field(default_factory=count)  # numbers them

    @classmethod
    def start(cls, config: ParallelConfig) -> "World":
        """Join the process group, NCCL on CUDA and gloo on CPUs, and share this machine's cores with its other ranks.

        Raises ValueError where the launcher's variables are incomplete, the mesh does not hold the ranks, there are
        fewer CUDA devices than local ranks, or ranks that are to overlap collectives of tp cannot; SystemExit, after a
        line that says who is missing, where not all come.
        """
        rank, size, local_rank, local_size = placement()
        share_cores(local_size)
        device, shape = _device(config.device, local_rank), config.mesh(size)
        backend, timeout = "gloo", timedelta(seconds=config.timeout_s)
        if device.type == "cuda":
            backend = "nccl"
            torch.cuda.set_device(device)
            # NCCL's watchdog would abort a victim of another rank before the monitor has named that one.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        monitor = None
        if size > 1:
            from mega_scale.parallel.monitor import PeerMonitor

            monitor = PeerMonitor(rank, size, config.timeout_s)
        # Alone, a process needs no port that another could hold.
        store = dist.HashStore() if monitor is None else monitor.store
        try:
            used = device if backend == "nccl" else None
            dist.init_process_group(backend, timeout=timeout, world_size=size, rank=rank, store=store, device_id=used)
            axes = join_axes(shape, rank, config.timeout_s)
            axes["tp"], waits = _overlapping(axes["tp"], config, device)
        except Exception as error:
            if monitor is not None:
                monitor.leave(error)
            raise
        return cls(rank, size, local_rank, device, shape, axes, monitor, config.timeout_s, store, waits=waits)

    @classmethod
    def pretend(
        cls,
        rank: int,
        size: int,
        config: ParallelConfig,
        local_size: int | None = None,
        memory: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> "World":
        """One rank of a run of `size` that nobody else is in, on the CPU: collectives leave what they fill as it was.

        `local_size` is the number of ranks on a host, None where all are on one. What ranks tell each other is what
        this one says. With a `memory` of fake tensors, an engine takes none, and `number` knows no numbers. GPUs that
        are pretended (`ops.as_if`) reach each other's memory.

        Raises ValueError where the mesh does not hold the ranks, or `rank` is none of them.
        """
        from torch.testing._internal.distributed.fake_pg import FakeStore

        shape = config.mesh(size)
        require(0 <= rank < size, "rank", rank, f"choose one of the {size} ranks, 0 to {size - 1}")
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        axes = join_axes(shape, rank, config.timeout_s)
        local_rank, device = rank % (local_size or size), torch.device("cpu")
        axes["tp"], waits = _overlapping(axes["tp"], config, None)
        store = dist.HashStore()
        return cls(rank, size, local_rank, device, shape, axes, None, config.timeout_s, store, True, waits, memory)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Leave the process group; the rank that keeps the ranks' store waits for all to leave."""
        if self.monitor is not None:
            self.monitor.leave(error)
        # After an error NCCL would wait for collectives that never end: the end of the process closes its connections.
        if error is not None and dist.get_backend() == "nccl":
            return
        if dist.get_backend() == "gloo":
            # gloo's threads take the interpreter's lock to drop the tensors of their last collective, and abort the
            # process if they ask for it when the interpreter is already ending.
            time.sleep(0.1)
        dist.destroy_process_group()

    def place(self, rank: int) -> tuple[int, int, int]:
        """The numbers of any rank along dp_replicate, fsdp and tp; not collective."""
        fsdp, tp = self.axes["fsdp"].size, self.axes["tp"].size
        return rank // (fsdp * tp), rank // tp % fsdp, rank % tp

    def number(self, value: Tensor, unknown: float = 1.0) -> float:
        """The number of a scalar tensor of this rank, for which the host waits; `unknown` of a tensor without numbers.

        Engines read from the device by this only, so that they can be run on fake tensors.
        """
        return unknown if self.pretended and not in_memory(value) else float(value)

    def numbers(self, values: Tensor, unknown: list[int]) -> list[int]:
        """The same of several numbers, (n,) int64."""
        return unknown if self.pretended and not in_memory(values) else values.tolist()

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def sum(self, value: Tensor, alike: Sequence[str] = ()) -> Tensor:
        """Sum over all ranks of a tensor of one shape and dtype, on this rank's device.

        Ranks along the axes `alike` hold the same value, which counts once.
        """
        total = value.detach().to(self.device, copy=True)
        if any(self.axes[name].rank for name in alike):
            total.zero_()
        dist.all_reduce(total)
        return total

    def all_gather(self, value: Tensor) -> Tensor:
        """Every rank's tensor, of one shape and dtype, stacked in the order of ranks on the CPU of all ranks."""
        return start_gather(value.detach().to(self.device), Axis(None, self.rank, self.size)).wait().cpu()

    def all_agree(self, flag: bool) -> bool:
        """Whether a flag is true on every rank; the same answer on all ranks."""
        if self.pretended:
            return flag
        return int(self.sum(torch.tensor(int(flag)))) == self.size

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on all ranks, as JSON gives it back (a tuple comes as a list): no code travels."""
        if self.pretended:
            return json.loads(json.dumps(value))
        payload = torch.tensor(list(json.dumps(value).encode()) if self.rank == 0 else [], dtype=torch.uint8)
        length = torch.tensor(len(payload), device=self.device)
        dist.broadcast(length, src=0)
        data = payload.to(self.device) if self.rank == 0 else payload.new_zeros(int(length), device=self.device)
        dist.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))

    def first(self, value: Any) -> Any:
        """The value of the first rank that has one, on all ranks, as JSON gives it back; None where none has."""
        if self.all_agree(value is None):
            return None
        found = self.gather(value)
        return self.broadcast(found and next((other for other in found if other is not None), None))

    def gather(self, value: Any) -> list[Any] | None:
        """On rank 0, the values of all ranks in their order, as JSON gives them back; None on the others.

        By the store: NCCL would connect rank 0 to every other rank for it, and keep those connections.
        """
        if self.pretended:
            return [json.loads(json.dumps(value))] * self.size if self.rank == 0 else None
        number = next(self._gathers)
        keys = [f"gather/{number}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], json.dumps(value))
        if self.rank > 0:
            return None
        found = [json.loads(self.store.get(key)) for key in keys]
        for key in keys:
            self.store.delete_key(key)
        return found


def join_axes(shape: MeshShape, rank: int, timeout_s: float) -> dict[str, Axis]:
    """Make the groups of one rank, one call an axis however many ranks there are; collective.

    An axis of one rank has no group, except fsdp: engines shard over one rank as over several.
    """
    ranks = torch.arange(shape.size, device="cpu").view(tuple(shape))
    found: dict[str, Axis] = {}
    for name, dims in {"dp_replicate": [0], "fsdp": [1, 2], "sp": [2], "tp": [3]}.items():
        lines = ranks.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims)).flatten(0, -2)
        own = next(line for line in lines.tolist() if rank in line)
        group, timeout = None, timedelta(seconds=timeout_s)
        if len(lines) == 1:
            group = dist.group.WORLD
        elif dist.get_backend() == "nccl" and (len(own) > 1 or name == "fsdp"):
            group = dist.split_group(split_ranks=lines.tolist(), timeout=timeout, group_desc=name)
        elif len(own) > 1 or name == "fsdp":
            group = dist.new_group(own, timeout=timeout, use_local_synchronization=True, group_desc=name)
        found[name] = Axis(group, own.index(rank), len(own))
    return found


def _overlapping(tp: Axis, config: ParallelConfig, device: torch.device | None) -> tuple[Axis, str]:
    """The axis with products beside its collectives, or as it is with the reason; collective.

    Without a device, GPUs are taken to reach each other's memory. Raises ValueError where they have to, and do not.
    """
    if tp.group is None or tp.size == 1:
        return tp, ""
    waits = "parallel.tp_overlap=false" if config.tp_overlap is False else config.overlap_problem() or ""
    if not waits and device is not None:
        from mega_scale.parallel.symmetric_memory import unreachable

        waits = unreachable(tp.group, device)
    require(not (waits and config.tp_overlap), "parallel.tp_overlap", True, f"{waits}, or remove parallel.tp_overlap")
    return (tp, waits) if waits else (replace(tp, overlaps=True), "")


def _device(choice: str, local_rank: int) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and os.environ.get("SLURM_GPUS_PER_TASK") == "1":
        return torch.device("cuda", 0)  # srun --gpus-per-task=1 shows each task its own GPU only
    remedy = (
        f"local rank {local_rank} is beyond this machine's {count} CUDA devices, start fewer processes, or use CPUs"
    )
    require(local_rank < count, "parallel.device", choice, remedy)
    return torch.device("cuda", local_rank)
