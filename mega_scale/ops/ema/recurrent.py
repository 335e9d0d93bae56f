"""The damped EMA as its recurrence: one token after the other. The truth that the other forms are tested against.

Legend: B batch, L length, D channels, N moving averages per channel.
"""

import torch
from torch import Tensor

from mega_scale.ops.ema.coefficients import EmaCoefficients


def recurrent_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = q h_{t-1} + gain x_t`, `y_t = sum_n projection_n h_{t,n}` (arXiv 2209.10655, equation 6).

    Args:
        x: (B, L, D) in the dtype of the coefficients.
        coefficients: (D, N) each.
        state: h before the first token, (B, D, N).
        resets: (B, L) bool, true where a document begins: h is zeroed before that token.

    Returns:
        y (B, L, D), and h after the last token (B, D, N).
    """
    decay = coefficients.log_decay.exp()
    outputs = []
    for t in range(x.shape[1]):
        if resets is not None:
            state = state.masked_fill(resets[:, t, None, None], 0.0)
        state = decay * state + coefficients.gain * x[:, t, :, None]
        outputs.append((coefficients.projection * state).sum(-1))
    return torch.stack(outputs, dim=1), state
