"""The damped EMA as a convolution by FFT: the form of the public implementations, and the one with truncated kernels.

Legend: B batch, L length, D channels, N moving averages per channel.
"""

import torch
from torch import Tensor

from mega_scale.ops.ema.coefficients import EmaCoefficients


def fft_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, truncation: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """`y = k * x` with `k[tau] = sum_n projection gain q^tau`, zero from `truncation` on, plus what the state carries.

    Args:
        x: (B, L, D) in the dtype of the coefficients.
        coefficients: (D, N) each.
        state: h before the first token, (B, D, N); none with truncation, which has no finite state.
        truncation: taps of the kernel, tokens.

    Returns:
        y (B, L, D), and h after the last token (B, D, N), none with truncation.
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
