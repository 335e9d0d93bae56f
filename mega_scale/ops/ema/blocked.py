"""The damped EMA in blocks: matrix products inside blocks, a scan over one state per block. The default form.

q does not depend on the input, so inside a block of c tokens the EMA of a channel is one lower-triangular Toeplitz
matrix, shared by all blocks of all sequences. A block needs the past only as the state at its beginning.

Legend: B batch, L length, D channels, N moving averages per channel, c tokens per block, M blocks per sequence.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mega_scale.ops.ema.coefficients import EmaCoefficients


class _Layout(NamedTuple):
    """Where tokens lie in blocks. A document begins a block of its own, so no block holds two documents."""

    blocks: int  # M, the same for every sequence
    last_block: Tensor  # (B,): the block of the last token
    last_filled: Tensor  # (B,): tokens in that block, 1 to c
    slots: Tensor | None = None  # (B, L): block * c + place in the block; none: tokens lie in order
    keep: Tensor | None = None  # (B, M): 0 where a block begins a document and forgets the state, else 1


def _layout(x: Tensor, resets: Tensor | None, c: int) -> _Layout:
    batch, length = x.shape[:2]
    if resets is None:
        blocks = -(-length // c)
        last_block = torch.full((batch,), blocks - 1, device=x.device)
        return _Layout(blocks, last_block, torch.full_like(last_block, length - (blocks - 1) * c))
    position = torch.arange(length, device=x.device).expand(batch, length)
    document_start = torch.where(resets, position, 0).cummax(1).values
    opens = (position - document_start) % c == 0
    block = opens.cumsum(1) - 1
    place = position - torch.where(opens, position, 0).cummax(1).values
    blocks = int(block[:, -1].max()) + 1
    keep = x.new_ones(batch, blocks).scatter_reduce(1, block, (~resets).to(x.dtype), "amin")
    return _Layout(blocks, block[:, -1], place[:, -1] + 1, block * c + place, keep)


class _ChannelsFirst(torch.autograd.Function):
    """Transposes a matrix and lays it out anew; so does its backward, which autograd would do element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(rows, columns) to contiguous (columns, rows)."""
        return x.t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Back again."""
        return gradient.t().contiguous()


