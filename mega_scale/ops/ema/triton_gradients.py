"""The damped EMA's gradients by a Triton kernel; what starts it is in `triton.py`, legends are in `triton_kernels.py`.

Of outputs y_t = Re sum_n c h_t with h_t = q h_{t-1} + g x_t, the gradient by a state h_t is `whole`, c a_t + r_t: of
the outputs, with adjoints a_t = dy_t + q a_{t+1}, and of the row's end, with rests r_t = q r_{t+1}. Gradients are

    dx_t  g whole_t             d log q  g sum x_t (c s_t + (L - 1 - t) r_t), where s_t = d a_t / d log q is a slope
    d c   g sum x_t a_t         d g      sum x_t whole_t

Where outputs have omega x_t as well, dx_t has omega dy_t, and d omega is sum x_t dy_t.

A tile is read twice. In the first loop each segment is by itself, and neither c nor r is in it: for pairs of tokens of
a segment it sums x_t a_t and x_t s_t, block by block, and finds the adjoint and slope of the segment, and the same of
its tokens, `reached`: sum q^k x_t and sum k q^k x_t, k tokens before its last one. From these, joining segments adds
sums for pairs of segments, and for the row's end. The second loop is for dx alone, whose wholes each segment is given.

Adjoints and slopes behind a block, segment or part are those at its next token: one power of q is left to sums. Tokens
x are read from a block's last one on, so that the powers they meet are those that gradients of outputs meet.
"""

# Tuples grow in loops that the compiler unrolls; it knows no starred elements.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the EMA's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

from mega_scale.ops.ema.triton_kernels import (
    AHEAD,
    INTERPRETED,
    ask_for,
    beside_of,
    cells_of,
    channels_of,
    dot,
    has_token,
    in_parts,
    load_parts,
    load_tokens,
    most_segments,
    numbers_at,
    part_of,
    parts_where,
    places_of,
    plus_times,
    plus_times_parts,
    power_of,
    powers_of,
    product,
    rounded,
    same_document,
    steps_of,
    store_parts,
    times,
    toeplitz_of,
    unless_begun,
    weights_of,
)


@triton.jit
def _anew(number):
    """The same number, of which the compiler does not know it, so that no register keeps what follows from it."""
    if not INTERPRETED:
        number = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], tl.int32, is_pure=False, pack=1)
    return number


