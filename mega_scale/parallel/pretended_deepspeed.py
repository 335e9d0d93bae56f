"""What DeepSpeed is spared on a rank that has no others, or whose tensors hold no numbers: see `World.pretend`.

DeepSpeed has no setting for either. Here are all of its functions that such a rank must not reach, or that take a step
for each rank of a group where one does, by the release that was looked through.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.comm import coalesced_collectives
from deepspeed.runtime.zero import partition_parameters, stage3
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mega_scale.ops import in_memory
from mega_scale.parallel.meter import ROUNDED

RELEASE = "0.19."
# Where DeepSpeed compares lists of integers with those of the first rank, whose broadcast brings nothing.
_COMPARISON = "assert_ints_same_as_other_ranks"
_COMPARING = ("partition_parameters", "partitioned_param_coordinator", "stage3", "utils")


class Zeros(TorchDispatchMode):
    """Whoever reads a number that a tensor lacks is told 0: no gradient overflows, no norm is invalid."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not in_memory(args[0]):
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


def spare(model: nn.Module) -> ExitStack:
    """Have DeepSpeed work on a model without other ranks, until what is returned is closed.

    Raises ValueError for another release of DeepSpeed.
    """
    if not deepspeed.__version__.startswith(RELEASE):
        raise ValueError(
            f"parallel.engine=deepspeed is planned with DeepSpeed {RELEASE}x, and {deepspeed.__version__} is here: "
            "install that, or plan parallel.engine=fsdp"
        )
    init: Any = partition_parameters.Init
    convert = init._convert_to_deepspeed_param

    def convert_(self: Any, parameter: Any) -> None:
        convert(self, parameter)
        parameter.all_gather_coalesced = _gather_at_once(self, parameter.all_gather_coalesced)

    with ExitStack() as stack:
        for name in _COMPARING:
            module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
            stack.enter_context(mock.patch.object(module, _COMPARISON, lambda ints: None))
        # A module is moved by swapping its parameters, which fake ones cannot be; they are where they should be.
        stack.enter_context(mock.patch.object(model, "to", lambda *where, **how: model, create=True))
        stack.enter_context(mock.patch.object(init, "_convert_to_deepspeed_param", convert_))
        stack.enter_context(mock.patch.object(stage3, "reduce_scatter_coalesced", _scatter_at_once))
        return stack.pop_all()


# Loops over the ranks of a group, which for each of them make views that one view of all replaces. Memory, collectives
# and what operators read and write are those of the loops.


class _Gathered(partition_parameters.AllGatherCoalescedHandle):
    """Parameters under way, whose partitions of all ranks lie in one tensor."""

    complete: bool

    def wait(self, handle_dependency: bool = True) -> None:
        if self.complete:
            return
        self.allgather_handle.wait()
        for parameter in self.params:
            whole = torch.cat([self.partitions[: parameter.ds_numel]]).view(parameter.ds_shape)
            parameter.data = whole.to(parameter.ds_tensor.dtype)
            parameter.ds_status = partition_parameters.ZeroParamStatus.AVAILABLE
        self.complete = True


def _gather_at_once(init: Any, gather: Callable[..., Any]) -> Callable[..., Any]:
    """`Init`'s coalesced gathering of parameters."""

    @torch.no_grad()
    def gather_(params: Sequence[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
        params = sorted(params, key=lambda parameter: parameter.ds_id)
        kinds = {(id(p.ds_process_group), partition_parameters.get_allgather_dtype(p, p.ds_tensor)) for p in params}
        one_by_one = init.allgather_sequential or init.use_all_reduce_for_fetch_params or len(params) < 2
        second = any(parameter.ds_secondary_tensor is not None for parameter in params)
        if quantize or one_by_one or second or len(kinds) > 1 or init._partition_world_size(params[0]) == 1:
            return gather(params, safe_mode=safe_mode, quantize=quantize)
        for parameter in params:
            parameter.ds_status = partition_parameters.ZeroParamStatus.INFLIGHT
        group, own = params[0].ds_process_group, [parameter.ds_tensor for parameter in params]
        each = sum(tensor.ds_numel for tensor in own)
        size, dtype = dist.get_world_size(group), kinds.pop()[1]
        whole = torch.empty(each * size, dtype=dtype, device="cpu")
        mine = whole.narrow(0, each * dist.get_rank(group), each)
        torch.cat([tensor.to(dtype) for tensor in own], out=mine)
        work = partition_parameters._dist_allgather_fn(mine, whole, group)
        return _Gathered(work, params, whole, size)

    return gather_


@torch.no_grad()
def _scatter_at_once(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """`reduce_scatter_coalesced`: this rank's partitions of the sums of tensors, averaged over the group's ranks."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    each = [-(-tensor.numel() // size) for tensor in tensors]
    whole = tensors[0].view(-1)
    if len(tensors) > 1 or each[0] * size != whole.numel():
        # What ranks lack at the end of a tensor is filled up, for each of them by a tensor of its own.
        missing = [_missing(tensor.numel(), length, size) for tensor, length in zip(tensors, each, strict=True)]
        width = whole.element_size()
        rounded = sum(-(-length * width // ROUNDED) * ROUNDED for lengths in missing for length in lengths)
        padding = whole.new_empty(rounded // width)[: sum(map(sum, missing))]
        whole = torch.cat([*(tensor.view(-1) for tensor in tensors), padding])
    whole.div_(size)
    mine = whole.narrow(0, sum(each) * rank, sum(each))
    coalesced_collectives._torch_reduce_scatter_fn(whole, mine, group=group)
    found, first = [], 0
    for tensor, length in zip(tensors, each, strict=True):
        found.append(mine.narrow(0, first, min(max(tensor.numel() - rank * length, 0), length)))
        first += length
    return found


def _missing(numel: int, each: int, size: int) -> list[int]:
    """Of a tensor of `numel` numbers, `each` a rank, what each rank lacks that has fewer."""
    lacking = (each - min(max(numel - rank * each, 0), each) for rank in range(numel // max(each, 1), size))
    return [length for length in lacking if length]
