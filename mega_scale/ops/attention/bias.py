"""Positional biases of Mega: functions of the distance alone, so one vector holds a whole Toeplitz matrix.

Legend: I queries, J keys, Z width of queries and keys, M centre of the table.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.modes import traced, without_autocast, written_out


def key_minus_query(queries: int, keys: int, offset: int | Tensor, device: torch.device | str) -> Tensor:
    """The distances j - (i + offset) that occur between I queries and J keys, ascending: int64, (I + J - 1,).

    With an offset for every row, (B,), they are (B, I + J - 1).
    """
    distances = torch.arange(-(queries - 1), keys, device=device)
    return distances - (offset[:, None] if isinstance(offset, Tensor) else offset)


def toeplitz(vector: Tensor, queries: int) -> Tensor:
    """The matrix whose entry (i, j) is `vector[I - 1 + j - i]`: (..., I + J - 1) to (..., I, J)."""
    if queries == 1 and not traced():  # a decoding step; a size that grows with it would make a compiled graph its own
        return vector.unsqueeze(-2)
    matrix: Tensor = _rows(vector, queries) if traced() else _Toeplitz.apply(vector, queries)
    return matrix


def _rows(vector: Tensor, queries: int) -> Tensor:
    if written_out():  # unfold takes no size that a compiler leaves open
        places = torch.arange(vector.shape[-1] - queries + 1, device=vector.device)
        return vector[..., places + torch.arange(queries, device=vector.device).flip(0)[:, None]]
    return vector.unfold(-1, vector.shape[-1] - queries + 1, 1).flip(-2)


class _Toeplitz(torch.autograd.Function):
    """PyTorch's own backward of `unfold` takes a GPU as long as a matrix product."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, queries: int) -> Tensor:
        return _rows(vector, queries)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sums of diagonals: with I zeros behind each row, read in rows one shorter, a diagonal is a column."""
        queries, keys = gradient.shape[-2:]
        rows = F.pad(gradient.flip(-2), (0, queries)).flatten(-2)
        return rows[..., : queries * (queries + keys - 1)].unflatten(-1, (queries, -1)).sum(-2), None


def rotary_bias(alpha: Tensor, beta: Tensor, distances: Tensor) -> Tensor:
    """The rotary bias of Mega, an additive function of the distance (arXiv 2209.10655, section 3.3; HF 4.37.2).

    `sum_k (a1 b1 + a2 b2)_k cos(d theta_k) + (a1 b2 - a2 b1)_k sin(d theta_k)`, with d = i - j, the halves 1 and 2 of
    alpha and beta, and `theta_k = 10000^(-k / (Z / 2))`.

    Args:
        alpha: (1, Z) or (Z,), Z even; so is `beta`.
        beta: like alpha.
        distances: j - i, int64 of any shape.

    Returns:
        In the shape of `distances`: fp32, or fp64 for fp64 parameters.
    """
    dtype = torch.promote_types(alpha.dtype, torch.float32)
    with without_autocast(alpha.device):
        a1, a2 = alpha.to(dtype).reshape(-1).chunk(2)
        b1, b2 = beta.to(dtype).reshape(-1).chunk(2)
        half = a1.shape[0]
        theta = 10000.0 ** (-torch.arange(half, device=alpha.device, dtype=dtype) / half)
        angles = -distances.to(dtype)[..., None] * theta
        return angles.cos() @ (a1 * b1 + a2 * b2) + angles.sin() @ (a1 * b2 - a2 * b1)


def simple_bias(table: Tensor, centre: int, distances: Tensor) -> Tensor:
    """The learned bias `table[M - 1 + j - i]`; a distance beyond the table has the bias at its end.

    Args:
        table: (2 max_positions - 1,).
        centre: M, tokens: the chunk in a chunked model, max_positions otherwise.
        distances: j - i, int64 of any shape.

    Returns:
        In the shape of `distances`, in the dtype of the table, at least fp32.
    """
    places = (distances + (centre - 1)).clamp(0, table.shape[0] - 1)
    return table.to(torch.promote_types(table.dtype, torch.float32))[places]
