"""Records what a rank really sends: every collective that PyTorch dispatches, whoever calls it.

Legend: T ranks of the group.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class Sent(NamedTuple):
    """One collective.

    Args:
        operation: name of the operator in c10d, such as `_allgather_base_`.
        group: name of the process group.
        shape: of the tensor that this rank puts in.
        bytes: of that tensor.
    """

    operation: str
    group: str
    shape: tuple[int, ...]
    bytes: int


class Recorder(TorchDispatchMode):
    """Use it in a `with` statement; it sees what this thread calls, and on a CPU the backward pass too.

    Attributes:
        sent: in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, rest = func.name().partition("::")
        operation = rest.split(".")[0]
        if library == "c10d" and operation in _FILLS:
            given = [argument for argument in args if _tensors(argument)]
            for tensor in _tensors(given[1 if _FILLS[operation] else 0]):
                self.sent.append(Sent(operation, _group_name(args), tuple(tensor.shape), tensor.nbytes))
        return func(*args, **(kwargs or {}))

    def over(self, group: dist.ProcessGroup | None) -> list[Sent]:
        """What went over one group."""
        name = "" if group is None else group.group_name
        return [call for call in self.sent if call.group == name]


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        return [tensor for part in argument for tensor in _tensors(part)]
    return []


def _group_name(args: Iterable[Any]) -> str:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument).group_name
            except (RuntimeError, TypeError):
                continue  # another boxed object, such as the reduction's kind
    return ""
