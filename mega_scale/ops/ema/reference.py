"""The damped EMA in PyTorch's own operators: its coefficients, the reference, and all that autograd differentiates.

* recurrent: one token after the other. The truth that all other forms are tested against.
* fft: a convolution, as in the public implementations; the only form with truncated kernels.
* scan: a fixed number of operators whatever the length, for compilers, exporters and transforms of torch.func, which
  take neither C++ nor loops over a length that they leave open. Tokens are averaged in blocks, each of which needs the
  past as one state; the states are a recurrence of their own, which is again computed in blocks.

All take x (B, L, D) in the dtype of the coefficients (D, N) and h before the first token (B, D, N), and return y
(B, L, D) and h after the last token. `resets` (B, L) bool are true where a document begins: h is zeroed
before that token.

Legend: B batch, L length, D channels (2D when bidirectional), N moving averages per channel, c tokens per block, M
blocks per sequence.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import ANY_LENGTH, chunk_count, join_chunks, split_chunks, tracing

_BLOCK = 32
# Blocks of blocks: what is left at the end is a matrix, of 32 rows at a million tokens.
_DEPTH = 2


class EmaCoefficients(NamedTuple):
    """What the recurrence `h_t = exp(log_decay) h_{t-1} + gain x_t`, `y_t = sum_n projection_n h_{t,n}` needs.

    Args:
        log_decay: log q, (D, N) fp32; kept as a logarithm because q itself rounds to 1 when it is close to 1.
        gain: p beta, (D, N) fp32.
        projection: eta / sqrt(N), (D, N) fp32.
    """

    log_decay: Tensor
    gain: Tensor
    projection: Tensor


def recurrent_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = q h_{t-1} + gain x_t`, `y_t = sum_n projection_n h_{t,n}` (arXiv 2209.10655, equation 6)."""
    decay = coefficients.log_decay.exp()
    outputs = []
    for t in range(x.shape[1]):
        if resets is not None:
            state = state.masked_fill(resets[:, t, None, None], 0.0)
        state = decay * state + coefficients.gain * x[:, t, :, None]
        outputs.append((coefficients.projection * state).sum(-1))
    return torch.stack(outputs, dim=1), state


def fft_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, truncation: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """`y = k * x` with `k[tau] = sum_n projection gain q^tau`, plus what the state gives.

    The kernel is zero from `truncation` taps on; there is then no finite state, neither before nor after.
    """
    length = x.shape[1]
    steps = torch.arange(length + 1, device=x.device, dtype=x.dtype)
    powers = torch.exp(coefficients.log_decay[..., None] * steps)  # (D, N, L + 1)
    kernel = torch.einsum("dn,dnl->dl", coefficients.projection * coefficients.gain, powers[..., :length])
    if truncation is not None:
        kernel = kernel * (steps[:length] < truncation)
    x_BDL = x.transpose(1, 2)
    spectrum = torch.fft.rfft(x_BDL, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)
    if state is None:
        return y, None
    y = y + torch.einsum("bdn,dnl->bld", state * coefficients.projection, powers[..., 1:])
    into_state = coefficients.gain[..., None] * powers[..., :length].flip(-1)
    return y, powers[..., length] * state + torch.einsum("bdl,dnl->bdn", x_BDL, into_state)


def scan_ema(x: Tensor, coefficients: EmaCoefficients, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`recurrent_ema` of any length, differentiable any number of times; no state means zero."""
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
    if depth == 0 or (tracing() not in ANY_LENGTH and count <= _BLOCK):
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
