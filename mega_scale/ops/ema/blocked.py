"""The damped EMA in blocks: matrix products inside blocks, a scan over one state per block.

q does not depend on the input, so inside a block of c tokens the EMA of a channel is one lower-triangular Toeplitz
matrix, shared by all blocks of all sequences. A block needs the past only as the state at its beginning. Three steps,
each an autograd function: states before every block, tokens to the outputs of their own block, states to outputs.

Backward passes need little memory beside their results. Autograd would keep tokens in blocks, matrices, and several
gradients of their size at once. Here tokens are saved as they came and brought into blocks again slice by slice, powers
of the decay are computed again, and gradients grow in place: those that a step hands to the one before it have no other
reader.

Legend: B batch, L length, D channels, N moving averages per channel, c tokens per block, M blocks per sequence;
X = B M blocks of all sequences; P_s is the decay of s tokens. "In blocks" is explained in `BlockLayout`.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import once_differentiable
from mega_scale.ops.ema.reference import EmaCoefficients

_BLOCK = 32  # tokens
# Numbers of a slice: it should stay in a core's cache, hardly count beside whole tensors, and still be worth a matrix
# product a channel.
_SLICE = 2**18
# A GPU needs large products.
_GPU_SLICE = 2**26


class BlockedEma:
    """`recurrent_ema` as about c + 2N multiply-adds per element in matrix products, in three steps.

    The end state is known after the first step, so where a sequence is cut, states can travel between its parts while
    the second step computes, and enter with the third.

    Takes what `recurrent_ema` takes, no state meaning zero; reading how many blocks documents need synchronises a GPU.
    `end` is h after the last token, (B, D, N).
    """

    def __init__(self, x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None) -> None:
        batch, length, channels = x.shape
        self._x, self._coefficients, self._resets = x, coefficients, resets
        c = min(_BLOCK, length)
        layout = self._layout = BlockLayout.of(x, resets, c)
        log_decay = coefficients.log_decay
        self._toeplitz, into, self._out, decay = _Matrices.apply(*coefficients, c)
        fading = torch.exp(log_decay * layout.last_filled[:, None, None].to(x.dtype))
        first = x.new_zeros(batch, channels, log_decay.shape[1]) if state is None else state
        self._x_blocks, self._before, self.end = EmaStates.apply(x, into, decay, fading, first, layout)

    def inside(self) -> None:
        """What the tokens of a block give each other."""
        self._y_blocks = EmaInside.apply(self._x_blocks, self._x.detach(), self._toeplitz, self._layout)
        del self._x_blocks  # as large as x

    def outputs(self, incoming: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What earlier blocks give, and the state before all of them (B, D, N) if it was not known at the beginning."""
        log_decay = self._coefficients.log_decay
        layout, end, added = self._layout, self.end, None
        if incoming is not None:
            blocks = torch.arange(layout.blocks, device=end.device, dtype=end.dtype)
            added = incoming[:, None] * torch.exp(log_decay * (blocks * layout.c)[:, None, None])  # (B, M, D, N)
            through = torch.exp(log_decay * self._x.shape[1]) * incoming
            if self._resets is not None:
                assert layout.keep is not None
                added = added * layout.keep.cumprod(1)[..., None, None]
                through = through * (~self._resets.any(1))[:, None, None]
            end = end + through
        return EmaOutputs.apply(self._y_blocks, self._before, added, self._out, layout), end


class Slice(NamedTuple):
    """Blocks that are worked on at a time, and their tokens, counted over all sequences."""

    blocks: slice
    tokens: slice


