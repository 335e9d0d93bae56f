"""The elementwise arithmetic of a block between its matrix products, as functions of tensors.

Written plainly, each reads and writes memory once an operation; compiled, once in all, and its backward pass computes
again what is cheap rather than keep it. They hold no parameters and no matrix products, so that they can be compiled
whatever shards or gathers the layers around them.

Legend: B batch, L length, D channels, Z width of queries and keys, E width of values.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def average(y: Tensor, omega: Tensor, x: Tensor) -> Tensor:
    """`silu(y + omega x)` in the dtype of x: y and x (B, L, D), omega (D,)."""
    return F.silu(y + omega * x).to(x.dtype)


class Gates(NamedTuple):
    """The functions of this file, as they are or compiled."""

    queries_and_keys: Callable[..., tuple[Tensor, Tensor]] = queries_and_keys
    gate: Callable[..., Tensor] = gate
    update: Callable[..., Tensor] = update
    average: Callable[..., Tensor] = average


PLAIN = Gates()


@cache
def compiled() -> Gates:
    """Compiled without graph breaks, at their first call with new sizes; needs a C++ compiler on a CPU, Triton on a
    GPU."""
    return Gates(*(_compile(function) for function in PLAIN))


def _compile(function: Callable[..., Any]) -> Any:
    return torch.compile(function, fullgraph=True)
