"""Coefficients of the damped EMA, derived from a layer's parameters.

Legend: D channels (2D when bidirectional), N moving averages per channel.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mega_scale.ops.modes import without_autocast


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

    @classmethod
    def from_parameters(
        cls, damping: Tensor, decay: Tensor, expansion: Tensor, projection: Tensor
    ) -> "EmaCoefficients":
        """Coefficients from a layer's parameters (arXiv 2209.10655, equations 5 and 6, in the names of HF 4.37.2).

        `p = sigmoid(damping)`, `q = 1 - p sigmoid(decay)`, `gain = p expansion`, `projection / sqrt(N)`.

        Args:
            damping: (D, N, 1), any floating dtype; so are `decay` and `expansion`.
            decay: (D, N, 1).
            expansion: (D, N, 1).
            projection: (D, N).

        Returns:
            Coefficients in fp32 (fp64 for fp64 parameters), whatever autocast says.
        """
        dtype = torch.promote_types(damping.dtype, torch.float32)
        with without_autocast(damping.device):
            p = damping.to(dtype).squeeze(-1).sigmoid()
            # Both sigmoids can round to 1; the bound keeps log(0), and its gradient, out.
            forget = (p * decay.to(dtype).squeeze(-1).sigmoid()).clamp_max(1 - torch.finfo(dtype).eps)
            gain = p * expansion.to(dtype).squeeze(-1)
            return cls(torch.log1p(-forget), gain, projection.to(dtype) * projection.shape[-1] ** -0.5)
