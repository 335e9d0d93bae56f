"""Triton kernels of the damped EMA: lanes walk over blocks of tokens side by side, products run on matrix units.

A lane is one stretch of one sequence: K consecutive blocks of at most c tokens. q does not depend on the input, so a
block's products use matrices that all lanes share: per channel, the lanes are the rows and the matrix is c x c
(token to output, `toeplitz`), c x N (token to the state after the block, `into`) or N x c (state before the block to
output, `out`). The states of a program's lanes and channels stay in registers, in fp32, and fade by multiplication.

Legend: D channels, N moving averages per channel, c tokens per block (BLOCK), K blocks per lane; NP is N padded, LANES
and CHANNELS are what one program holds. Program (i, j) holds the i-th group of lanes and the j-th group of channels.

    x, y, dy, dx     (B, L, D), contiguous, any floating dtype up to fp32
    toeplitz, into, out, decay   (D, c, c), (D, c, N), (D, N, c), (D, N): fp32
    starts           (B, SPLITS * K + 1) int32: first token of every block; block m ends where m + 1 starts
    keep             (B, SPLITS * K) int32: 0 where a block begins a document and forgets the state, else 1
    last             (B,) int32: the block of the last token
    lane states      (B * SPLITS, D, N) fp32
"""

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the EMA's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing


def interpreted() -> bool:
    """Whether kernels run in Python, on any device (the environment variable TRITON_INTERPRET)."""
    return bool(triton.knobs.runtime.interpret)


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
