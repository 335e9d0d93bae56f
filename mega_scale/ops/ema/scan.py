"""The damped EMA in PyTorch's own operators, their number independent of the length: for all that reads along.

Compilers, exporters and transforms of torch.func take neither C++ nor loops over a length that they leave open. As in
the blocked form, tokens are averaged in blocks, each of which needs the past as one state; the states are a recurrence
of their own, which is again computed in blocks.

Legend: B batch, L length, D channels, N moving averages per channel, c tokens per block, M blocks per sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.ema.coefficients import EmaCoefficients
from mega_scale.ops.modes import any_length, chunk_count, join_chunks, split_chunks

_BLOCK = 32
# Blocks of blocks: what is left at the end is a matrix, of 32 rows at a million tokens.
_DEPTH = 2


def scan_ema(x: Tensor, coefficients: EmaCoefficients, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`recurrent_ema` of any length, differentiable any number of times.

    Args:
        x: (B, L, D) in the dtype of the coefficients.
        coefficients: (D, N) each.
        state: h before the first token, (B, D, N); none means zero.

    Returns:
        y (B, L, D), and h after the last token (B, D, N).
    """
    log_decay, gain, projection = coefficients
    length = x.shape[1]
    tokens = _in_blocks(x)  # (B, M, c, D)
    blocks, last = tokens.shape[1], (length - 1) // _BLOCK
    powers = torch.exp(log_decay[:, None] * _steps(_BLOCK + 1, x)[:, None])  # (D, c + 1, N)
    fades = log_decay * _BLOCK

    ends = torch.einsum("bmjd,djn->bmdn", tokens, gain[:, None] * powers[:, :_BLOCK].flip(1))
    before = _before(ends.flatten(2), fades.flatten(), _DEPTH).unflatten(2, log_decay.shape)
    if state is not None:
        before = before + state[:, None] * torch.exp(fades * _steps(blocks, x)[:, None, None])

    kernel = torch.einsum("dn,dsn->sd", projection * gain, powers[:, :_BLOCK])
    y = torch.einsum("bmjd,ijd->bmid", tokens, _toeplitz(kernel))
    y = y + torch.einsum("bmdn,din->bmid", before, projection[:, None] * powers[:, 1:])

    # The last block may be part full.
    left = length - last * _BLOCK
    weights = torch.exp(log_decay[:, None] * (left - 1 - _steps(_BLOCK, x)).clamp(min=0)[:, None])
    of_last = torch.full((1,), last, device=x.device)
    end = before.index_select(1, of_last)[:, 0] * torch.exp(log_decay * left)
    end = end + torch.einsum("bjd,djn->bdn", tokens.index_select(1, of_last)[:, 0], gain[:, None] * weights)
    return join_chunks(y, 0, length), end


def _before(added: Tensor, log_decay: Tensor, depth: int) -> Tensor:
    """h_m of `h_{m+1} = exp(log_decay) h_m + added_m` from zero: added (B, M, K), log_decay (K,), h (B, M, K).

    No size here is one less than another: an exporter would keep whether it is 1.
    """
    count = added.shape[1]
    if depth == 0 or (not any_length() and count <= _BLOCK):
        kernel = torch.exp(log_decay * _steps(count, added)[:, None])
        return torch.einsum("bjk,ijk->bik", added, _toeplitz(kernel, 1))
    blocks, kernel = _in_blocks(added), torch.exp(log_decay * _steps(_BLOCK, added)[:, None])
    inside = torch.einsum("bmjk,ijk->bmik", blocks, _toeplitz(kernel, 1))
    ends = torch.einsum("bmjk,jk->bmk", blocks, kernel.flip(0))
    found = inside + _before(ends, log_decay * _BLOCK, depth - 1)[:, :, None] * kernel
    return join_chunks(found, 0, count)


def _in_blocks(x: Tensor) -> Tensor:
    """(B, L, K) to (B, M, c, K), filled up with zeros."""
    return split_chunks(F.pad(x, (0, 0, 0, chunk_count(x.shape[1], _BLOCK) * _BLOCK - x.shape[1])), _BLOCK)


def _toeplitz(kernel: Tensor, lag: int = 0) -> Tensor:
    """Entry (i, j, k) is `kernel[i - lag - j, k]`, zero where j > i - lag: (c, K) to (c, c, K)."""
    steps = torch.arange(kernel.shape[0], device=kernel.device)
    distance = steps[:, None] - lag - steps
    return kernel[distance.clamp(min=0)] * (distance >= 0)[..., None]


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype)