@triton.jit
def _matrix_places(scratch, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    a, b, c = tl.arange(0, A)[:, None, None], tl.arange(0, B)[None, :, None], tl.arange(0, C)[None, None, :]
    return scratch + (a * B + b) * C + c


@triton.jit
def _keep(matrix, scratch, WIDE: tl.constexpr):
    """Write a matrix (A, B, C), in `in_parts`, to scratch memory."""
    A: tl.constexpr = matrix.shape[0]
    B: tl.constexpr = matrix.shape[1]
    C: tl.constexpr = matrix.shape[2]
    high, low = in_parts(matrix, WIDE)
    if WIDE:
        tl.store(_matrix_places(scratch, A, B, C), high)
    else:
        places = _matrix_places(scratch.to(tl.pointer_type(tl.bfloat16)), A, B, C)
        tl.store(places, high)
        tl.store(places + A * B * C, low)


@triton.jit
def _kept(scratch, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """Read it again."""
    if WIDE:
        high = tl.load(_matrix_places(scratch, A, B, C))
        low = high
    else:
        places = _matrix_places(scratch.to(tl.pointer_type(tl.bfloat16)), A, B, C)
        high, low = tl.load(places), tl.load(places + A * B * C)
    return high, low


@triton.jit
def _keep_matrices(
    decay, there, weight, enters, out, beside, scratch, T: tl.constexpr, WIDE: tl.constexpr, COMPLEX: tl.constexpr
):
    """Keep what the second loop multiplies by: (CH, T, NP), what gradients of outputs add to wholes before a block;
    (CH, NP, T), what wholes give gradients of tokens; and `toeplitz_of`."""
    t, real = tl.arange(0, T), (decay[2] == 0)[:, None, :]
    size: tl.constexpr = there.shape[0] * T * (there.shape[1] if there.shape[1] > T else T)
    toeplitz = toeplitz_of(decay, out, enters, beside, scratch, T, True, COMPLEX)
    tl.debug_barrier()
    added = weights_of(decay, out, t + 1, COMPLEX)
    _keep(tl.where(real, added, -added), scratch, WIDE)
    given = tl.where(real, weight[:, None, :], -weight[:, None, :]) * powers_of(decay, T - 1 - t, COMPLEX)
    _keep(tl.permute(given, (0, 2, 1)), scratch + size, WIDE)
    _keep(toeplitz, scratch + 2 * size, WIDE)
    tl.debug_barrier()


@triton.jit
def _kept_matrices(scratch, CH: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr):
    size: tl.constexpr = CH * T * (NP if NP > T else T)
    to_whole, from_whole = _kept(scratch, CH, T, NP, WIDE), _kept(scratch + size, CH, NP, T, WIDE)
    return to_whole, from_whole, _kept(scratch + 2 * size, CH, T, T, WIDE)


@triton.jit
def _plus_rows(sums, a, b, COMPLEX: tl.constexpr):
    """Sums (CH, SEG // 2, NP) plus a b, of which a thread has rows of both halves."""
    CH: tl.constexpr = a.shape[0]
    NP: tl.constexpr = a.shape[2]
    shape: tl.constexpr = (CH, 2, a.shape[1] // 2, NP)
    a_first, a_second = tl.split(tl.permute(tl.reshape(a, shape), (0, 2, 3, 1)))
    b_first, b_second = tl.split(tl.permute(tl.reshape(b, shape), (0, 2, 3, 1)))
    return plus_times(plus_times(sums, a_first, b_first, COMPLEX), a_second, b_second, COMPLEX)


@triton.jit
def _segments_back(
    dy, x, first, rows, place, back_place, steps, back_steps, inside, within, pairs, to_adjoint, to_slope, fade, one,
    STEPS, D,
    CH: tl.constexpr, WIDE: tl.constexpr, SUMS: tl.constexpr, SLOPES: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Of the segments of a tile, from the last block to the first: adjoint, slope and with SUMS tokens reached; sums of
    tokens times adjoints and slopes behind their blocks, added to those `within` segments (CH, SEG // 2, NP); and
    `pairs`."""
    SEG: tl.constexpr = within[0].shape[1] * 2
    NP: tl.constexpr = within[0].shape[2]
    T: tl.constexpr = pairs.shape[1]
    NUMBER: tl.constexpr = fade.dtype
    adjoint, slope = tl.zeros((CH, SEG, NP), NUMBER), tl.zeros((CH, SEG, NP), NUMBER)
    reached, reached_slope = tl.zeros((CH, SEG, NP), NUMBER), tl.zeros((CH, SEG, NP), NUMBER)
    of_adjoint, of_slope = within
    left = one[:, None, :]
    for i in range(STEPS):
        step = STEPS - 1 - i
        block = (first + step * T).to(tl.int64) * D
        mask = has_token(steps, step) & inside[None, None, :]
        d_outputs = load_tokens(dy + block + place, mask, WIDE, NUMBER)
        if SUMS:
            mask = has_token(back_steps, step) & inside[None, None, :]
            own = load_tokens(x + block + back_place, mask, WIDE, NUMBER)
            of_block = product(own, to_adjoint, tl.zeros((CH, SEG, NP), NUMBER))
            of_adjoint = _plus_rows(of_adjoint, of_block, adjoint, COMPLEX)
            of_slope = _plus_rows(of_slope, of_block, slope, COMPLEX)
            reached = plus_times(reached, of_block, left, COMPLEX)
            of_block_slope = product(own, to_slope, tl.zeros((CH, SEG, NP), NUMBER))
            of_slope = _plus_rows(of_slope, of_block_slope, adjoint, COMPLEX)
            reached_slope = plus_times(reached_slope, of_block_slope + (i * T) * of_block, left, COMPLEX)
            left = times(left, fade, COMPLEX)
            pairs = dot(tl.permute(own, (0, 2, 1)), d_outputs, pairs)
        if SLOPES:
            slope = product(d_outputs, to_slope, times(slope + T * adjoint, fade, COMPLEX))
        adjoint = product(d_outputs, to_adjoint, times(adjoint, fade, COMPLEX))
        # Of a tile's last steps, or of the tile before, if it lies as this one, which with documents is a guess.
        later = step - AHEAD
        later = (
            tl.maximum(first + tl.where(later < 0, later + STEPS - SEG * STEPS, later) * T, 0).to(tl.int64) * D
            + tl.program_id(1) * CH
        )
        ask_for(dy + later, rows)
        if SUMS:
            ask_for(x + later, rows)
    return (adjoint, slope, reached, reached_slope), (of_adjoint, of_slope), pairs


@triton.jit
def _gradients_of_tokens(
    dy, more, dx, first, place, steps, inside, whole, matrices, fade, STEPS, D,
    T: tl.constexpr, WIDE: tl.constexpr, MORE: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Write dx of a tile, of wholes behind its segments (CH, SEG, NP), with MORE that of others that read x."""
    CH: tl.constexpr = whole.shape[0]
    SEG: tl.constexpr = whole.shape[1]
    NP: tl.constexpr = whole.shape[2]
    NUMBER: tl.constexpr = whole.dtype
    to_whole, from_whole, toeplitz = _kept_matrices(matrices, CH, NP, T, WIDE)
    for i in range(STEPS):
        step = STEPS - 1 - i
        block, mask = (first + step * T).to(tl.int64) * D, has_token(steps, step) & inside[None, None, :]
        d_outputs = load_tokens(dy + block + place, mask, WIDE, NUMBER)
        found = product(whole, from_whole, tl.zeros((CH, SEG, T), NUMBER))
        found = product(d_outputs, toeplitz, found)
        result = tl.permute(found, (1, 2, 0))
        if MORE:
            result += tl.load(more + block + place, mask=mask, other=0.0).to(NUMBER)
        tl.store(dx + block + place, rounded(result, dx), mask=mask)
        whole = product(d_outputs, to_whole, times(whole, fade, COMPLEX))


@triton.jit
def _kept_numbers(scratch, CH: tl.constexpr, NP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT numbers of each column (CH, NP), which `_keep_numbers` has written."""
    thin = scratch + tl.arange(0, CH)[:, None] * NP + tl.arange(0, NP)[None, :]
    numbers = ()
    for k in tl.static_range(COUNT):
        numbers = numbers + (tl.load(thin + k * CH * NP),)
    return numbers


@triton.jit
def _keep_numbers(numbers, scratch):
    CH: tl.constexpr = numbers[0].shape[0]
    NP: tl.constexpr = numbers[0].shape[1]
    thin = scratch + tl.arange(0, CH)[:, None] * NP + tl.arange(0, NP)[None, :]
    for k in tl.static_range(len(numbers)):
        tl.store(thin + k * CH * NP, numbers[k])


@triton.jit
def _keep_what_joins(behind, decay, own_out, segment_fade, tokens, numbers, COMPLEX: tl.constexpr):
    """Write what `_join_back` reads of columns, with sums of nothing yet."""
    next_out = times(own_out, power_of(decay[0], decay[1], decay[2], 1, COMPLEX), COMPLEX)
    nothing = tl.zeros_like(behind[0])
    factors, sums_before = (next_out, segment_fade, tokens * segment_fade), (nothing, nothing, nothing, nothing)
    _keep_numbers(factors + behind + sums_before, numbers)
    tl.debug_barrier()


@triton.jit
def _between_blocks(kept, within, once, COMPLEX: tl.constexpr):
    """Sums of tokens times adjoints and slopes, between segments and within them, with the power of q that was left;
    and none yet of tokens times gradients of their own outputs (CH,)."""
    of_adjoint = kept[3] + tl.sum(within[0], 1)
    of_slope = times(kept[4] + tl.sum(within[1], 1) + of_adjoint, once, COMPLEX)
    return times(of_adjoint, once, COMPLEX), of_slope, tl.zeros((within[0].shape[0],), within[0].dtype)


@triton.jit
def _plus_scaled(parts, others, factor):
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] + others[i] * factor,)
    return scaled


@triton.jit
def _join_back(
    found, distance, numbers, count, begins, tokens,
    DOCUMENTS: tl.constexpr, LAST: tl.constexpr, SUMS: tl.constexpr, SLOPES: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """From the last segment of a tile to the first, of which `count` exist: wholes behind segments (CH, SEG, NP).

    `found` are adjoint, slope, and tokens reached, of each segment (CH, SEG, NP), which are zeros where there is none.
    `distance` are the tokens behind the tile. At `numbers` (10, CH, NP) are what adjoints are multiplied by for wholes;
    what a segment leaves of an adjoint, and that times its tokens; and, kept from tile to tile, adjoint, slope and rest
    behind the tile, and sums of reached times adjoint, times slope, times rest, and times rest and distance. `begins`
    has bits of segments with which documents begin."""
    CH: tl.constexpr = found[0].shape[0]
    SEG: tl.constexpr = found[0].shape[1]
    NP: tl.constexpr = found[0].shape[2]
    size: tl.constexpr = CH * NP
    kind: tl.constexpr = SEG * size
    KINDS: tl.constexpr = 4 if SUMS else 2 if SLOPES else 1
    thin, wide = places_of(numbers + 10 * size, found[0], COMPLEX)
    tl.debug_barrier()
    for k in tl.static_range(KINDS):
        tl.store(wide + k * kind, found[k])
    tl.debug_barrier()
    kept = ()
    for k in tl.static_range(10):
        kept = kept + (load_parts(numbers_at(numbers, CH, NP, COMPLEX) + k * size, COMPLEX),)
    next_out, fade, far, adjoint, slope, rest, of_adjoint, of_slope, of_rest, of_distance = kept
    wholes, nothing = (), (0.0, 0.0)
    step, distance = tokens.to(wide.dtype.element_ty), distance + (tl.minimum(count, SEG) - SEG) * tokens
    distance = distance.to(wide.dtype.element_ty)
    for i in tl.static_range(SEG):
        s = SEG - 1 - i
        at = thin + s * size
        # Where there is no segment, all passes.
        left, left_far = parts_where(s < count, fade, (1.0, 0.0)), parts_where(s < count, far, (0.0, 0.0))
        wholes = wholes + (plus_times_parts(rest if LAST else nothing, adjoint, next_out, COMPLEX),)
        if SUMS:
            reached, reached_slope = load_parts(at + 2 * kind, COMPLEX), load_parts(at + 3 * kind, COMPLEX)
            of_adjoint = plus_times_parts(of_adjoint, reached, adjoint, COMPLEX)
            of_slope = plus_times_parts(of_slope, reached, slope, COMPLEX)
            of_slope = plus_times_parts(of_slope, reached_slope, adjoint, COMPLEX)
            if LAST:
                of_rest = plus_times_parts(of_rest, reached, rest, COMPLEX)
                far_reached = _plus_scaled(reached_slope, reached, distance)
                of_distance = plus_times_parts(of_distance, far_reached, rest, COMPLEX)
                distance += step
        if SLOPES:
            slope = plus_times_parts(load_parts(at + kind, COMPLEX), slope, left, COMPLEX)
            slope = unless_begun(begins, s, plus_times_parts(slope, adjoint, left_far, COMPLEX), DOCUMENTS)
        if LAST:
            rest = unless_begun(begins, s, plus_times_parts(nothing, rest, left, COMPLEX), DOCUMENTS)
        adjoint = plus_times_parts(load_parts(at, COMPLEX), adjoint, left, COMPLEX)
        adjoint = unless_begun(begins, s, adjoint, DOCUMENTS)
    # Not among the loads, which would wait for one another. Several threads may hold the same number: all have read.
    tl.debug_barrier()
    for i in tl.static_range(SEG):
        store_parts(thin + 4 * kind + (SEG - 1 - i) * size, wholes[i])
    changed = adjoint, slope, rest, of_adjoint, of_slope, of_rest, of_distance
    for k in tl.static_range(7):
        store_parts(numbers_at(numbers, CH, NP, COMPLEX) + (3 + k) * size, changed[k])
    tl.debug_barrier()
    return tl.load(wide + 4 * kind)


@triton.jit
def _from_parts(
    parts, d_end, decay, document, at, there, kind, row, split, L, D, HEAD, size, SPLITS,
    N: tl.constexpr, DOCUMENTS: tl.constexpr, LAST: tl.constexpr, INNER: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Adjoint, slope and rest behind a part of a row, of the parts that follow unless INNER, and of the row's end; and
    the tokens up to there."""
    exponent, turns, shift = decay
    adjoint, slope, rest = tl.zeros_like(exponent), tl.zeros_like(exponent), tl.zeros_like(exponent)
    for i in range(0 if INNER else SPLITS - 1 - split):
        first = HEAD + (SPLITS - 1 - i) * size
        stop = tl.minimum(first + size, L)
        passes, left = (
            same_document(document, first, stop, DOCUMENTS),
            power_of(exponent, turns, shift, stop - first, COMPLEX),
        )
        of_part = parts + (row * SPLITS + SPLITS - 1 - i) * D * N + at
        slope = tl.where(passes, times(slope + (stop - first) * adjoint, left, COMPLEX), 0.0)
        slope += tl.load(of_part + kind, mask=there, other=0.0)
        adjoint = tl.where(passes, times(adjoint, left, COMPLEX), 0.0) + tl.load(of_part, mask=there, other=0.0)
    distance = tl.maximum(L - HEAD - (split + 1) * size, 0)
    if LAST:
        rest = tl.load(d_end + row * D * N + at, mask=there, other=0.0)
        rest = times(rest, power_of(exponent, turns, shift, distance, COMPLEX), COMPLEX)
        rest = tl.where(same_document(document, L - distance, L, DOCUMENTS), rest, 0.0)
    return (adjoint, slope, rest), distance


@triton.jit
def _in_blocks(pairs, decay, of_adjoint, of_slope, COMPLEX: tl.constexpr):
    """Sums (CH, NP) with those of pairs of tokens in the same blocks, and the sum of tokens times gradients of their
    own outputs (CH,); `pairs` (CH, T, T) are sums of products, tokens from the last one on."""
    T: tl.constexpr = pairs.shape[1]
    t, crossed = tl.arange(0, T), tl.zeros((pairs.shape[0],), pairs.dtype)
    for lag in range(T):
        of_lag = tl.sum(tl.sum(tl.where(t[None, None, :] + t[None, :, None] == lag + T - 1, pairs, 0.0), 2), 1)
        both = of_lag[:, None] * power_of(decay[0], decay[1], decay[2], lag, COMPLEX)
        of_adjoint, of_slope = of_adjoint + both, of_slope + lag * both
        crossed = tl.where(lag == 0, of_lag, crossed)
    return of_adjoint, of_slope, crossed


@triton.jit
def _head_back(
    dy, x, more, dx, document, channel, decay, enters, own_out, beside, behind, sums, head, L, D,
    DOCUMENTS: tl.constexpr, DX: tl.constexpr, MORE: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """The first `head` tokens of a row, one by one from the last: adjoint and slope at the first, and `sums` that count
    them."""
    once = power_of(decay[0], decay[1], decay[2], 1, COMPLEX)
    adjoint, slope, rest = behind[0], behind[1], behind[2]
    of_adjoint, of_slope, of_rest, of_distance, crossed = sums
    for later in range(head):
        i = head - 1 - later
        d_output = tl.load(dy + i * D + channel, mask=channel < D, other=0.0).to(adjoint.dtype)[:, None]
        token = tl.load(x + i * D + channel, mask=channel < D, other=0.0).to(adjoint.dtype)[:, None]
        slope = times(slope + adjoint, once, COMPLEX)
        adjoint = times(adjoint, once, COMPLEX) + tl.where(decay[2] == 0, d_output, 0.0)
        of_adjoint += token * adjoint
        of_slope += token * slope
        of_rest += token * rest
        of_distance += (L - 1 - i) * token * rest
        crossed += tl.sum(token * d_output, 1)
        if DX:
            whole = times(adjoint, own_out, COMPLEX) + rest
            found = tl.sum(enters * whole, 1) + beside * tl.sum(d_output, 1)
            if MORE:
                found += tl.load(more + i * D + channel, mask=channel < D, other=0.0).to(adjoint.dtype)
            tl.store(dx + i * D + channel, rounded(found, dx), mask=channel < D)
        passes = same_document(document, i, i + 1, DOCUMENTS)
        adjoint, slope = tl.where(passes, adjoint, 0.0), tl.where(passes, slope, 0.0)
        rest = tl.where(passes, times(rest, once, COMPLEX), 0.0)
    return adjoint, slope, (of_adjoint, of_slope, of_rest, of_distance, crossed)


@triton.jit
def _write_sums(
    sums, crossings, entered, found, adjoint, slope, own_out, once, channel, at, there, SPLITS, D,
    N: tl.constexpr, CH: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Of a part of a row, what `gradients_kernel` tells of sums and crossings; and what reaches the row's beginning."""
    row, kind = (tl.program_id(0) // SPLITS).to(tl.int64), tl.num_programs(0).to(tl.int64) * D * N
    of_adjoint, of_slope, of_rest, of_distance, crossed = found
    sums += tl.program_id(0).to(tl.int64) * D * N + at
    tl.store(sums, of_adjoint, mask=there)
    tl.store(sums + kind, times(of_slope, own_out, COMPLEX) + of_distance, mask=there)
    tl.store(sums + 2 * kind, times(of_adjoint, own_out, COMPLEX) + of_rest, mask=there)
    first_group = tl.arange(0, channel.shape[0]) < CH
    tl.store(crossings + tl.program_id(0).to(tl.int64) * D + channel, crossed, mask=first_group & (channel < D))
    if tl.program_id(0) % SPLITS == 0:
        tl.store(entered + row * D * N + at, times(adjoint, once, COMPLEX), mask=there)
        tl.store(entered + kind // SPLITS + row * D * N + at, times(slope + adjoint, once, COMPLEX), mask=there)


@triton.jit
def gradients_kernel(  # noqa: PLR0915 (what the forward pass does, from its end to its beginning)
    dy, log_decay, gain, projection, angle, document, starts, omega, x, more, d_end, parts,
    dx, sums, crossings, entered, scratch,
    L, D, HEAD, STEPS, TILES, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, SEG: tl.constexpr, CH: tl.constexpr,
    ROOM: tl.constexpr, DOCUMENTS: tl.constexpr, OMEGA: tl.constexpr, MORE: tl.constexpr, LAST: tl.constexpr,
    DX: tl.constexpr, SUMS: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """With DX dx; with SUMS sums over tokens x, and adjoints and slopes before rows, `entered` (2, B, D, N); with
    neither those at the first tokens of `parts` (2, B, SPLITS, D, N), which are else read.

    LAST is for gradients by states after rows, `d_end` (B, D, N), which `entered` never counts. `sums` (3, B SPLITS, D,
    N) are those of x times adjoints, times slopes of wholes, and times wholes; `crossings` (B SPLITS, D) of x times dy.
    With MORE, `more` (B, L, D) is added to dx. OMEGA says that outputs have omega (D,) times x.
    """
    NUMBER: tl.constexpr = gain.dtype.element_ty
    WIDE: tl.constexpr = dy.dtype.element_ty != tl.bfloat16 or gain.dtype.element_ty == tl.float64
    SLOPES: tl.constexpr = SUMS or not DX
    BYTES: tl.constexpr = dy.dtype.element_ty.primitive_bitwidth // 8
    row, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    x, dy, document = x + row * L * D, dy + row * L * D, document + row * L
    dx, more = dx + row * L * D, more + row * L * D
    t, tokens = tl.arange(0, T), STEPS * T
    starts += row * most_segments(L, HEAD, tokens)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    numbers, MATRICES = scratch + program.to(tl.int64) * ROOM, (10 + 5 * SEG) * CH * NP
    channel, at, there, decay, weight, enters, own_out, out = channels_of(
        log_decay, gain, projection, angle, tl.program_id(1) * CH, D, N, NP, CH, COMPLEX
    )
    if DX:
        beside = beside_of(omega, tl.program_id(1) * CH, D, NUMBER, CH, OMEGA)
        _keep_matrices(decay, there, weight, enters, out, beside, numbers + MATRICES, T, WIDE, COMPLEX)
    powers = tl.where(there[:, None, :], powers_of(decay, t, COMPLEX), 0.0)
    to_adjoint, to_slope = in_parts(powers, WIDE), in_parts(powers * t[None, :, None], WIDE)
    SLOPE: tl.constexpr = 3 * CH * T * (NP if NP > T else T)
    if COMPLEX:  # whose registers are short
        _keep(powers * t[None, :, None], numbers + MATRICES + SLOPE, WIDE)
    fade = power_of(decay[0], decay[1], decay[2], T, COMPLEX)[:, None, :]
    segment_fade = power_of(decay[0], decay[1], decay[2], tokens, COMPLEX)
    one = tl.zeros((CH, NP), NUMBER) + tl.where(decay[2] == 0, 1.0, 0.0).to(NUMBER)
    kind = tl.num_programs(0).to(tl.int64) * D * N
    behind, distance = _from_parts(
        parts, d_end, decay, document, at, there, kind, row, split, L, D, HEAD, TILES * SEG * tokens, SPLITS,
        N, DOCUMENTS, LAST, not (DX or SUMS), COMPLEX,
    )  # fmt: skip
    _keep_what_joins(behind, decay, own_out, segment_fade, tokens, numbers, COMPLEX)
    within = tl.zeros((CH, SEG // 2, NP), NUMBER), tl.zeros((CH, SEG // 2, NP), NUMBER)
    pairs = tl.zeros((CH, T, T), NUMBER)
    begin, stop = part_of(document, split, L, HEAD, tokens, TILES, SEG, DOCUMENTS)
    for tile in range(tl.cdiv(stop - begin, SEG)):
        number = begin + (tl.cdiv(stop - begin, SEG) - 1 - tile) * SEG
        first, cell, own_cells, begins = cells_of(starts, number, stop, HEAD, tokens, SEG, DOCUMENTS)
        steps = steps_of(own_cells, T, False, DOCUMENTS)
        of_tokens = (cell[:, None, None] + t[None, :, None]) * D
        place = of_tokens + channel[None, None, :]
        back_place = (cell[:, None, None] + (T - 1 - t)[None, :, None]) * D + channel[None, None, :]
        rows = (tl.where(own_cells[1] > 0, cell, 0)[:, None] + t[None, :]) * D * BYTES
        own_numbers = scratch + _anew(program).to(tl.int64) * ROOM
        if COMPLEX:
            to_slope = _kept(own_numbers + MATRICES + SLOPE, CH, T, NP, WIDE)
        found, within, pairs = _segments_back(
            dy, x, first, rows, place, back_place, steps, steps_of(own_cells, T, True, DOCUMENTS), channel < D, within,
            pairs, to_adjoint, to_slope, fade, one, STEPS, D, CH, WIDE, SUMS, SLOPES, COMPLEX,
        )  # fmt: skip
        whole = _join_back(
            found, distance, own_numbers, stop - number, begins, tokens, DOCUMENTS, LAST, SUMS, SLOPES, COMPLEX,
        )  # fmt: skip
        distance += tl.minimum(stop - number, SEG) * tokens
        if DX:
            _gradients_of_tokens(
                dy, more, dx, first, place, steps, channel < D, whole,
                own_numbers + MATRICES, fade, STEPS, D, T, WIDE, MORE, COMPLEX,
            )  # fmt: skip

    # Read again, as registers are short in loops.
    channel, at, there, decay, weight, enters, own_out, out = channels_of(
        log_decay, gain, projection, angle, _anew(tl.program_id(1)) * CH, D, N, NP, CH, COMPLEX
    )
    once = power_of(decay[0], decay[1], decay[2], 1, COMPLEX)
    kept = _kept_numbers(scratch + _anew(program).to(tl.int64) * ROOM + 3 * CH * NP, CH, NP, 7)
    of_adjoint, of_slope, crossed = _between_blocks(kept, within, once, COMPLEX)
    if SUMS:
        of_adjoint, of_slope, crossed = _in_blocks(pairs, decay, of_adjoint, of_slope, COMPLEX)
    adjoint, slope, all_sums = _head_back(
        dy, x, more, dx, document, channel, decay, enters, own_out,
        beside_of(omega, tl.program_id(1) * CH, D, NUMBER, CH, OMEGA), kept,
        (of_adjoint, of_slope, kept[5], kept[6], crossed), tl.where(split == 0, HEAD, 0), L, D,
        DOCUMENTS, DX, MORE, COMPLEX,
    )  # fmt: skip
    if SUMS:
        _write_sums(
            sums, crossings, entered, all_sums, adjoint, slope, own_out, once, channel, at, there, SPLITS, D,
            N, CH, COMPLEX,
        )  # fmt: skip
    elif not DX:
        parts += (row * SPLITS + split) * D * N + at
        tl.store(parts, adjoint, mask=there)
        tl.store(parts + kind, slope, mask=there)
