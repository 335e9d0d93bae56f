"""The damped EMA by Triton kernels: lanes walk over blocks of tokens side by side, products run on matrix units.

A lane is one stretch of one sequence: K consecutive blocks of at most c tokens. q does not depend on the input, so a
block's products use matrices that all lanes share: per channel, the lanes are the rows and the matrix is c x c
(token to output, `toeplitz`), c x N (token to the state after the block, `into`) or N x c (state before the block to
output, `out`). The states of a program's lanes and channels stay in registers, in fp32, and fade by multiplication.

A sequence is cut into SPLITS lanes, so that the rows of every product are full and every multiprocessor is busy, even
with one sequence. With more than one lane a first pass finds the state at the end of every lane, begun at zero;
those states are joined, and a second pass computes the outputs. The backward does the same from the last block;
`adjoint` is the gradient of the loss by the state after a block, that by the state before it leaves out what the block
itself forgets.

Legend: B batch, L length, D channels, N moving averages per channel, c tokens per block (BLOCK), K blocks per lane; NP
is N padded, LANES and CHANNELS are what one program holds. Program (i, j) holds the i-th group of lanes and the j-th
group of channels.

    x, y, dy, dx     (B, L, D), contiguous, any floating dtype up to fp32
    toeplitz, into, out, decay   (D, c, c), (D, c, N), (D, N, c), (D, N): fp32
    starts           (B, SPLITS * K + 1) int32: first token of every block; block m ends where m + 1 starts
    keep             (B, SPLITS * K) int32: 0 where a block begins a document and forgets the state, else 1
    last             (B,) int32: the block of the last token
    lane states      (B * SPLITS, D, N) fp32
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.ema.blocked import BlockMatrices
from mega_scale.ops.ema.reference import EmaCoefficients
from mega_scale.ops.modes import once_differentiable

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the EMA's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

BLOCK = 16  # c
LANES = 16  # rows of a product: the least that a matrix unit takes
CHANNELS = 8  # of a program, for N up to 16
WARPS = 8
# Programs to have, about two for each of the 132 multiprocessors of an H100. A guess until it is measured.
_PROGRAMS = 264
# Below this a lane's own walk is short against joining the lanes' states.
_LEAST_BLOCKS = 8


def interpreted() -> bool:
    """Whether kernels run in Python, on any device (the environment variable TRITON_INTERPRET)."""
    return bool(triton.knobs.runtime.interpret)


def check_inputs(impl: str, x: Tensor, log_decay: Tensor) -> None:
    """Refuse what no kernel takes.

    Args:
        impl: name of the implementation, for the message.
        x: tokens.
        log_decay: of the coefficients.

    Raises:
        ValueError: x is not on a GPU and kernels are not interpreted, or a dtype has no kernel.
    """
    if not x.is_cuda and not interpreted():
        raise ValueError(f"impl={impl!r} needs a GPU and x is on {x.device}: use impl='blocked'")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or log_decay.dtype != torch.float32:
        raise ValueError(
            f"impl={impl!r} takes bf16, fp16 or fp32 inputs and fp32 coefficients, not {x.dtype} and "
            f"{log_decay.dtype}: use impl='blocked'"
        )


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


@triton.jit
def _lanes(starts, keep, first_lane, lanes, k, K, SPLITS, LANES: tl.constexpr):
    """Of every lane's k-th block: sequence, number, first token, the token after its last, and keep; all (LANES,).

    Lanes that do not exist have empty blocks.
    """
    lane = first_lane + tl.arange(0, LANES)
    real = lane < lanes
    sequence = lane // SPLITS
    block = (lane % SPLITS) * K + k
    at = sequence.to(tl.int64) * (SPLITS * K) + block
    start = tl.load(starts + at + sequence, mask=real, other=0)
    stop = tl.load(starts + at + sequence + 1, mask=real, other=0)
    return sequence, block, start, stop, tl.load(keep + at, mask=real, other=1) != 0


@triton.jit
def _token_offsets(sequence, start, stop, first_channel, L, D, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a block's tokens lie in (B, L, D), and which of them there are: (CHANNELS, LANES, BLOCK)."""
    channel = first_channel + tl.arange(0, CHANNELS)
    token = start[:, None] + tl.arange(0, BLOCK)[None, :]
    row = sequence.to(tl.int64)[:, None] * L + token
    offsets = row[None, :, :] * D + channel[:, None, None]
    return offsets, (token < stop[:, None])[None, :, :] & (channel < D)[:, None, None]


