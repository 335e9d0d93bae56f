"""The damped EMA in blocks: matrix products inside blocks, a scan over one state per block. The default form.

q does not depend on the input, so inside a block of c tokens the EMA of a channel is one lower-triangular Toeplitz
matrix, shared by all blocks of all sequences. A block needs the past only as the state at its beginning.

Legend: B batch, L length, D channels, N moving averages per channel, c tokens per block, M blocks per sequence.
"""

import torch
from torch import Tensor

from mega_scale.ops.ema.block_layout import BlockLayout
from mega_scale.ops.ema.block_matrices import BlockMatrices
from mega_scale.ops.ema.block_steps import EmaInside, EmaOutputs, EmaStates
from mega_scale.ops.ema.coefficients import EmaCoefficients


class BlockedEma:
    """The recurrence of `recurrent_ema` as about c + 2N multiply-adds per element in matrix products, in three steps.

    The end state is known after the first step, so where a sequence is cut, states can travel between its parts while
    the second step computes, and enter with the third.

    Args:
        x: (B, L, D) in the dtype of the coefficients.
        coefficients: (D, N) each.
        state: h before the first token, (B, D, N); none means zero.
        resets: (B, L) bool, true where a document begins. Reading how many blocks they need synchronises a GPU.
        block_size: c, tokens.

    Attributes:
        end: h after the last token, (B, D, N).
    """

    def __init__(
        self,
        x: Tensor,
        coefficients: EmaCoefficients,
        state: Tensor | None,
        resets: Tensor | None = None,
        block_size: int = 32,
    ) -> None:
        batch, length, channels = x.shape
        self._x = x
        self._coefficients = coefficients
        self._resets = resets
        c = self._c = min(block_size, length)
        layout = self._layout = BlockLayout.of(x, resets, c)
        log_decay = coefficients.log_decay
        self._toeplitz, into, self._out, decay = BlockMatrices.of(coefficients, c)
        fading = torch.exp(log_decay * layout.last_filled[:, None, None].to(x.dtype))
        first = x.new_zeros(batch, channels, log_decay.shape[1]) if state is None else state
        self._x_blocks, self._before, self.end = EmaStates.apply(x, into, decay, fading, first, layout)

    def inside(self) -> None:
        """What the tokens of a block give each other."""
        self._y_blocks = EmaInside.apply(self._x_blocks, self._x.detach(), self._toeplitz, self._layout)
        del self._x_blocks  # as large as x

    def outputs(self, incoming: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What earlier blocks give, and what lies before all of them.

        Args:
            incoming: h before the first token, (B, D, N), if it was not known at the beginning.

        Returns:
            y (B, L, D), and h after the last token (B, D, N).
        """
        log_decay = self._coefficients.log_decay
        layout, end, added = self._layout, self.end, None
        if incoming is not None:
            blocks = torch.arange(layout.blocks, device=end.device, dtype=end.dtype)
            added = incoming[:, None] * torch.exp(log_decay * (blocks * self._c)[:, None, None])  # (B, M, D, N)
            through = torch.exp(log_decay * self._x.shape[1]) * incoming
            if self._resets is not None:
                assert layout.keep is not None
                added = added * layout.keep.cumprod(1)[..., None, None]
                through = through * (~self._resets.any(1))[:, None, None]
            end = end + through
        return EmaOutputs.apply(self._y_blocks, self._before, added, self._out, layout), end
