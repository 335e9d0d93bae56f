"""Tensor parallelism's products, and collectives that adjoin them, as one operator each: by PyTorch's symmetric memory.

Both are divided by ranks: while one rank's channels are on their way, another's are multiplied. Of the four large
collectives a block each way, all can be divided so but one: where the gradient of attention's normed stream is
summed over ranks, the average has a share in it beside the product.

The operators of `torch.ops.symm_mem` have kernels for NVIDIA GPUs only. Their sums over ranks' channels are in the
format of what is multiplied, rounded once a rank.

Legend: (...) tokens, D channels of the residual stream, W any width inside a layer, T ranks of the group.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory  # defines torch.ops.symm_mem
from torch import Tensor

from mega_scale.ops import once_differentiable, opaque, operator, tracing
from mega_scale.parallel.world import Axis, Pending, collective


def overlaps(axis: Axis) -> bool:
    """Whether products and collectives are one operator now: in training; else rows may be as short as a token."""
    return axis.overlaps and torch.is_grad_enabled()


def _gather(x: Tensor, factors: Sequence[Tensor], axis: Axis, forward: bool) -> list[Tensor]:
    products: list[Tensor] = []

    def begin() -> Pending:
        assert axis.group is not None
        whole, found = torch.ops.symm_mem.fused_all_gather_matmul(
            x, list(factors), x.dim() - 1, axis.group.group_name, return_A=True
        )
        products.extend(found)
        return Pending(whole, None)

    whole = (axis.start(begin, product=True) if forward else begin()).wait()
    return [whole, *(products or [whole @ factor for factor in factors])]  # of a block that is recomputed


def _scatter(x: Tensor, factor: Tensor, axis: Axis, forward: bool) -> Tensor:
    def begin() -> Pending:
        assert axis.group is not None
        return Pending(
            torch.ops.symm_mem.fused_matmul_reduce_scatter(x, factor, "sum", x.dim() - 1, axis.group.group_name), None
        )

    return (axis.start(begin, product=True) if forward else begin()).wait()


# What compiled blocks have of the two, which take weights rather than views of them.


def _like_gathered(
    x: Tensor, weights: list[Tensor], by_columns: bool, size: int, number: int, forward: bool
) -> list[Tensor]:
    widths = [x.shape[-1] * size, *(weight.shape[0 if by_columns else 1] for weight in weights)]
    return [x.new_empty(*x.shape[:-1], width) for width in widths]


@operator(_like_gathered)
def _gathered_products(
    x: Tensor, weights: list[Tensor], by_columns: bool, size: int, number: int, forward: bool
) -> list[Tensor]:
    axis = Axis.numbered(number)
    whole, *products = _gather(x, [_factor(weight, by_columns) for weight in weights], axis, forward)
    # Compilers write into what an operator returned once they have read it.
    kept = forward and axis.received is not None and axis.received.keeps
    return [whole.clone() if kept else whole, *products]


def _like_scattered(x: Tensor, weight: Tensor, by_columns: bool, size: int, number: int, forward: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0 if by_columns else 1] // size)


@operator(_like_scattered)
def _scattered_product(x: Tensor, weight: Tensor, by_columns: bool, size: int, number: int, forward: bool) -> Tensor:
    axis = Axis.numbered(number)
    out = _scatter(x, _factor(weight, by_columns), axis, forward)
    return out.clone() if forward and axis.received is not None and axis.received.keeps else out


def _factor(weight: Tensor, by_columns: bool) -> Tensor:
    return weight.t() if by_columns else weight


def _gather_by(axis: Axis, x: Tensor, weights: Sequence[Tensor], by_columns: bool, forward: bool) -> list[Tensor]:
    """All channels of x, and their products with weights^T if `by_columns`, else with weights."""
    x = x.contiguous()
    if tracing() is not None:
        found: list[Tensor] = _gathered_products(x, list(weights), by_columns, axis.size, axis.number, forward)
        return found
    return _gather(x, [_factor(weight, by_columns) for weight in weights], axis, forward)


def _scatter_by(axis: Axis, x: Tensor, weight: Tensor, by_columns: bool, forward: bool) -> Tensor:
    """This rank's channels of the sum over ranks of x weight^T if `by_columns`, else of x weight."""
    if tracing() is not None:
        out: Tensor = _scattered_product(x, weight, by_columns, axis.size, axis.number, forward)
        return out
    return _scatter(x, _factor(weight, by_columns), axis, forward)


def _of_weight(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.flatten(0, -2).t() @ x.flatten(0, -2)


def _side_by_side(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class _GatheredProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        whole, *products = _gather_by(axis, x, weights, by_columns=True, forward=True)
        ctx.axis = axis
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(whole, *weights)
        return whole, *products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_whole: Tensor | None, *gradients: Any) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        of_weights = (None if g is None else _of_weight(g, whole) for g in gradients)
        used = [place for place, g in enumerate(gradients) if g is not None]
        if of_whole is None:  # only products read it, and their sum is what travels: one product of all
            g, weight = _side_by_side([gradients[i] for i in used], -1), _side_by_side([weights[i] for i in used], 0)
            return None, _scatter_by(ctx.axis, g, weight, by_columns=False, forward=False), *of_weights
        total = of_whole.flatten(0, -2)
        for i in used:
            total = torch.addmm(total, gradients[i].flatten(0, -2), weights[i])
        total = total.view(whole.shape)
        return None, collective(total, ctx.axis, "scatter columns", forward=False), *of_weights


class _ScatteredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x: Tensor, weight: Tensor) -> Tensor:
        ctx.axis = axis
        ctx.save_for_backward(x, weight)
        return _scatter_by(axis, x, weight, by_columns=True, forward=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        whole, of_x = _gather_by(ctx.axis, gradient, [weight], by_columns=False, forward=False)
        return None, of_x, _of_weight(whole, x)


@opaque
def gathered_products(axis: Axis, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """All channels of x (..., D / T), of which every rank has some, and their products with weights^T.

    Weights are (W, D) of this rank and of the dtype of x; returns (..., D), and (..., W) a weight. Gradients of x are
    summed over ranks and scattered.
    """
    found: tuple[Tensor, ...] = _GatheredProducts.apply(axis, x, *weights)
    return found


@opaque
def scattered_product(axis: Axis, x: Tensor, weight: Tensor) -> Tensor:
    """The sum over ranks of `x weight^T`, each keeping its channels: x (..., W), weight (D, W) to (..., D / T)."""
    out: Tensor = _ScatteredProduct.apply(axis, x, weight)
    return out
