"""What operators cost on a GPU: bytes read and written, operations, launches of kernels.

The default rule reads every tensor that is given and writes every one that comes back; operators for which it is wrong
are listed. Custom operators tell their operations here, and their launches in `mega_scale.ops.KERNELS`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.ops import KERNELS
from mega_scale.ops.attention import GPU_BLOCK

_aten = torch.ops.aten
# Neither launch a kernel nor touch memory.
_FREE = {
    "aten::detach", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::is_pinned",
    "aten::new_empty_strided", "aten::lift_fresh", "aten::set_", "aten::resize_", "aten::_local_scalar_dense",
    "aten::_unsafe_view", "prim::device", "aten::_reshape_alias", "aten::sym_size", "aten::record_stream",
}  # fmt: skip
# Move data between ranks, which links do and not kernels of products or memory.
_ELSEWHERE = {"c10d", "_c10d_functional", "profiler", "prim"}
# Fill all of their first argument, which they need not read.
_FILL = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::uniform_", "aten::normal_", "aten::bernoulli_"}
# Read as much of their first tensor as they write.
_GATHER = {"aten::embedding", "aten::gather", "aten::index", "aten::index_select"}
# Read and write as much of their first tensor as their last one has.
_SCATTER = {"aten::scatter_add_", "aten::scatter_", "aten::index_put_", "aten::index_add_"}
# By operator of attention, which arguments are squares (G, C, C) of weights, read up to the last key of each block of
# queries, and whether results are.
_SQUARES: dict[str, tuple[tuple[int, ...], bool]] = {
    "mega_scale::softmax_weights": ((), True), "mega_scale::weighted_values": ((0,), False),
    "mega_scale::scores_gradient": ((2,), True), "mega_scale::score_products": ((0,), False),
    "mega_scale::values_gradient": ((0,), False), "mega_scale::distance_sums": ((0,), False),
}  # fmt: skip
# A complex average takes so many times as long as `devices.py` counts for a real one of as many columns, forward and
# backward: by what is compiled for sm_90, and the model of `ops/triton_loops.py`, at 1 x 32,768 x 2,048 with N = 16.
_COMPLEX = 0.82, 1.13
# Each product but the first reads what it adds to.
_SUM = "mega_scale::sum_products"
# Tensors that one launch of PyTorch's multi-tensor kernels takes.
_FOREACH = 48


class Cost(NamedTuple):
    """Tensors that an operator reads and writes with the bytes of each, its operations, and launches."""

    reads: list[tuple[Tensor, int]]
    writes: list[tuple[Tensor, int]]
    flops: int
    kernels: float  # of a list of tensors on average, so that they grow with it in proportion


def _product(a: Tensor, b: Tensor) -> int:
    """Operations of (..., M, K) times (..., K, N)."""
    return 2 * a.numel() * b.shape[-1]


def _steps(x: Tensor, given: Sequence[Tensor], factor: float) -> int:
    """Steps of the average of x (B, L, D) by Triton kernels."""
    return round(x.numel() * given[1].shape[1] * factor)


def _below_diagonal(x: Tensor, chunk: int) -> int:
    """Operations of (G, C, W) times the blocks of (G, C, C) that are on and below the diagonal."""
    return round(2 * x.numel() * chunk * _share_of_square(chunk))


def _share_of_square(chunk: int) -> float:
    blocks = -(-chunk // GPU_BLOCK)
    return (blocks + 1) / (2 * blocks)


FLOPS: dict[str, Callable[..., int]] = {
    "aten::mm": lambda a, b, *_: _product(a, b),
    "aten::bmm": lambda a, b, *_: _product(a, b),
    "aten::addmm": lambda _, a, b, *more: _product(a, b),
    "aten::addmm_": lambda _, a, b, *more: _product(a, b),
    "aten::baddbmm": lambda _, a, b, *more: _product(a, b),
    "aten::baddbmm_": lambda _, a, b, *more: _product(a, b),
    "aten::_scaled_mm": lambda a, b, *_: _product(a, b),
    "mkldnn::_linear_pointwise": lambda a, weight, *_: _product(a, weight.t()),
    # Tokens times channels times columns of states; what reads only one tensor does half as much.
    "mega_scale::ema_outputs": lambda x, given, o, s, p, d, pairs, *_: _steps(x, given, _COMPLEX[0] if pairs else 1),
    "mega_scale::ema_ends": lambda x, given, d, pairs, *_: _steps(x, given, _COMPLEX[0] if pairs else 1) // 2,
    "mega_scale::ema_adjoints": lambda dy, given, d, pairs, *_: _steps(dy, given, _COMPLEX[1] if pairs else 1) // 2,
    "mega_scale::ema_gradients": lambda x, dy, given, o, m, e, p, d, pairs, *_: _steps(
        x, given, _COMPLEX[1] if pairs else 1
    ),
    "mega_scale::ema_native": lambda x, rows, *_: x.numel() * rows.shape[2] * (1 + (len(rows) == 9)),
    "mega_scale::ema_native_backward": lambda x, dy, rows, *_: x.numel() * rows.shape[2] * (1 + (len(rows) == 9)),
    _SUM: lambda left, right: sum(map(_product, left, right)),
    # Attention, by blocks of queries. Scores are computed twice, for statistics and for weights.
    "mega_scale::softmax_weights": lambda q, k, *_: 2 * _below_diagonal(q, q.shape[1]),
    "mega_scale::weighted_values": lambda weights, v: _below_diagonal(v, v.shape[1]),
    "mega_scale::scores_gradient": lambda d_out, v, *_: _below_diagonal(v, v.shape[1]),
    "mega_scale::score_products": lambda scores, q, *_: 2 * _below_diagonal(q, q.shape[1]),
    "mega_scale::values_gradient": lambda weights, d_out: _below_diagonal(d_out, d_out.shape[1]),
    "symm_mem::fused_all_gather_matmul": lambda x, factors, *_: sum(
        2 * x[..., 0].numel() * factor.numel() for factor in factors
    ),
    "symm_mem::fused_matmul_reduce_scatter": lambda x, factor, *_: _product(x, factor),
}
"""Operations by operator, from its positional arguments: two a multiply-add of products; of the average, steps."""


class Beside(NamedTuple):
    """A collective that travels beside a product, both by one operator.

    Args:
        operation: name of the collective alone, in c10d.
        shape: of the tensor that this rank puts in.
        ranks: of the group, by which both are divided.
        launches: of the operator's kernels: copies between ranks, barriers, and products, one a rank.
        arranged: bytes read and written by the kernel that comes after.
    """

    operation: str
    shape: tuple[int, ...]
    ranks: int
    launches: int
    arranged: tuple[int, int]


def _beside_gather(result: Any, x: Tensor, factors: list[Tensor], *_: Any) -> Beside:
    ranks, whole = factors[0].shape[0] // x.shape[-1], bytes_of(result[0])
    # Columns of all ranks are put beside each other.
    return Beside("_allgather_base_", tuple(x.shape), ranks, ranks * (1 + len(factors)) + 4, (whole, whole))


def _beside_scatter(result: Any, x: Tensor, factor: Tensor, *_: Any) -> Beside:
    ranks, own = factor.shape[1] // result.shape[-1], bytes_of(result)
    shape = (*x.shape[:-1], factor.shape[1])
    # What ranks made of this one's columns is summed.
    return Beside("_reduce_scatter_base_", shape, ranks, 4 * ranks, (own * ranks, own))


BESIDE: dict[str, Callable[..., Beside]] = {
    "symm_mem::fused_all_gather_matmul": _beside_gather,
    "symm_mem::fused_matmul_reduce_scatter": _beside_scatter,
}
"""Collectives that travel beside products, by operator, from its result and its positional arguments."""


class Call(NamedTuple):
    """One call of an operator: its name as `aten::mm`, what it was called with, and the tensors given and made."""

    func: Any
    name: str
    args: Any
    kwargs: Any
    result: Any
    given: list[Tensor]
    made: list[Tensor]

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, result: Any) -> "Call":
        given = tensors_in(args)
        if kwargs:
            given += tensors_in(kwargs)
        return cls(func, _name(func), args, kwargs, result, given, tensors_in(result))


@cache  # as a step calls few operators, thousands of times
def _name(func: Any) -> str:
    name: str = func.name()
    return name.split(".", maxsplit=1)[0]


@cache
def _written_places(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operator writes into, by its schema."""
    arguments = enumerate(func._schema.arguments)
    return tuple((place, one.name) for place, one in arguments if one.alias_info and one.alias_info.is_write)


