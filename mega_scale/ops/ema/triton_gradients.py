"""Triton kernels of the damped EMA's backward: the same lanes as in `triton_kernels`, walked from the last block.

`adjoint` is the gradient of the loss by the state after a block; that by the state before it leaves out what the block
itself forgets. Legend, layouts and names as there.
"""

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the EMA's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

from mega_scale.ops.ema.triton_kernels import _lanes, _matrix_offsets, _operand, _state_offsets, _token_offsets


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
