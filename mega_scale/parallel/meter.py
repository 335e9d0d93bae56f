"""Meters what a rank does: memory, collectives, and the bytes and operations of every operator it calls.

A `Meter` counts real and fake tensors alike, so a step that is followed on fake ones, without a GPU or without memory,
has the peak, the collectives and the operators of the same step on real ones.

Forward and backward are told apart by PyTorch's autograd; the module of an operator in the backward pass is the one
whose forward pass made the node that runs. Both follow the thread that enters the meter, where a CPU's backward runs.
"""

import bisect
import gc
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mega_scale.parallel.costs import BESIDE, Beside, Call, cost, tensors_in

ROUNDED = 512
"""What PyTorch's allocator of GPUs rounds a tensor's bytes up to."""
# Operator of PyTorch's c10d library: whether its first tensor argument is filled rather than sent.
_FILLS = {
    "_allgather_base_": True,
    "allgather_": True,
    "_reduce_scatter_base_": True,
    "reduce_scatter_": True,
    "allreduce_": False,
    "broadcast_": False,
    "allgather_into_tensor_coalesced_": True,
    "reduce_scatter_tensor_coalesced_": True,
    "alltoall_base_": True,
    "send": False,
}
_KINDS = {"forward": "activations", "backward": "temporary", "recompute": "recomputed", "optimizer": "optimizer"}
GATHERED = "gathered"
"""Kind of storages that were resized, as FSDP does with the weights that it gathers and drops."""


class Sent(NamedTuple):
    """One collective.

    Args:
        operation: name of the operator in c10d, such as `_allgather_base_`.
        group: name of the process group.
        shape: of the tensor that this rank puts in.
        bytes: of that tensor.
        module, phase: where it was called, as of an `Event`.
        beside: the product that it travels beside, both divided by ranks; none where it is waited for.
    """

    operation: str
    group: str
    shape: tuple[int, ...]
    bytes: int
    module: str = ""
    phase: str = "forward"
    beside: "Event | None" = None


class Event(NamedTuple):
    """One operator that did something: neither a view nor an allocation.

    Args:
        name: as `aten::mm`.
        read, written: bytes, each tensor once.
        flops: of matrix products, and of custom operators that say theirs; two a multiply-add.
        kernels: launches on a GPU.
        dtype: of its products, else of its first tensor, as `bfloat16`.
        module: the innermost module that called it, by its name in the model; "" outside.
        phase: forward, backward, recompute (forward again in the backward pass), or what `Meter.during` says.
        inputs, outputs: (number of a storage, bytes of it) that were read and written; numbers are never used again.
    """

    name: str
    read: int
    written: int
    flops: int
    kernels: float
    dtype: str
    module: str
    phase: str
    inputs: tuple[tuple[int, int], ...] = ()
    outputs: tuple[tuple[int, int], ...] = ()


class _Storage(NamedTuple):
    reference: "weakref.ref[torch.UntypedStorage]"
    number: int
    size: int
    kind: str
    module: str