def cost(call: Call) -> Cost | None:
    """What an operator's call costs; none where it is a view, an allocation, or moves data elsewhere."""
    func, name, args, kwargs, result, given, made = call
    if name in _FREE or func.namespace in _ELSEWHERE:
        return None
    written = written_arguments(func, args, kwargs)
    known = {t.untyped_storage()._cdata for t in given}
    if not written and made and all(t.untyped_storage()._cdata in known for t in made):
        return None  # a view, or a conversion that had nothing to do
    reads = _once(given[1:] if name in _FILL else given)
    if "_scaled" not in name and name.endswith(("::zeros", "::full", "::ones", "::new_zeros", "::zeros_like")):
        reads = []
    writes = _once([*written, *(t for t in made if t.untyped_storage()._cdata not in known)])
    if name in _SQUARES:
        places, results = _SQUARES[name]
        squares = {t.untyped_storage()._cdata for t in [*(args[i] for i in places), *(made if results else ())]}
        reads, writes = ([(t, _of_square(t, seen, squares)) for t, seen in each] for each in (reads, writes))
    if name in _GATHER and made:
        size = sum(bytes_of(t) for t in made)
        reads = [(t, min(seen, size)) for t, seen in reads]
    elif name in _SCATTER:
        size = min(bytes_of(t) for t in given)
        reads, writes = ([(t, min(seen, size)) for t, seen in each] for each in (reads, writes))
    if not reads and not writes:
        return None  # a question, not work
    flops = FLOPS[name](*args) if name in FLOPS else 0
    kernels: float = KERNELS[name](*args) if name in KERNELS else 1
    if name in BESIDE:
        kernels = BESIDE[name](result, *args).launches
    if name == _SUM:
        writes = [(t, size * (2 * len(args[0]) - 1)) for t, size in writes]
    if "_foreach_" in name or "_fused_ad" in name:
        kernels = max(1.0, len(given) / _FOREACH)
    return Cost(reads, writes, flops, kernels)


def _of_square(x: Tensor, seen: int, squares: set[int]) -> int:
    return round(seen * _share_of_square(x.shape[1])) if x.untyped_storage()._cdata in squares else seen


def written_arguments(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments that an operator writes into, by its schema."""
    found: list[Tensor] = []
    for place, name in _written_places(func):
        found += tensors_in(args[place] if place < len(args) else kwargs.get(name))
    return found


def bytes_of(tensor: Tensor) -> int:
    """Bytes of memory that lie under a tensor, numbers that are repeated (expanded) once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not length:
            size *= length
    return size


def _once(tensors: list[Tensor]) -> list[tuple[Tensor, int]]:
    """Each different piece of memory, and its bytes."""
    found = {}
    for t in tensors:
        if t.numel():
            found[t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()] = (t, bytes_of(t))
    return list(found.values())


def tensors_in(argument: Any) -> list[Tensor]:
    """The tensors in what an operator is given or makes: a value, or lists, tuples and dictionaries of them."""
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, list | tuple):
        return [tensor for part in argument for tensor in tensors_in(part)]
    return tensors_in(list(argument.values())) if isinstance(argument, dict) and argument else []
