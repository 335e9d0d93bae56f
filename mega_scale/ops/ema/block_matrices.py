"""The matrices by which a block of tokens is averaged, as functions of the coefficients.

Autograd would keep several tensors of their size from when they are made until the end of the backward pass. Here only
the coefficients are kept, and powers of the decay are computed again.

Legend: D channels, N moving averages per channel, c tokens per block; P_s is the decay of s tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.ema.coefficients import EmaCoefficients
from mega_scale.ops.modes import once_differentiable


class BlockMatrices(NamedTuple):
    """What tokens x and the state h before a block make of it: `y = x toeplitz + h out`, `h' = decay h + x into`."""

    toeplitz: Tensor  # (D, c, c): token j to output i, `sum_n projection gain P_{i-j}`, zero where j > i
    into: Tensor  # (D, c, N): token j to the state after the block, `gain P_{c-1-j}`
    out: Tensor  # (D, N, c): state before the block to output i, `projection P_{i+1}`
    decay: Tensor  # (D, N): P_c

    @classmethod
    def of(cls, coefficients: EmaCoefficients, c: int) -> "BlockMatrices":
        """For coefficients (D, N); all contiguous, differentiable once."""
        return cls(*_Matrices.apply(*coefficients, c))


def _powers(log_decay: Tensor, c: int) -> Tensor:
    """P_0 to P_c, (D, c + 1, N)."""
    steps = torch.arange(c + 1, device=log_decay.device, dtype=log_decay.dtype)
    return torch.exp(log_decay[:, None] * steps[:, None])


class _Matrices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_decay: Tensor, gain: Tensor, projection: Tensor, c: int) -> tuple[Tensor, ...]:
        ctx.c = c
        ctx.save_for_backward(log_decay, gain, projection)
        powers = _powers(log_decay, c)
        kernel = torch.einsum("dn,dcn->dc", projection * gain, powers[:, :c])
        toeplitz = F.pad(kernel, (c - 1, 0)).unfold(-1, c, 1).flip(1)  # row j holds kernel[i - j]
        into = gain[:, None] * powers[:, :c].flip(1)
        out = (projection[:, None] * powers[:, 1:]).mT.contiguous()
        return toeplitz, into, out, powers[:, c].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_toeplitz: Tensor, d_into: Tensor, d_out: Tensor, d_decay: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        log_decay, gain, projection = ctx.saved_tensors
        c, powers = ctx.c, _powers(log_decay, ctx.c)
        # Sums of the diagonals i - j = s: read in rows one longer, they are columns.
        d_kernel = F.pad(d_toeplitz.triu().flatten(1), (0, c)).unflatten(1, (c, c + 1)).sum(1)[:, :c]
        d_into, d_out = d_into.flip(1), d_out.mT
        of_kernel = torch.einsum("dc,dcn->dn", d_kernel, powers[:, :c])
        d_gain = torch.einsum("dcn,dcn->dn", d_into, powers[:, :c]) + projection * of_kernel
        d_projection = torch.einsum("dcn,dcn->dn", d_out, powers[:, 1:]) + gain * of_kernel
        d_powers = torch.zeros_like(powers)
        d_powers[:, :c] = gain[:, None] * d_into + (projection * gain)[:, None] * d_kernel[..., None]
        d_powers[:, 1:] += projection[:, None] * d_out
        d_powers[:, c] += d_decay
        steps = torch.arange(c + 1, device=powers.device, dtype=powers.dtype)
        d_log_decay = torch.einsum("s,dsn,dsn->dn", steps, powers, d_powers)
        return d_log_decay, d_gain, d_projection, None
