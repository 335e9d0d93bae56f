"""The elementwise arithmetic of a block between its matrix products, as functions of tensors.

Written plainly, each reads and writes memory once an operation, and keeps what each operation needs for its backward
pass. Lean, their backward passes are written by hand and compute again what is cheap; on a CPU in fp32 they are C++,
which reads and writes memory once in all, as on any device do those that PyTorch compiles. They hold no parameters and
no matrix products, so that they can be compiled whatever shards or gathers the layers around them.

Legend: B batch, L length, D channels, Z width of queries and keys, E width of values.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.native.gates import native_map, suits_native
from mega_scale.ops.once import once_differentiable
from mega_scale.ops.tracing import written_out


def silu(x: Tensor) -> Tensor:
    """`x sigmoid(x)`, (..., W)."""
    return F.silu(x)


def queries_and_keys(z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`kappa silu(z) + mu` (arXiv 2209.10655, equations 7 to 9): z (B, L, Z), weight and bias (2, Z)."""
    z = F.silu(z)
    # Each row is applied on its own: the stacked (B, L, 2, Z) product would double the memory of queries and keys.
    return z * weight[0] + bias[0], z * weight[1] + bias[1]


def gate(attended: Tensor, gate: Tensor) -> Tensor:
    """`attended silu(gate)`, both (B, L, E)."""
    return attended * F.silu(gate)


def update(x: Tensor, update: Tensor, candidate: Tensor) -> Tensor:
    """`x + sigmoid(update) (silu(candidate) - x)`, all (B, L, D) (arXiv 2209.10655, equation 15)."""
    return torch.addcmul(x, torch.sigmoid(update), F.silu(candidate) - x)


def average(y: Tensor, x: Tensor, omega: Tensor) -> Tensor:
    """`silu(y + omega x)` in the dtype of x: y and x (B, L, D), omega (D,)."""
    return F.silu(y + omega * x).to(x.dtype)


class Gates(NamedTuple):
    """The functions of this file, as they are, lean or compiled: those of rows first, then coefficients of columns."""

    silu: Callable[[Tensor], Tensor] = silu
    queries_and_keys: Callable[..., tuple[Tensor, Tensor]] = queries_and_keys
    gate: Callable[..., Tensor] = gate
    update: Callable[..., Tensor] = update
    average: Callable[..., Tensor] = average
    kind: Literal["plain", "lean", "compiled"] = "plain"

    def __reduce__(self) -> tuple[Any, ...]:
        """By its kind: compiled functions are nothing that a file could hold."""
        return gates, (self.kind,)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(attended, gate)
        return F.silu(gate).mul_(attended) if attended.dtype == gate.dtype else attended * F.silu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        attended, gate = ctx.saved_tensors
        d_attended = (gradient * F.silu(gate)).to(attended.dtype)
        return d_attended, _silu_backward((gradient * attended).to(gate.dtype), gate)


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, candidate: Tensor) -> Tensor:
        ctx.save_for_backward(x, update, candidate)
        return torch.addcmul(x, torch.sigmoid(update), F.silu(candidate) - x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, update, candidate = ctx.saved_tensors
        share = torch.sigmoid(update)
        through = gradient * share
        d_candidate = _silu_backward(through.to(candidate.dtype), candidate)
        d_update = torch.ops.aten.sigmoid_backward((gradient * (F.silu(candidate) - x)).to(share.dtype), share)
        return (gradient - through).to(x.dtype), d_update, d_candidate


_silu_backward = torch.ops.aten.silu_backward
PLAIN = Gates()


def _lean(
    plain: Callable[..., Any], rows: int, outputs: int = 1, function: type[torch.autograd.Function] | None = None
) -> Callable[..., Any]:
    def run(*tensors: Tensor) -> Any:
        given, coefficients = tensors[:rows], tensors[rows:]
        if suits_native(given, coefficients):
            width = given[0].shape[-1]
            columns = torch.cat([tensor.view(-1, width) for tensor in coefficients]) if coefficients else None
            return native_map(plain.__name__, given, columns, outputs)
        if function is not None and torch.is_grad_enabled() and not written_out():
            return function.apply(*tensors)
        return plain(*tensors)

    return run


LEAN = Gates(
    silu=_lean(silu, 1),
    queries_and_keys=_lean(queries_and_keys, 1, outputs=2),
    gate=_lean(gate, 2, function=_Gate),
    update=_lean(update, 3, function=_Update),
    average=_lean(average, 2),
    kind="lean",
)
"""What models use unless told otherwise; once differentiable, but where something reads along."""


@cache
def compiled() -> Gates:
    """Compiled without graph breaks, at their first call with new sizes; needs a C++ compiler on a CPU, Triton on a
    GPU."""
    written = (queries_and_keys, gate, update, average)
    return Gates(kind="compiled", **{function.__name__: _compile(function) for function in written})


def gates(kind: Literal["plain", "lean", "compiled"]) -> Gates:
    """The gates of a kind."""
    return compiled() if kind == "compiled" else LEAN if kind == "lean" else PLAIN


def _compile(function: Callable[..., Any]) -> Any:
    return torch.compile(function, fullgraph=True)
