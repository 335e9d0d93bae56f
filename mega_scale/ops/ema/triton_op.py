"""The damped EMA by Triton kernels: where lanes begin, what travels between them, and the autograd function.

A sequence is cut into SPLITS lanes, so that the rows of every product are full and every multiprocessor is busy, even
with one sequence. With more than one lane a first pass finds the state at the end of every lane, begun at zero;
those states are joined, and a second pass computes the outputs. The backward does the same from the other end.

Legend: B batch, L length, D channels, N moving averages per channel, c tokens per block, K blocks per lane.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.ema.block_matrices import BlockMatrices
from mega_scale.ops.ema.coefficients import EmaCoefficients
from mega_scale.ops.ema.triton_gradients import adjoints_kernel, gradients_kernel
from mega_scale.ops.ema.triton_inputs import check_inputs
from mega_scale.ops.ema.triton_kernels import outputs_kernel, states_kernel
from mega_scale.ops.modes import once_differentiable

BLOCK = 16  # c
LANES = 16  # rows of a product: the least that a matrix unit takes
CHANNELS = 8  # of a program, for N up to 16
WARPS = 8
# Programs to have, about two for each of the 132 multiprocessors of an H100. A guess until it is measured.
_PROGRAMS = 264
# Below this a lane's own walk is short against joining the lanes' states.
_LEAST_BLOCKS = 8


class Lanes(NamedTuple):
    """Where lanes and their blocks lie, as tables for the kernels. A document begins a block of its own."""

    splits: int  # lanes per sequence
    blocks: int  # K
    starts: Tensor  # (B, splits * K + 1) int32
    keep: Tensor  # (B, splits * K) int32
    last: Tensor  # (B,) int32
    last_filled: Tensor  # (B,): tokens in the last block, 1 to c
    passes: Tensor | None  # (B, splits, 1, 1) bool: whether a state gets through a lane; none: all do


def find_lanes(x: Tensor, resets: Tensor | None, splits: int | None = None) -> Lanes:
    """Cut sequences into lanes.

    Args:
        x: (B, L, D); only its shape and device are read.
        resets: (B, L) bool, true where a document begins. Reading how many blocks they need synchronises a GPU once.
        splits: lanes per sequence; none: as many as fill a GPU. There may be fewer: each has a block.

    Returns:
        The lanes.
    """
    batch, length, channels = x.shape
    position = torch.arange(length, device=x.device).expand(batch, length)
    if resets is None:
        block = position // BLOCK
        needed = -(-length // BLOCK)
    else:
        document_start = torch.where(resets, position, 0).cummax(1).values
        block = ((position - document_start) % BLOCK == 0).cumsum(1) - 1
        needed = int(block[:, -1].max()) + 1
    if splits is None:
        wanted = -(-_PROGRAMS * LANES // (batch * -(-channels // CHANNELS)))
        splits = max(1, min(max(wanted, -(-LANES // batch)), needed // _LEAST_BLOCKS))
    blocks = -(-needed // splits)
    splits = -(-needed // blocks)
    # Blocks behind the last are empty: they start where the sequence ends.
    starts = torch.full((batch, splits * blocks + 1), length, device=x.device)
    starts.scatter_reduce_(1, block, position, "amin")
    keep = torch.ones(batch, splits * blocks, dtype=torch.int32, device=x.device)
    passes = None
    if resets is not None:
        keep.scatter_reduce_(1, block, (~resets).int(), "amin")
        passes = keep.view(batch, splits, blocks, 1).bool().all(2, keepdim=True)
    last = block[:, -1]
    last_filled = length - starts.gather(1, last[:, None])[:, 0]
    return Lanes(splits, blocks, starts.int(), keep, last.int(), last_filled, passes)


class _Walk(torch.autograd.Function):
    """Outputs, and the state before the last block, as functions of the tokens and of a block's matrices."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, toeplitz: Tensor, into: Tensor, out: Tensor, decay: Tensor, state: Tensor, lanes: Lanes
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, D), matrices (D, ...) as the kernels take them, state (B, D, N)."""
        run = _Run(x, decay, lanes)
        entering = state[:, None]
        if lanes.splits > 1:
            leaving = state.new_empty(_lane_shape(x, decay, lanes))
            run(states_kernel, x, into, decay, leaving, lanes.starts, lanes.keep, leaving, leaving, STORE=False)
            entering = _join(entering, leaving, decay, lanes, forward=True)
        y, last_before = torch.empty_like(x), torch.empty_like(state)
        run(
            outputs_kernel, x, toeplitz, into, out, decay, entering, lanes.starts, lanes.keep, lanes.last, y,
            last_before, PRECISION=_precision(x),
        )  # fmt: skip
        ctx.save_for_backward(x, toeplitz, into, out, decay, entering)
        ctx.lanes = lanes
        return y, last_before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Finds the states before all blocks anew, and walks back over them."""
        dy, d_last = (gradient.contiguous() for gradient in gradients)
        x, toeplitz, into, out, decay, entering = ctx.saved_tensors
        lanes: Lanes = ctx.lanes
        run = _Run(x, decay, lanes)
        shape = _lane_shape(x, decay, lanes)
        befores = decay.new_empty(*shape[:2], lanes.blocks, *shape[2:])
        run(states_kernel, x, into, decay, entering, lanes.starts, lanes.keep, befores, befores, STORE=True)
        d_leaving = decay.new_zeros(shape)
        d_entering = torch.empty_like(d_leaving)
        if lanes.splits > 1:
            run(adjoints_kernel, dy, out, decay, lanes.starts, lanes.keep, lanes.last, d_last, d_entering)
            d_leaving = _join(d_leaving[:, -1:], d_entering, decay, lanes, forward=False)
        dx = torch.empty_like(x)
        parts = [decay.new_empty(run.grid[0], *matrix.shape) for matrix in (toeplitz, into, out, decay)]
        run(
            gradients_kernel, x, dy, toeplitz, into, out, decay, befores, lanes.starts, lanes.keep, lanes.last, d_last,
            d_leaving, dx, d_entering, *parts, PRECISION=_precision(x),
        )  # fmt: skip
        # Summed here and not by atomic additions, whose order, and so whose last bits, change from run to run.
        return dx, *(part.sum(0) for part in parts), d_entering[:, 0], None