class BlockLayout(NamedTuple):
    """A document begins a block of its own, so no block holds two documents.

    Tensors "in blocks" are flat: slice after slice, each channel by channel, so that a slice is (D, its blocks, c).
    """

    length: int  # L
    c: int
    blocks: int  # M, the same for every sequence
    last_block: Tensor  # (B,): the block of the last token
    last_filled: Tensor  # (B,): tokens in that block, 1 to c
    slices: tuple[Slice, ...]
    places: Tensor | None = None  # (B L,): block * c + place in the block, over all sequences; none: tokens fill blocks
    keep: Tensor | None = None  # (B, M): 0 where a block begins a document and forgets the state, else 1

    @classmethod
    def of(cls, x: Tensor, resets: Tensor | None, c: int) -> "BlockLayout":
        """The layout for tokens x (B, L, D) with documents that begin where resets (B, L) are true."""
        batch, length, channels = x.shape
        sequence = torch.arange(batch, device=x.device)[:, None]
        position = torch.arange(length, device=x.device).expand(batch, length)
        places = keep = None
        if resets is None:
            blocks = -(-length // c)
            last_block = torch.full((batch,), blocks - 1, device=x.device)
            last_filled = torch.full_like(last_block, length - (blocks - 1) * c)
            if length % c:
                places = (sequence * blocks * c + position).flatten()
        else:
            document_start = torch.where(resets, position, 0).cummax(1).values
            opens = (position - document_start) % c == 0
            block = opens.cumsum(1) - 1
            place = position - torch.where(opens, position, 0).cummax(1).values
            blocks = int(block[:, -1].max()) + 1
            last_block, last_filled = block[:, -1], place[:, -1] + 1
            keep = x.new_ones(batch, blocks).scatter_reduce(1, block, (~resets).to(x.dtype), "amin")
            places = ((sequence * blocks + block) * c + place).flatten()
        # Where slices of about as many blocks begin, and where the last one ends; then the same in tokens.
        count = -(-batch * blocks // max((_GPU_SLICE if x.is_cuda else _SLICE) // (c * channels), 1))
        edges = [batch * blocks * i // count for i in range(count + 1)]
        if resets is None or places is None:
            tokens = [edge // blocks * length + min(edge % blocks * c, length) for edge in edges]
        else:
            tokens = torch.searchsorted(places, torch.tensor(edges, device=x.device) * c).tolist()
        slices = tuple(Slice(slice(*b), slice(*t)) for b, t in zip(pairwise(edges), pairwise(tokens), strict=True))
        return cls(length, c, blocks, last_block, last_filled, slices, places, keep)

    def slice_of(self, in_blocks: Tensor, channels: int, part: Slice) -> Tensor:
        """A slice (D, blocks, c) of a tensor in blocks, which it shares its memory with."""
        block = self.c * channels
        flat = in_blocks[part.blocks.start * block : part.blocks.stop * block]
        return flat.view(channels, -1, self.c)

    def take(self, x: Tensor, part: Slice, out: Tensor | None = None) -> Tensor:
        """A slice (D, blocks, c) of tokens x (B, L, D), new or in `out`; places that no token fills are zero."""
        rows = x.reshape(-1, x.shape[2])[part.tokens]
        if self.places is not None:
            first, end = part.blocks.start * self.c, part.blocks.stop * self.c
            rows = rows.new_zeros(end - first, x.shape[2]).index_copy(0, self.places[part.tokens] - first, rows)
        if out is None:
            out = rows.new_empty(x.shape[2], len(rows) // self.c, self.c)
        out.view(x.shape[2], -1).copy_(rows.t())
        return out

    def put(self, values: Tensor, into: Tensor, part: Slice) -> None:
        """Write a slice (D, blocks, c) to its tokens of a contiguous (B, L, D)."""
        rows = values.reshape(len(values), -1).t()
        if self.places is not None:
            places = self.places[part.tokens] - part.blocks.start * self.c
            rows = rows.contiguous().index_select(0, places)
        into.view(-1, len(values))[part.tokens].copy_(rows)


class _Matrices(torch.autograd.Function):
    """What tokens x and the state h before a block make of it: `y = x toeplitz + h out`, `h' = decay h + x into`.

    * toeplitz, (D, c, c): token j to output i, `sum_n projection gain P_{i-j}`, zero where j > i;
    * into, (D, c, N): token j to the state after the block, `gain P_{c-1-j}`;
    * out, (D, N, c): state before the block to output i, `projection P_{i+1}`;
    * decay, (D, N): P_c.
    """

    @staticmethod
    def forward(ctx: Any, log_decay: Tensor, gain: Tensor, projection: Tensor, c: int) -> tuple[Tensor, ...]:
        ctx.c = c
        ctx.save_for_backward(log_decay, gain, projection)
        steps = torch.arange(c + 1, device=log_decay.device, dtype=log_decay.dtype)
        powers = torch.exp(log_decay[:, None] * steps[:, None])  # P_0 to P_c, (D, c + 1, N)
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
        c = ctx.c
        steps = torch.arange(c + 1, device=log_decay.device, dtype=log_decay.dtype)
        powers = torch.exp(log_decay[:, None] * steps[:, None])
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
        d_log_decay = torch.einsum("s,dsn,dsn->dn", steps, powers, d_powers)
        return d_log_decay, d_gain, d_projection, None


class EmaStates(torch.autograd.Function):
    """First step: states before every block, `h_{m+1} = decay keep_m h_m + (tokens of m) into_state`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, into_state: Tensor, decay: Tensor, fading: Tensor, state: Tensor, layout: BlockLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D), into_state (D, c, N), decay of a block (D, N), fading of the last (B, D, N), state (B, D, N).

        Returns x in blocks; keep_m h_m, (B, M, D, N); and the state after the last token, (B, D, N).
        """
        batch, _, channels = x.shape
        in_blocks, before = (
            x.new_empty(batch * layout.blocks * layout.c * channels),
            x.new_empty(batch, layout.blocks, *decay.shape),
        )
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
        end = fading * last + torch.einsum("dcn,bcd->bdn", into_state, x[:, -layout.c :] * _in_last_block(x, layout))
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
            d_into_state += torch.einsum("bdn,bcd->dcn", d_end, x[:, -layout.c :] * _in_last_block(x, layout))
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
        """From tokens in blocks; the same (B, L, D) once more, which takes no gradient; toeplitz (D, c, c)."""
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
        d_y, d_before = gradient.new_empty(len(before) * layout.blocks * layout.c * channels), torch.empty_like(before)
        d_out_of_state = torch.zeros_like(out_of_state)
        states, d_states = (t.view(-1, channels, averages).transpose(0, 1) for t in (before, d_before))
        for part in layout.slices:
            own = layout.take(gradient, part, layout.slice_of(d_y, channels, part))
            d_states[:, part.blocks] = torch.bmm(own, out_of_state.mT)
            d_out_of_state.baddbmm_(states[:, part.blocks].mT, own)
        # Not the same tensor twice: the first step writes into its own.
        return d_y, d_before, d_before.clone() if ctx.adds else None, d_out_of_state, None


def _in_last_block(x: Tensor, layout: BlockLayout) -> Tensor:
    """1 for those of the last c tokens that are in the last block, else 0, (B, c, 1)."""
    steps = torch.arange(layout.c, device=x.device)
    return (steps >= layout.c - layout.last_filled[:, None]).to(x.dtype)[..., None]
