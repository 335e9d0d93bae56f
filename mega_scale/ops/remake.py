"""Results of cheap functions that the backward pass computes again, rather than that they are kept."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mega_scale.ops.tracing import in_memory


class _Remade(NamedTuple):
    shape: torch.Size


def remade(result: Tensor, function: Callable[[], Tensor]) -> AbstractContextManager[object]:
    """In this context no operation keeps `result` for its backward pass, which calls `function` for it instead.

    Nothing happens without gradients, where something reads along (compilers do so themselves), and where `result` is
    kept as a copy, as by a matrix product under autocast.

    Args:
        result: contiguous; views of all of it count as it.
        function: what gives it again from tensors that are kept anyway.
    """
    if not torch.is_grad_enabled() or not result.requires_grad or not in_memory(result):
        return nullcontext()
    place, numbers, dtype = result.data_ptr(), result.numel(), result.dtype

    def pack(tensor: Tensor) -> Tensor | _Remade:
        whole = tensor.numel() == numbers and tensor.dtype == dtype and tensor.is_contiguous()
        return _Remade(tensor.shape) if whole and tensor.data_ptr() == place else tensor

    def unpack(packed: Tensor | _Remade) -> Tensor:
        return function().view(packed.shape) if isinstance(packed, _Remade) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
