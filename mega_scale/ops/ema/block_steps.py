"""The three steps of the blocked EMA, with backward passes that need little memory beside their results.

Autograd would keep tokens in blocks, and hold several gradients of their size at once. Here tokens are kept as they
came, brought into blocks again slice by slice, and gradients grow in place: those that a step hands to the one before
it have no other reader.

Legend: B batch, L length, D channels, N moving averages per channel, c tokens per block, M blocks per sequence;
X = B M blocks of all sequences. "In blocks" is explained in `BlockLayout`.
"""

from typing import Any

import torch
from torch import Tensor

from mega_scale.ops.ema.block_layout import BlockLayout
from mega_scale.ops.modes import once_differentiable


class EmaStates(torch.autograd.Function):
    """First step: states before every block, `h_{m+1} = decay keep_m h_m + (tokens of m) into_state`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, into_state: Tensor, decay: Tensor, fading: Tensor, state: Tensor, layout: BlockLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D), into_state (D, c, N), decay of a block (D, N), fading of the last (B, D, N), state (B, D, N).

        Returns:
            x in blocks; keep_m h_m, (B, M, D, N); and the state after the last token, (B, D, N).
        """
        batch, _, channels = x.shape
        in_blocks, before = layout.empty(x), x.new_empty(batch, layout.blocks, *decay.shape)
        ends = before.view(-1, *decay.shape).transpose(0, 1)
        for part in layout.slices:
            tokens = layout.take(x, part, layout.slice_of(in_blocks, channels, part))
            ends[:, part.blocks] = torch.bmm(tokens, into_state)
        running = state
        for m in range(layout.blocks):
            kept = running if layout.keep is None else running * layout.keep[:, m, None, None]
            running = torch.addcmul(before[:, m], kept, decay)
            before[:, m] = kept
        # The last block may be part full: its end state follows from its own tokens and the state before it.
        last = before[torch.arange(batch, device=x.device), layout.last_block]
        end = fading * last + torch.einsum("dcn,bcd->bdn", into_state, _tail(x, layout))
        ctx.layout = layout
        ctx.save_for_backward(x, into_state, decay, fading, before)
        ctx.set_materialize_grads(False)
        return in_blocks, before, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_blocks: Tensor | None, d_before: Tensor | None, d_end: Tensor | None) -> Any:
        """The same recurrence, from the last block to the first."""
        x, into_state, decay, fading, before = ctx.saved_tensors
        layout, batch, channels = ctx.layout, len(x), x.shape[2]
        d_into_state, d_decay, d_fading = torch.zeros_like(into_state), torch.zeros_like(decay), None
        d_before = torch.zeros_like(before) if d_before is None else d_before
        if d_end is not None:
            index = torch.arange(batch, device=x.device), layout.last_block
            d_fading = d_end * before[index]
            d_before[index] += d_end * fading
            d_into_state += torch.einsum("bdn,bcd->dcn", d_end, _tail(x, layout))
        running = torch.zeros_like(before[:, 0])
        for m in range(layout.blocks - 1, -1, -1):
            d_decay += (running * before[:, m]).sum(0)
            earlier = torch.addcmul(d_before[:, m], running, decay)
            d_before[:, m] = running
            running = earlier if layout.keep is None else earlier * layout.keep[:, m, None, None]
        d_ends = d_before.view(-1, *decay.shape).transpose(0, 1)
        d_x = x.new_empty(x.shape) if d_blocks is None or layout.places is not None else d_blocks.view_as(x)
        for part in layout.slices:
            own = d_ends[:, part.blocks]
            d_into_state.baddbmm_(layout.take(x, part).mT, own)
            if d_blocks is None:
                found = torch.bmm(own, into_state.mT)
            else:
                found = torch.baddbmm(layout.slice_of(d_blocks, channels, part), own, into_state.mT)
            layout.put(found, d_x, part)
        if d_end is not None:
            d_tail = torch.einsum("dcn,bdn->bcd", into_state, d_end)
            d_x[:, -layout.c :] += d_tail * _in_last_block(x, layout)
        return d_x, d_into_state, d_decay, d_fading, running, None


class EmaInside(torch.autograd.Function):
    """Second step: what the tokens of a block give each other."""

    @staticmethod
    def forward(ctx: Any, in_blocks: Tensor, x: Tensor, toeplitz: Tensor, layout: BlockLayout) -> Tensor:
        """Tokens in blocks; the same (B, L, D) once more, which takes no gradient; toeplitz (D, c, c).

        Returns:
            Outputs in blocks.
        """
        ctx.layout = layout
        ctx.save_for_backward(x, toeplitz)
        out = torch.empty_like(in_blocks)
        for part in layout.slices:
            tokens, own = (layout.slice_of(t, x.shape[2], part) for t in (in_blocks, out))
            own.copy_(torch.bmm(tokens, toeplitz))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, None]:
        """Its own gradient is the room for that of the tokens."""
        x, toeplitz = ctx.saved_tensors
        d_toeplitz = torch.zeros_like(toeplitz)
        for part in ctx.layout.slices:
            own = ctx.layout.slice_of(gradient, x.shape[2], part)
            d_toeplitz.baddbmm_(ctx.layout.take(x, part).mT, own)
            own.copy_(torch.bmm(own, toeplitz.mT))
        return gradient, None, d_toeplitz, None


class EmaOutputs(torch.autograd.Function):
    """Third step: what the state before a block gives its tokens, and all of it back in order."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, before: Tensor, added: Tensor | None, out_of_state: Tensor, layout: BlockLayout
    ) -> Tensor:
        """y in blocks, before and what is added to it (B, M, D, N), out_of_state (D, N, c) to (B, L, D)."""
        batch, _, channels, averages = before.shape
        before = before if added is None else before + added
        ctx.layout, ctx.adds = layout, added is not None
        ctx.save_for_backward(before, out_of_state)
        out = y.new_empty(batch, layout.length, channels)
        states = before.view(-1, channels, averages).transpose(0, 1)
        for part in layout.slices:
            own = layout.slice_of(y, channels, part)
            layout.put(torch.baddbmm(own, states[:, part.blocks], out_of_state), out, part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, None]:
        """Slice by slice, as forward."""
        before, out_of_state = ctx.saved_tensors
        layout, (channels, averages) = ctx.layout, before.shape[2:]
        d_y, d_before = layout.empty(gradient), torch.empty_like(before)
        d_out_of_state = torch.zeros_like(out_of_state)
        states, d_states = (t.view(-1, channels, averages).transpose(0, 1) for t in (before, d_before))
        for part in layout.slices:
            own = layout.take(gradient, part, layout.slice_of(d_y, channels, part))
            d_states[:, part.blocks] = torch.bmm(own, out_of_state.mT)
            d_out_of_state.baddbmm_(states[:, part.blocks].mT, own)
        # Not the same tensor twice: the first step writes into its own.
        return d_y, d_before, d_before.clone() if ctx.adds else None, d_out_of_state, None


def _tail(x: Tensor, layout: BlockLayout) -> Tensor:
    """The last c tokens, (B, c, D), zero before the last block."""
    return x[:, -layout.c :] * _in_last_block(x, layout)


def _in_last_block(x: Tensor, layout: BlockLayout) -> Tensor:
    """1 for those that are in it, else 0, (B, c, 1)."""
    steps = torch.arange(layout.c, device=x.device)
    return (steps >= layout.c - layout.last_filled[:, None]).to(x.dtype)[..., None]
