"""Collectives with gradients over one axis of the mesh, started early and awaited late.

A tensor that is on its way is wrapped in `Pending`; whoever needs it waits. In the backward pass the same happens in
reverse: the gradient's collective starts where the forward waited, and is awaited where the forward started, so that
what lies between the two hides it in both passes.

Legend: T ranks of the group, D width of the whole, (...) any leading sizes.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mega_scale.ops.once import once_differentiable


class Axis(NamedTuple):
    """One axis of the mesh as this rank sees it.

    Args:
        group: the ranks along it; none stands for a rank alone.
        rank: this rank's place in it.
        size: T.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int


ALONE = Axis(None, 0, 1)


class Pending:
    """A tensor on its way.

    Args:
        buffer: where it arrives.
        work: what to wait for.
    """

    def __init__(self, buffer: Tensor, work: Any) -> None:
        self.buffer = buffer
        self._work = work

    def wait(self) -> Tensor:
        """The tensor, arrived."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self.buffer


def start_gather(x: Tensor, axis: Axis) -> Pending:
    """Start to collect the x of all ranks: (T, *x.shape); without gradients."""
    out = x.new_empty(axis.size, *x.shape)
    work = dist.all_gather_single(out.view(-1), x.contiguous().view(-1), group=axis.group, async_op=True)
    return Pending(out, work)


def start_reduce_scatter(parts: Tensor, axis: Axis) -> Pending:
    """Start to sum (T, ...) over all ranks, each keeping its own entry (...); without gradients."""
    out = parts.new_empty(parts.shape[1:])
    flat = parts.contiguous().view(-1)
    return Pending(out, dist.reduce_scatter_single(out.view(-1), flat, group=axis.group, async_op=True))


def _cut(x: Tensor, axis: Axis) -> Tensor:
    """(..., D) to contiguous (T, ..., D / T)."""
    return x.unflatten(-1, (axis.size, -1)).movedim(-2, 0).contiguous()


def _join(parts: Tensor) -> Tensor:
    """(T, ..., D / T) to (..., D)."""
    return parts.movedim(0, -2).flatten(-2)


class _StartGather(torch.autograd.Function):
    """Hands out a buffer that is still being filled; its gradient arrives likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, box: list[Pending]) -> Tensor:
        ctx.box = box
        box.append(start_gather(x, axis))
        return box[0].buffer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # What comes along the graph is an empty stand-in of the buffer's shape.
        return ctx.box.pop().wait(), None, None


class _FinishGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, axis: Axis, box: list[Pending]) -> Tensor:
        ctx.axis, ctx.box = axis, box
        box.pop().wait()
        return _join(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        parts = _cut(gradient, ctx.axis)
        ctx.box.append(start_reduce_scatter(parts, ctx.axis))
        return parts, None, None


class Gather:
    """The columns of all ranks side by side: (..., D / T) to (..., D); gradients are summed and cut again.

    Args:
        x: this rank's columns.
        axis: over which they are cut.
    """

    def __init__(self, x: Tensor, axis: Axis) -> None:
        self._axis = axis
        self._box: list[Pending] = []
        self._buffer = _StartGather.apply(x, axis, self._box)

    def wait(self) -> Tensor:
        """(..., D); to be called once."""
        return _FinishGather.apply(self._buffer, self._axis, self._box)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return start_reduce_scatter(_cut(x, axis), axis).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _join(start_gather(gradient, ctx.axis).wait()), None


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Sum over ranks, each keeping its columns: (..., D) to (..., D / T); gradients are gathered."""
    return _ReduceScatter.apply(x, axis)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous()
        total = total.clone() if total is gradient else total  # others may hold it too
        dist.all_reduce(total, group=ctx.axis.group)
        return total, None


def sum_gradient(x: Tensor, axis: Axis) -> Tensor:
    """x as it is, every rank holding the same; its gradient, of which every rank has a part, is summed."""
    return _SumGradient.apply(x, axis)