@triton.jit
def _state_offsets(row, first_channel, rows, D, N: tl.constexpr, NP: tl.constexpr, CHANNELS: tl.constexpr):
    """Where states lie in (rows, D, N), and which of them there are: (CHANNELS, LANES, NP)."""
    channel = (first_channel + tl.arange(0, CHANNELS))[:, None, None]
    average = tl.arange(0, NP)[None, None, :]
    offsets = (row.to(tl.int64)[None, :, None] * D + channel) * N + average
    return offsets, (row < rows)[None, :, None] & (channel < D) & (average < N)


@triton.jit
def _matrix_offsets(
    first_channel, D, rows: tl.constexpr, columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Where matrices lie in (D, rows, columns), and which elements there are: (CHANNELS, ROWS, COLUMNS)."""
    channel = (first_channel + tl.arange(0, CHANNELS))[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    return (channel * rows + row) * columns + column, (channel < D) & (row < rows) & (column < columns)


@triton.jit
def _operand(values, PRECISION: tl.constexpr):
    """Fp32 values as a product with PRECISION wants them: rounded to tf32, whose matrix units just cut off 13 bits."""
    if PRECISION == "tf32":
        nearest = ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # A NaN of all ones would become zero, and none equals itself.
        values = tl.where(values == values, nearest, values)  # noqa: PLR0124
    return values


@triton.jit
def states_kernel(
    x, into, decay, entering, starts, keep, befores, leaving, lanes, L, D, K, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Only the states: `leaving` every lane; with STORE those before every block, `befores` (lanes, K, D, N).

    With STORE it begins with `entering`, else with zero.
    """
    first_lane = tl.program_id(0) * LANES
    first_channel = tl.program_id(1) * CHANNELS
    lane = first_lane + tl.arange(0, LANES)
    at, there = _matrix_offsets(first_channel, D, BLOCK, N, BLOCK, NP, CHANNELS)
    to_state = tl.load(into + at, mask=there, other=0.0)
    at, there = _matrix_offsets(first_channel, D, 1, N, 1, NP, CHANNELS)
    fade = tl.load(decay + at, mask=there, other=0.0)
    state_at, state_there = _state_offsets(lane, first_channel, lanes, D, N, NP, CHANNELS)
    state = tl.zeros((CHANNELS, LANES, NP), tl.float32)
    if STORE:
        state = tl.load(entering + state_at, mask=state_there, other=0.0)
    for k in range(K):
        sequence, _, start, stop, kept = _lanes(starts, keep, first_lane, lanes, k, K, SPLITS, LANES)
        token_at, token_there = _token_offsets(sequence, start, stop, first_channel, L, D, BLOCK, CHANNELS)
        tokens = tl.load(x + token_at, mask=token_there, other=0.0).to(tl.float32)
        state = tl.where(kept[None, :, None], state, 0.0)
        if STORE:
            block_at, block_there = _state_offsets(lane * K + k, first_channel, lanes * K, D, N, NP, CHANNELS)
            tl.store(befores + block_at, state, mask=block_there)
        state = state * fade + tl.dot(tokens, to_state, input_precision="tf32x3")
    if not STORE:
        tl.store(leaving + state_at, state, mask=state_there)


@triton.jit
def outputs_kernel(
    x, toeplitz, into, out, decay, entering, starts, keep, last, y, last_before, lanes, L, D, K, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs y, and the state before every sequence's last block, `last_before` (B, D, N)."""
    first_lane = tl.program_id(0) * LANES
    first_channel = tl.program_id(1) * CHANNELS
    lane = first_lane + tl.arange(0, LANES)
    at, there = _matrix_offsets(first_channel, D, BLOCK, BLOCK, BLOCK, BLOCK, CHANNELS)
    to_output = _operand(tl.load(toeplitz + at, mask=there, other=0.0), PRECISION)
    at, there = _matrix_offsets(first_channel, D, BLOCK, N, BLOCK, NP, CHANNELS)
    to_state = tl.load(into + at, mask=there, other=0.0)
    at, there = _matrix_offsets(first_channel, D, N, BLOCK, NP, BLOCK, CHANNELS)
    from_state = _operand(tl.load(out + at, mask=there, other=0.0), PRECISION)
    at, there = _matrix_offsets(first_channel, D, 1, N, 1, NP, CHANNELS)
    fade = tl.load(decay + at, mask=there, other=0.0)
    last_block = tl.load(last + lane // SPLITS, mask=lane < lanes, other=-1)
    at, there = _state_offsets(lane, first_channel, lanes, D, N, NP, CHANNELS)
    state = tl.load(entering + at, mask=there, other=0.0)
    for k in range(K):
        sequence, block, start, stop, kept = _lanes(starts, keep, first_lane, lanes, k, K, SPLITS, LANES)
        token_at, token_there = _token_offsets(sequence, start, stop, first_channel, L, D, BLOCK, CHANNELS)
        tokens = tl.load(x + token_at, mask=token_there, other=0.0).to(tl.float32)
        state = tl.where(kept[None, :, None], state, 0.0)
        end_at, end_there = _state_offsets(sequence, first_channel, lanes, D, N, NP, CHANNELS)
        tl.store(last_before + end_at, state, mask=end_there & (block == last_block)[None, :, None])
        outputs = tl.dot(tokens, to_output, input_precision=PRECISION)
        outputs = tl.dot(_operand(state, PRECISION), from_state, outputs, input_precision=PRECISION)
        tl.store(y + token_at, outputs.to(y.dtype.element_ty), mask=token_there)
        state = state * fade + tl.dot(tokens, to_state, input_precision="tf32x3")


@triton.jit
def adjoints_kernel(
    dy, out, decay, starts, keep, last, d_last, d_entering, lanes, L, D, K, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Only the gradients by the states that enter lanes, `d_entering`, as if nothing came back from later lanes."""
    first_lane = tl.program_id(0) * LANES
    first_channel = tl.program_id(1) * CHANNELS
    lane = first_lane + tl.arange(0, LANES)
    at, there = _matrix_offsets(first_channel, D, N, BLOCK, NP, BLOCK, CHANNELS)
    to_adjoint = tl.permute(tl.load(out + at, mask=there, other=0.0), (0, 2, 1))
    at, there = _matrix_offsets(first_channel, D, 1, N, 1, NP, CHANNELS)
    fade = tl.load(decay + at, mask=there, other=0.0)
    last_block = tl.load(last + lane // SPLITS, mask=lane < lanes, other=-1)
    adjoint = tl.zeros((CHANNELS, LANES, NP), tl.float32)
    for step in range(K):
        k = K - 1 - step
        sequence, block, start, stop, kept = _lanes(starts, keep, first_lane, lanes, k, K, SPLITS, LANES)
        token_at, token_there = _token_offsets(sequence, start, stop, first_channel, L, D, BLOCK, CHANNELS)
        d_outputs = tl.load(dy + token_at, mask=token_there, other=0.0).to(tl.float32)
        end_at, end_there = _state_offsets(sequence, first_channel, lanes, D, N, NP, CHANNELS)
        from_end = tl.load(d_last + end_at, mask=end_there & (block == last_block)[None, :, None], other=0.0)
        adjoint = adjoint * fade + from_end + tl.dot(d_outputs, to_adjoint, input_precision="tf32x3")
        adjoint = tl.where(kept[None, :, None], adjoint, 0.0)
    at, there = _state_offsets(lane, first_channel, lanes, D, N, NP, CHANNELS)
    tl.store(d_entering + at, adjoint, mask=there)


@triton.jit
def gradients_kernel(
    x, dy, toeplitz, into, out, decay, befores, starts, keep, last, d_last, d_leaving,
    dx, d_entering, d_toeplitz, d_into, d_out, d_decay, lanes, L, D, K, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients, begun with `d_leaving`; those of the matrices have a leading axis, one entry a group of lanes."""
    group = tl.program_id(0)
    first_lane = group * LANES
    first_channel = tl.program_id(1) * CHANNELS
    lane = first_lane + tl.arange(0, LANES)
    square_at, square_there = _matrix_offsets(first_channel, D, BLOCK, BLOCK, BLOCK, BLOCK, CHANNELS)
    from_output = _operand(tl.load(toeplitz + square_at, mask=square_there, other=0.0), PRECISION)
    from_output = tl.permute(from_output, (0, 2, 1))
    into_at, into_there = _matrix_offsets(first_channel, D, BLOCK, N, BLOCK, NP, CHANNELS)
    from_adjoint = _operand(tl.load(into + into_at, mask=into_there, other=0.0), PRECISION)
    from_adjoint = tl.permute(from_adjoint, (0, 2, 1))
    out_at, out_there = _matrix_offsets(first_channel, D, N, BLOCK, NP, BLOCK, CHANNELS)
    to_adjoint = tl.permute(tl.load(out + out_at, mask=out_there, other=0.0), (0, 2, 1))
    decay_at, decay_there = _matrix_offsets(first_channel, D, 1, N, 1, NP, CHANNELS)
    fade = tl.load(decay + decay_at, mask=decay_there, other=0.0)
    last_block = tl.load(last + lane // SPLITS, mask=lane < lanes, other=-1)
    lane_at, lane_there = _state_offsets(lane, first_channel, lanes, D, N, NP, CHANNELS)
    adjoint = tl.load(d_leaving + lane_at, mask=lane_there, other=0.0)
    sum_toeplitz = tl.zeros((CHANNELS, BLOCK, BLOCK), tl.float32)
    sum_into = tl.zeros((CHANNELS, BLOCK, NP), tl.float32)
    sum_out = tl.zeros((CHANNELS, NP, BLOCK), tl.float32)
    sum_decay = tl.zeros((CHANNELS, LANES, NP), tl.float32)
    for step in range(K):
        k = K - 1 - step
        sequence, block, start, stop, kept = _lanes(starts, keep, first_lane, lanes, k, K, SPLITS, LANES)
        token_at, token_there = _token_offsets(sequence, start, stop, first_channel, L, D, BLOCK, CHANNELS)
        tokens = tl.load(x + token_at, mask=token_there, other=0.0).to(tl.float32)
        d_outputs = tl.load(dy + token_at, mask=token_there, other=0.0).to(tl.float32)
        before_at, before_there = _state_offsets(lane * K + k, first_channel, lanes * K, D, N, NP, CHANNELS)
        before = tl.load(befores + before_at, mask=before_there, other=0.0)

        rounded = _operand(adjoint, PRECISION)
        d_tokens = tl.dot(d_outputs, from_output, input_precision=PRECISION)
        d_tokens = tl.dot(rounded, from_adjoint, d_tokens, input_precision=PRECISION)
        tl.store(dx + token_at, d_tokens.to(dx.dtype.element_ty), mask=token_there)

        by_token = tl.permute(tokens, (0, 2, 1))
        sum_toeplitz = tl.dot(by_token, d_outputs, sum_toeplitz, input_precision=PRECISION)
        sum_into = tl.dot(by_token, rounded, sum_into, input_precision=PRECISION)
        by_average = tl.permute(_operand(before, PRECISION), (0, 2, 1))
        sum_out = tl.dot(by_average, d_outputs, sum_out, input_precision=PRECISION)
        sum_decay += adjoint * before

        end_at, end_there = _state_offsets(sequence, first_channel, lanes, D, N, NP, CHANNELS)
        from_end = tl.load(d_last + end_at, mask=end_there & (block == last_block)[None, :, None], other=0.0)
        adjoint = adjoint * fade + from_end + tl.dot(d_outputs, to_adjoint, input_precision="tf32x3")
        adjoint = tl.where(kept[None, :, None], adjoint, 0.0)
    tl.store(d_entering + lane_at, adjoint, mask=lane_there)
    part = group.to(tl.int64) * D
    tl.store(d_toeplitz + part * BLOCK * BLOCK + square_at, sum_toeplitz, mask=square_there)
    tl.store(d_into + part * BLOCK * N + into_at, sum_into, mask=into_there)
    tl.store(d_out + part * N * BLOCK + out_at, sum_out, mask=out_there)
    tl.store(d_decay + part * N + decay_at, tl.sum(sum_decay, 1, keep_dims=True), mask=decay_there)