class _Run:
    """Starts kernels over the lanes of x."""

    def __init__(self, x: Tensor, decay: Tensor, lanes: Lanes) -> None:
        batch, length, channels = x.shape
        averages = decay.shape[1]
        count = batch * lanes.splits
        self._constants = constants(averages)
        self.grid = (-(-count // LANES), -(-channels // self._constants["CHANNELS"]))
        self._device = x
        self._sizes = (count, length, channels, lanes.blocks, lanes.splits)

    def __call__(self, kernel: Any, *arguments: Tensor, **constants: Any) -> None:
        with torch.cuda.device_of(self._device):
            kernel[self.grid](*arguments, *self._sizes, **self._constants, **constants, num_warps=WARPS)


def constants(averages: int) -> dict[str, int]:
    """What kernels are compiled for, besides their own: a block's sizes, and N as it is and padded."""
    padded = max(16, 1 << (averages - 1).bit_length())
    # Wider states take the registers and the shared memory of other channels.
    channels = max(1, CHANNELS * 16 // padded)
    return {"N": averages, "NP": padded, "BLOCK": BLOCK, "LANES": LANES, "CHANNELS": channels}


def _precision(x: Tensor) -> str:
    """How outputs and gradients are multiplied; states always are as in fp32 (three products of tf32 parts).

    Tokens in bf16 are exact in tf32, and rounding matrices and states to it changes the result less than rounding that
    to bf16.
    """
    return "tf32" if x.dtype == torch.bfloat16 else "tf32x3"


def _lane_shape(x: Tensor, decay: Tensor, lanes: Lanes) -> tuple[int, ...]:
    return x.shape[0], lanes.splits, *decay.shape


def _join(first: Tensor, own: Tensor, decay: Tensor, lanes: Lanes, forward: bool) -> Tensor:
    """What enters every lane, from what each gives when nothing enters it.

    Args:
        first: what enters the first lane, (B, 1, D, N); backward: the last one.
        own: (B, splits, D, N).
        decay: of one block, (D, N).
        lanes: where they lie.
        forward: whether states travel to later lanes, or gradients to earlier ones.

    Returns:
        (B, splits, D, N).
    """
    fade = decay**lanes.blocks
    joined = torch.empty_like(own)
    order = range(lanes.splits) if forward else range(lanes.splits - 1, -1, -1)
    current = first[:, 0]
    for lane in order:
        joined[:, lane] = current
        through = current * fade
        if lanes.passes is not None:
            through = through * lanes.passes[:, lane]
        current = own[:, lane] + through
    return joined


def triton_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None,
    resets: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `recurrent_ema` by Triton kernels, for a GPU (or anywhere, interpreted: TRITON_INTERPRET=1).

    Backward needs once, for a while, (B, L / c, D, N) fp32 for the states before all blocks; forward keeps x.

    Args:
        x: (B, L, D), bf16, fp16 or fp32.
        coefficients: (D, N) fp32 each.
        state: h before the first token, (B, D, N) fp32; none means zero.
        resets: (B, L) bool, true where a document begins. Reading how many blocks they need synchronises a GPU once.
        splits: lanes per sequence; none: as many as fill a GPU.

    Returns:
        y (B, L, D) in the dtype of x, and h after the last token (B, D, N) fp32.

    Raises:
        ValueError: x is not on a GPU and kernels are not interpreted, or a dtype has no kernel.
    """
    log_decay = coefficients.log_decay
    check_inputs("triton", x, log_decay)
    batch, length = x.shape[:2]
    x = x.contiguous()
    if state is None:
        state = log_decay.new_zeros(batch, *log_decay.shape)
    lanes = find_lanes(x, resets, splits)

    matrices = BlockMatrices.of(coefficients, BLOCK)
    y, last_before = _Walk.apply(x, *matrices, state.contiguous(), lanes)

    # The last block may be part full: its end state follows from its own tokens and the state before it.
    tail = F.pad(x[:, -BLOCK:].to(log_decay.dtype), (0, 0, max(BLOCK - length, 0), 0))
    steps = torch.arange(BLOCK, device=x.device, dtype=log_decay.dtype)
    tail = tail * (steps >= BLOCK - lanes.last_filled[:, None])[..., None]
    fading = torch.exp(log_decay * lanes.last_filled[:, None, None].to(log_decay.dtype))
    return y, fading * last_before + torch.einsum("dcn,bcd->bdn", matrices.into, tail)
