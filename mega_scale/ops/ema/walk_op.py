"""The damped EMA by Triton kernels that walk from token to token: the autograd function, and the end of a sequence.

Legend: B batch, L length, D channels, N moving averages per channel.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.ops.ema.coefficients import EmaCoefficients
from mega_scale.ops.ema.triton_inputs import check_inputs
from mega_scale.ops.ema.walk_gradients import gradients_kernel
from mega_scale.ops.ema.walk_kernels import outputs_kernel
from mega_scale.ops.modes import once_differentiable

MOST_AVERAGES = 16  # more do not fit the registers of a thread


class Walk(NamedTuple):
    """What a kernel is compiled for; all powers of two."""

    segments: int  # of a tile, side by side in a program's threads
    tokens: int  # of a segment
    unroll: int  # tokens that are read at once; half as many where registers hold documents' borders, or states
    channels: int  # of a program
    warps: int  # so many that each thread has one segment and channel

    def constants(self, averages: int, documents: bool, states: bool) -> dict[str, int]:
        """The kernels' own names for them, with N as it is and padded.

        Args:
            averages: N.
            documents: whether there are borders.
            states: whether a state is given, or the gradient by one.
        """
        unroll = max(1, self.unroll // (1 + documents) // (1 + states))
        return {
            "N": averages, "NP": 1 << (averages - 1).bit_length(), "SEGMENTS": self.segments, "TOKENS": self.tokens,
            "UNROLL": unroll, "CHANNELS": self.channels, "DOCUMENTS": documents,
        }  # fmt: skip


# Guesses until they are measured. The backward pass holds more than 128 numbers a thread, of which there can be 65,536.
OUTPUTS = Walk(segments=16, tokens=64, unroll=8, channels=32, warps=16)
GRADIENTS = Walk(segments=8, tokens=64, unroll=4, channels=32, warps=8)


class _WalkFunction(torch.autograd.Function):
    """Outputs, and the state before the last segment's tokens, faded once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_decay: Tensor,
        gain: Tensor,
        projection: Tensor,
        state: Tensor | None,
        retain: Tensor | None,
        walks: tuple[Walk, Walk],
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, D), coefficients (N, D), state (B, N, D), retain (B, L)."""
        ctx.set_materialize_grads(False)
        y, last_before = torch.empty_like(x), log_decay.new_empty(len(x), *log_decay.shape)
        run = _Run(x, log_decay, walks[0], 1, retain is not None, state is not None)
        run(
            outputs_kernel, x, log_decay.exp(), log_decay, gain, projection, gain if state is None else state,
            gain if retain is None else retain, run.scratch, y, last_before, INITIAL=state is not None,
        )  # fmt: skip
        if state is None:
            last_before *= gain
        ctx.save_for_backward(x, log_decay, gain, projection, state, retain)
        ctx.walk = walks[1]
        return y, last_before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        x, log_decay, gain, projection, state, retain = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        ends = d_last is not None
        d_last = gain if d_last is None else d_last.contiguous()  # what is not read is any tensor
        decay, dx = log_decay.exp(), torch.empty_like(x)
        sums = log_decay.new_empty(3 if ends else 2, len(x), *log_decay.shape)
        entered = log_decay.new_empty(4 if ends else 2, len(x), *log_decay.shape)
        run = _Run(x, log_decay, ctx.walk, len(entered), retain is not None, ends)
        run(
            gradients_kernel, x, dy, decay, log_decay, gain, projection, gain if retain is None else retain,
            d_last, run.scratch, dx, sums[0], sums[1], sums[-1], entered, LAST=ends,
        )  # fmt: skip
        # Summed here and not by atomic additions, whose order, and so whose last bits, change from run to run.
        adjoint, slope, output = sums[0].sum(0), sums[1].sum(0), sums[-1].sum(0)
        if ends:
            d_gain, d_projection, d_decay = adjoint, gain * output, gain * slope
        else:
            d_gain, d_projection, d_decay = projection * adjoint, gain * adjoint, gain * projection * slope
        d_state = None
        if state is not None:
            output, slope = entered[0], projection * entered[1] + (entered[3] if ends else 0)
            adjoint = projection * output + (entered[2] if ends else 0)
            if retain is not None:
                lost = retain[:, :1, None] == 0
                # Neither side reaches the other, be it infinite.
                state, output, slope, adjoint = (t.masked_fill(lost, 0) for t in (state, output, slope, adjoint))
            d_state = decay * adjoint
            d_projection = d_projection + (state * decay * output).sum(0)
            d_decay = d_decay + (state * (adjoint + decay * slope)).sum(0)
        return dx, d_decay * decay, d_gain, d_projection, d_state, None, None


class _Run:
    """Starts a kernel over the sequences and groups of channels of x, with memory for what its threads exchange."""

    def __init__(self, x: Tensor, log_decay: Tensor, walk: Walk, kinds: int, documents: bool, states: bool) -> None:
        batch, length, channels = x.shape
        averages = len(log_decay)
        self.grid = (batch, -(-channels // walk.channels))
        slots = (kinds * averages + 1) * walk.segments * walk.channels
        self.scratch = log_decay.new_empty(self.grid[0] * self.grid[1] * slots)
        self._constants = {**walk.constants(averages, documents, states), "num_warps": walk.warps}
        self._sizes = (length, channels, -(-length // (walk.segments * walk.tokens)))
        self._device = x

    def __call__(self, kernel: Any, *arguments: Tensor, **constants: Any) -> None:
        with torch.cuda.device_of(self._device):
            kernel[self.grid](*arguments, *self._sizes, **self._constants, **constants)


def walk_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None,
    resets: Tensor | None = None,
    walks: tuple[Walk, Walk] = (OUTPUTS, GRADIENTS),
) -> tuple[Tensor, Tensor]:
    """The recurrence of `recurrent_ema` by Triton kernels, for a GPU (or anywhere, interpreted: TRITON_INTERPRET=1).

    Forward keeps x, and backward needs no states; either reads and writes tokens once.

    Args:
        x: (B, L, D), bf16, fp16 or fp32.
        coefficients: (D, N) fp32 each, N up to 16.
        state: h before the first token, (B, D, N) fp32; none means zero.
        resets: (B, L) bool, true where a document begins.
        walks: of the forward and of the backward kernel, with segments of equal length.

    Returns:
        y (B, L, D) in the dtype of x, and h after the last token (B, D, N) fp32.

    Raises:
        ValueError: x is not on a GPU and kernels are not interpreted, a dtype has no kernel, or N is too large.
    """
    log_decay = coefficients.log_decay
    check_inputs("triton_walk", x, log_decay)
    if log_decay.shape[1] > MOST_AVERAGES:
        raise ValueError(
            f"impl='triton_walk' holds up to {MOST_AVERAGES} moving averages per channel, not {log_decay.shape[1]}: "
            "use impl='triton'"
        )
    tokens, length = walks[0].tokens, x.shape[1]
    x = x.contiguous()
    retain = None if resets is None else (~resets).float()
    by_average = [c.mT.contiguous() for c in coefficients]
    y, last_before = _WalkFunction.apply(
        x, *by_average, None if state is None else state.mT.contiguous(), retain, walks
    )

    # The last segment may be part full: its end state follows from its own tokens and the state before it.
    filled = (length - 1) % tokens + 1
    tail = x[:, -filled:].to(log_decay.dtype)
    if resets is not None:
        alive = resets[:, -filled:].flip(1).cumsum(1).flip(1)  # borders at or behind a token
        tail = tail.masked_fill((alive > resets[:, -filled:])[..., None], 0)
        last_before = last_before.masked_fill((alive[:, :1] > 0)[..., None], 0)
    steps = torch.arange(filled - 1, -1, -1, device=x.device, dtype=log_decay.dtype)
    into = torch.exp(log_decay[:, None] * steps[:, None]) * coefficients.gain[:, None]
    fading = torch.exp(log_decay * (filled - 1))
    return y, fading * last_before.mT + torch.einsum("dcn,bcd->bdn", into, tail)
