"""The moving-average sublayer of a Mega block.

Legend: B batch, L length, D channels, N moving averages per channel.
"""

import torch
from torch import Tensor, nn

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.ops.ema import EmaCoefficients, damped_ema
from mega_scale.ops.gates import LEAN


class MegaMultiDimensionDampedEma(nn.Module):
    """`silu(EMA(x) + omega x)` (arXiv 2209.10655, equations 5 and 6; omega and silu as in the public implementations).

    Its parameters are kept in fp32: a decay close to one does not survive bf16.
    """

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        rows = config.hidden_size * (2 if config.bidirectional else 1)
        averages = config.ema_projection_size
        self.gates = LEAN
        self.bidirectional = config.bidirectional
        self.truncation = config.truncation
        self.damping_factor = nn.Parameter(torch.empty(rows, averages, 1))
        self.decay_factor = nn.Parameter(torch.empty(rows, averages, 1))
        self.ema_expansion_matrix = nn.Parameter(torch.empty(rows, averages, 1))
        self.kernel_projection_matrix = nn.Parameter(torch.empty(rows, averages))
        self.residual_weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, state: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Average x over the sequence.

        Args:
            x: (B, L, D), any floating dtype.
            mask: (B, L) bool, false for positions that the average leaves out (their omega term stays).
            state: h before the first token, (B, D, N) fp32; none means zero.
            resets: (B, L) bool, true where a document begins, into which nothing is carried; none: nowhere.

        Returns:
            (B, L, D) in the dtype of x, and h after the last token; none when truncated.
        """
        coefficients = EmaCoefficients.from_parameters(
            self.damping_factor, self.decay_factor, self.ema_expansion_matrix, self.kernel_projection_matrix
        )
        inputs = x if mask is None else x * mask[..., None]
        y, state = self.average(inputs, coefficients, state, resets)
        return self.gates.average(y, x, self.residual_weight), state

    def average(
        self, x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The average itself, without omega and silu: x (B, L, D) and h before it to y, and h after it."""
        return damped_ema(x, coefficients, state, resets, bidirectional=self.bidirectional, truncation=self.truncation)