class _StateScan(torch.autograd.Function):
    """`h_{m+1} = decay keep_m h_m + s_m`; returns keep_m h_m of every block m."""

    @staticmethod
    def forward(ctx: Any, ends: Tensor, decay: Tensor, state: Tensor, keep: Tensor | None) -> Tensor:
        """ends (D, B, M, N), decay (D, 1, N), state (D, B, N), keep (B, M, 1) or none."""
        before = torch.empty_like(ends)
        for m in range(ends.shape[2]):
            before[:, :, m] = state if keep is None else state * keep[:, m]
            state = torch.addcmul(ends[:, :, m], before[:, :, m], decay)
        ctx.save_for_backward(before, decay, keep)
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The same recurrence, from the last block to the first."""
        (d_before,) = gradients
        before, decay, keep = ctx.saved_tensors
        d_ends, d_decay = torch.empty_like(before), torch.zeros_like(decay)
        d_state = torch.zeros_like(before[:, :, 0])
        for m in range(before.shape[2] - 1, -1, -1):
            d_ends[:, :, m] = d_state
            d_decay += (d_state * before[:, :, m]).sum(1, keepdim=True)
            d_state = torch.addcmul(d_before[:, :, m], d_state, decay)
            if keep is not None:
                d_state = d_state * keep[:, m]
        return d_ends, d_decay, d_state, None


class BlockedEma:
    """The recurrence of `recurrent_ema` as about c + 2N multiply-adds per element in matrix products, in three steps.

    The end state is known after the first step, so where a sequence is cut, states can travel between its parts while
    the second step computes, and enter with the third.

    Args:
        x: (B, L, D) in the dtype of the coefficients.
        coefficients: (D, N) each.
        state: h before the first token, (B, D, N); none means zero.
        resets: (B, L) bool, true where a document begins. Reading how many blocks they need synchronises a GPU once.
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
        self._shape = x.shape
        self._coefficients = coefficients
        self._resets = resets
        c = self._c = min(block_size, length)
        layout = self._layout = _layout(x, resets, c)
        if layout.slots is None:
            x_blocks = F.pad(x, (0, 0, 0, layout.blocks * c - length))
        else:
            x_blocks = x.new_zeros(batch, layout.blocks * c, channels).scatter(1, self._slots(), x)
        self._x_DXc = _ChannelsFirst.apply(x_blocks.reshape(-1, channels)).view(channels, -1, c)  # X is B * M

        log_decay, gain, _ = coefficients
        steps = torch.arange(c + 1, device=x.device, dtype=x.dtype)
        self._powers = torch.exp(log_decay[:, None] * steps[:, None])  # (D, c + 1, N)
        into_state = gain[:, None] * self._powers[:, :c].flip(1)  # (D, c, N): token -> state at the end of its block
        ends = torch.bmm(self._x_DXc, into_state).view(channels, batch, layout.blocks, -1)
        keep = None if layout.keep is None else layout.keep[..., None]
        first = ends.new_zeros(channels, batch, ends.shape[-1]) if state is None else state.transpose(0, 1)
        self._before = _StateScan.apply(ends, self._powers[:, c:], first, keep)

        # The last block may be part full: its end state follows from its own tokens and the state before it.
        tail = F.pad(x[:, -c:], (0, 0, max(c - length, 0), 0))
        tail = tail * (steps[:c] >= c - layout.last_filled[:, None])[..., None]
        last_before = self._before[:, torch.arange(batch, device=x.device), layout.last_block].transpose(0, 1)
        fading = torch.exp(log_decay * layout.last_filled[:, None, None].to(x.dtype))
        self.end = fading * last_before + torch.einsum("dcn,bcd->bdn", into_state, tail)

    def _slots(self) -> Tensor:
        assert self._layout.slots is not None
        return self._layout.slots[..., None].expand(self._shape)

    def inside(self) -> None:
        """What the tokens of a block give each other."""
        _, gain, projection = self._coefficients
        c = self._c
        kernel = torch.einsum("dn,dcn->dc", projection * gain, self._powers[:, :c])
        toeplitz = F.pad(kernel, (c - 1, 0)).unfold(-1, c, 1).flip(1)  # (D, c, c): row j holds kernel[i - j]
        self._y = torch.bmm(self._x_DXc, toeplitz)

    def outputs(self, incoming: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What earlier blocks give, and what lies before all of them.

        Args:
            incoming: h before the first token, (B, D, N), if it was not known at the beginning.

        Returns:
            y (B, L, D), and h after the last token (B, D, N).
        """
        batch, length, channels = self._shape
        log_decay, _, projection = self._coefficients
        layout, before, end = self._layout, self._before, self.end
        if incoming is not None:
            blocks = torch.arange(layout.blocks, device=before.device, dtype=before.dtype)
            faded = torch.exp(log_decay[:, None] * (blocks * self._c)[:, None])  # (D, M, N)
            added = incoming.transpose(0, 1)[:, :, None] * faded[:, None]
            through = torch.exp(log_decay * length) * incoming
            if self._resets is not None:
                assert layout.keep is not None
                added = added * layout.keep.cumprod(1)[..., None]
                through = through * (~self._resets.any(1))[:, None, None]
            before, end = before + added, end + through
        out_of_state = (projection[:, None] * self._powers[:, 1:]).transpose(1, 2)  # (D, N, c): state before -> output
        y = torch.baddbmm(self._y, before.view(channels, batch * layout.blocks, -1), out_of_state)
        y = _ChannelsFirst.apply(y.view(channels, -1)).view(batch, -1, channels)
        return y[:, :length] if layout.slots is None else y.gather(1, self._slots()), end