class Meter(TorchDispatchMode):
    """Meters what happens in its `with` statement, in this thread; enter it after a `FakeTensorMode`.

    Names of modules are those of `model`, else their classes'. With `events=False` operators are not listed.

    Attributes:
        live: bytes now, by kind and module.
        total, peak: bytes now, and the most at one time.
        at_peak: bytes at the peak by kind (activations, temporary, recomputed, optimizer, gathered, or what `label`
            and `during` say) and module that made them.
        sent: collectives, in order.
        events: operators, in order.
    """

    def __init__(self, model: nn.Module | None = None, *, events: bool = True) -> None:
        super().__init__()
        self.live: Counter[tuple[str, str]] = Counter()
        self.total = self.peak = 0
        self.sent: list[Sent] = []
        self.events: list[Event] = []
        self._lists_events = events
        self._names = {} if model is None else {module: name for name, module in model.named_modules()}
        self._storages: dict[int, _Storage] = {}
        self._numbers = itertools.count(1)
        self._at_peak: Counter[tuple[str, str]] | None = Counter()  # none while the peak is now
        self._phase: str | None = None
        self._modules: list[str] = []
        # Where autograd's numbering of nodes was when the module changed.
        self._changes: list[int] = []
        self._changed_to: list[str] = []
        self._ignored = 0
        self._entered = ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Count what compiled functions do, and not what compilers do."""
        return True

    @property
    def at_peak(self) -> Counter[tuple[str, str]]:
        return +(self.live if self._at_peak is None else self._at_peak)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count as this phase what happens inside, such as `optimizer`."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of tensors, known or not, as `kind`: parameters, gradients, moments."""
        for tensor in tensors:
            storage = _local(tensor).untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is None:
                self._follow(storage, kind)
            else:
                self._move(storage._cdata, known, known.size, kind)

    def restart(self) -> None:
        """Forget events, collectives and the peak so far; what is alive stays known."""
        self.sent, self.events = [], []
        self.peak, self._at_peak = self.total, None

    def kept(self) -> Counter[str]:
        """Bytes by module that made them in the forward pass and that are alive now: at its end, what is kept for the
        backward pass."""
        gc.collect()
        found: Counter[str] = Counter()
        for (kind, module), size in self.live.items():
            if kind == _KINDS["forward"]:
                found[module] += size
        return +found

    def by_kind(self) -> Counter[str]:
        """Bytes at the peak by kind."""
        found: Counter[str] = Counter()
        for (kind, _), size in self.at_peak.items():
            found[kind] += size
        return found

    def over(self, group: dist.ProcessGroup | None) -> list[Sent]:
        """What went over one group."""
        name = "" if group is None else group.group_name
        return [call for call in self.sent if call.group == name]

    @property
    def phase(self) -> str:
        """What counts now."""
        if self._phase is not None:
            return self._phase
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        # A backward pass runs without gradients, but for what it computes forward again.
        return "recompute" if torch.is_grad_enabled() else "backward"

    def _module(self) -> str:
        node = torch._C._current_autograd_node()
        if self._modules or node is None:
            return self._modules[-1] if self._modules else ""
        place = bisect.bisect_right(self._changes, node._sequence_nr()) - 1
        return self._changed_to[place] if place >= 0 else ""

    def __enter__(self) -> "Meter":
        resize, propagate = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            known = self._storages.get(storage._cdata)
            if known is not None:
                self._move(storage._cdata, known, _rounded(storage), GATHERED)
            return result

        def propagate_quietly(*args: Any, **kwargs: Any) -> Any:
            """DTensor makes tensors of a global shape to find the shape of a result."""
            self._ignored += 1
            try:
                return propagate(*args, **kwargs)
            finally:
                self._ignored -= 1

        self._entered.enter_context(patch.object(torch.UntypedStorage, "resize_", resize_))
        self._entered.enter_context(
            patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_quietly)
        )
        for hook in (
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ):
            self._entered.callback(hook.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.close()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():  # then the operators of a graph have no module of their own
            return
        # A compiled graph is part of the module that it was made of.
        of_graph = isinstance(module, torch.fx.GraphModule)
        self._modules.append(self._module() if of_graph else self._names.get(module, type(module).__name__))
        self._change()

    def _leave_module(self, module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and self._modules:  # none where the meter was entered inside of it
            self._modules.pop()
            self._change()

    def _change(self) -> None:
        self._changes.append(torch.autograd._get_sequence_nr())
        self._changed_to.append(self._modules[-1] if self._modules else "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._metered(func, types, args, kwargs or {})

    def _metered(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by
        result = func(*args, **kwargs)
        if self._ignored:
            return result
        if func.namespace == "c10d":
            self._send(func, args)
        call = Call.of(func, args, kwargs, result)
        # What is given and unknown was made before the meter was entered, but for what `torch.tensor` lifts.
        for tensors, counted in ((call.given, func is torch.ops.aten.lift_fresh.default), (call.made, True)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages and not tensor.is_meta:
                    self._follow(storage, _KINDS.get(self.phase, self.phase), counted=counted)
        beside = BESIDE[call.name](result, *args) if call.name in BESIDE else None
        event = self._event(call) if self._lists_events or beside is not None else None
        if event is not None and self._lists_events:
            self.events.append(event)
        if event is not None and beside is not None:
            self._send_beside(beside, event, next(each for each in reversed(args) if isinstance(each, str)), args[0])
        return result

    def _send_beside(self, beside: Beside, event: Event, group: str, x: Tensor) -> None:
        size = math.prod(beside.shape) * x.element_size()
        what = (event.module, event.phase, event)
        self.sent.append(Sent(beside.operation, group, beside.shape, size, *what))
        if self._lists_events:
            read, written = beside.arranged
            self.events.append(
                event._replace(
                    name="symm_mem::copy", read=read, written=written, flops=0, kernels=1,
                    inputs=tuple((number, read) for number, _ in event.outputs[:1]),
                    outputs=tuple((number, written) for number, _ in event.outputs[:1]),
                )
            )  # fmt: skip

    def _event(self, call: Call) -> Event | None:
        found = cost(call)
        if found is None:
            return None
        inputs, outputs = self._numbered(found.reads), self._numbered(found.writes)
        dtypes = [t.dtype for t in (*call.given, *call.made)]
        dtype = next((each for each in dtypes if each.is_floating_point), dtypes[0])
        read, written = (sum(size for _, size in each) for each in (inputs, outputs))
        what = (found.flops, found.kernels, str(dtype).removeprefix("torch."), self._module(), self.phase)
        return Event(call.name, read, written, *what, inputs, outputs)

    def _numbered(self, tensors: Sequence[tuple[Tensor, int]]) -> tuple[tuple[int, int], ...]:
        numbers = (self._storages.get(tensor.untyped_storage()._cdata) for tensor, _ in tensors)
        return tuple((known.number if known else 0, size) for known, (_, size) in zip(numbers, tensors, strict=True))

    def _send(self, func: Any, args: Any) -> None:
        operation = func.name().partition("::")[2].split(".")[0]
        if operation not in _FILLS:
            return
        given = [argument for argument in args if tensors_in(argument)]
        for tensor in tensors_in(given[1 if _FILLS[operation] else 0]):
            self.sent.append(
                Sent(operation, _group_name(args), tuple(tensor.shape), tensor.nbytes, self._module(), self.phase)
            )

    def _follow(self, storage: torch.UntypedStorage, kind: str, *, counted: bool = True) -> _Storage:
        key = storage._cdata
        size = _rounded(storage) if counted else 0
        reference = weakref.ref(storage, partial(self._forget, key))
        known = self._storages[key] = _Storage(reference, next(self._numbers), size, kind, self._module())
        self._add(known, size)
        return known

    def _forget(self, key: int, _: Any) -> None:
        known = self._storages.pop(key, None)
        if known is not None:
            self._add(known, -known.size)

    def _move(self, key: int, known: _Storage, size: int, kind: str) -> None:
        self._add(known, -known.size)
        moved = self._storages[key] = known._replace(size=size, kind=kind)
        self._add(moved, size)

    def _add(self, known: _Storage, size: int) -> None:
        if size < 0 and self._at_peak is None:
            self._at_peak = self.live.copy()
        self.live[known.kind, known.module] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self._at_peak = self.total, None


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _rounded(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // ROUNDED) * ROUNDED


def _group_name(args: Iterable[Any]) -> str:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument).group_name
            except (RuntimeError, TypeError):
                continue  # another boxed object, such as the reduction's kind
    return ""
