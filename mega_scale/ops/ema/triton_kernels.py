"""The damped EMA's Triton kernels; what starts them, and what they compute, is in `triton.py`.

COMPLEX: a moving average is two columns of a state, its real and its imaginary part. Coefficients are given by column.
NUMBER, fp32 or fp64, is the dtype of coefficients, and so of states, sums and scratch memory. WIDE: tokens are widened
to it, as they are not bf16 or have fp64 coefficients.

A warp multiplies for one channel, whose states and matrices it holds. With more columns than that leaves registers
for, a channel is several: GROUPS, each with NP columns, in which all is linear, so that only outputs are summed.

Legend: B batch, L length, D channels, N columns of a state, NP those of a group padded, CH channels of a program, V
those by group. x, y and their gradients are contiguous (B, L, D), coefficients (D, N), states (B, D, N). `document`
(B, L) counts the documents that have begun.
"""

# Tuples grow in loops that the compiler unrolls; it knows no starred elements.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the EMA's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _parts(values, WIDE: tl.constexpr):
    """Two bf16 numbers whose sum is an fp32 value but for 2**-17 of it; with WIDE the value itself, fp32 or fp64."""
    high, low = values, values
    if not WIDE:
        high = values.to(tl.bfloat16)
        low = (values - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def _dot(a, b, acc):
    if acc.dtype == tl.float64:  # without matrix units: of some of these products Triton compiles none in fp64
        acc += tl.sum(a[:, :, :, None] * b[:, None, :, :], 2)
    else:
        if INTERPRETED:  # which multiplies the bits of bf16 numbers
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _product(a, matrix, acc):
    """acc + a matrix, which is in `_parts`: of bf16 tokens as they are, of fp32 states in parts, or all in NUMBER."""
    high = a
    if matrix[0].dtype == tl.bfloat16:
        if a.dtype == tl.float32:
            high, low = _parts(a, False)
            acc = _dot(low, matrix[0], acc)
        acc = _dot(high, matrix[1], acc)
    return _dot(high, matrix[0], acc)


@triton.jit
def _halves(numbers):
    """Real and imaginary parts of pairs in the last of two or three dimensions."""
    if len(numbers.shape) == 2:
        re, im = tl.split(tl.reshape(numbers, (numbers.shape[0], numbers.shape[1] // 2, 2)))
    else:
        re, im = tl.split(tl.reshape(numbers, (numbers.shape[0], numbers.shape[1], numbers.shape[2] // 2, 2)))
    return re, im


@triton.jit
def _times(a, b, COMPLEX: tl.constexpr):
    """a b, number by number."""
    result = a * b
    if COMPLEX:
        a_re, a_im = _halves(a)
        b_re, b_im = _halves(b)
        result = tl.reshape(tl.join(a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re), result.shape)
    return result


@triton.jit
def _power(exponent, turns, shift, steps, COMPLEX: tl.constexpr):
    """q^steps; of complex ones real parts in columns whose shift is 0, and imaginary parts where it is a quarter turn.

    `turns` are angles in units of 2^-64 turns, so that integers, which wrap, keep the phase of any power exact.
    """
    size = tl.exp(exponent * steps)
    if COMPLEX:
        if exponent.dtype == tl.float64:
            phase = (turns * steps).to(tl.float64) * 2.0**-64
        else:
            phase = ((turns * steps) >> 32).to(tl.float32) * 2.0**-32
        size *= tl.cos(6.283185307179586 * (phase - shift))
    return size


@triton.jit
def _weights(exponent, turns, shift, out, out_imag, steps, COMPLEX: tl.constexpr):
    """What the columns of a state so many steps old give an output: of complex ones Re(c q^steps), -Im(c q^steps)."""
    weights = out * _power(exponent, turns, shift, steps, COMPLEX)
    if COMPLEX:
        weights += out_imag * _power(exponent, turns, shift - 0.25, steps, COMPLEX)
        weights = tl.where(shift == 0, weights, -weights)
    return weights


@triton.jit
def _toeplitz(kernel, scratch, BACK: tl.constexpr):
    """(V, T, T): what a row's token weighs in a column's output, or with BACK the other way, from (V, T, NP)."""
    V: tl.constexpr = kernel.shape[0]
    T: tl.constexpr = kernel.shape[1]
    t = tl.arange(0, T)
    own = scratch + tl.arange(0, V)[:, None] * T + t[None, :]
    tl.store(own, tl.sum(kernel, 2))
    tl.debug_barrier()
    lag = (t[:, None] - t[None, :] if BACK else t[None, :] - t[:, None])[None, :, :]
    return tl.load(scratch + tl.arange(0, V)[:, None, None] * T + lag, mask=lag >= 0, other=0.0)


@triton.jit
def _read(pointer, mask, WIDE: tl.constexpr, NUMBER: tl.constexpr):
    """Tokens (SEG, T, V) as (V, SEG, T)."""
    tokens = tl.permute(tl.load(pointer, mask=mask, other=0.0), (2, 0, 1))
    return tokens.to(NUMBER) if WIDE else tokens


@triton.jit
def _rounded(values, pointer):
    """Values in the dtype of what `pointer` points to; fp64 ones by way of fp32, as none become bf16 at once."""
    if values.dtype == tl.float64 and pointer.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)
    return values.to(pointer.dtype.element_ty)


@triton.jit
def _borders(document, first, real, T: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of blocks that begin at `first` (SEG,): how many documents have begun in them, up to tokens; whether tokens are
    of the document before the block, and of that of its last token; whether those are one; and documents at most.
    All of this is known to the compiler without DOCUMENTS."""
    real &= DOCUMENTS
    begun = tl.load(document + first, mask=real, other=0)
    before = tl.load(document + first - 1, mask=real & (first > 0), other=0) - begun
    last = tl.load(document + first + T - 1, mask=real, other=0) - begun
    here = tl.load(document + first[:, None] + tl.arange(0, T)[None, :], mask=real[:, None], other=0) - begun[:, None]
    of_before, of_last = (here == before[:, None])[None, :, :], (here == last[:, None])[None, :, :]
    return here, of_before, of_last, (before == last)[None, :, None], tl.max(last) + 1 if DOCUMENTS else 1


@triton.jit
def _same(document, first, stop, DOCUMENTS: tl.constexpr):
    """Whether the token before `first` and that before `stop` are of one document."""
    before = tl.load(document + first - 1, mask=(first > 0) & DOCUMENTS, other=0)
    return before == tl.load(document + stop - 1, mask=(stop > 0) & DOCUMENTS, other=0)


@triton.jit
def _columns(first, D, N: tl.constexpr, NP: tl.constexpr, GROUPS: tl.constexpr, CH: tl.constexpr):
    """Of channels from `first` on, group after group (V,): the channel; of their columns (V, NP) the place in
    coefficients, and whether there is one."""
    v = tl.arange(0, GROUPS * CH)
    channel, column = first + v, tl.arange(0, NP)[None, :]
    if GROUPS > 1:
        channel, column = first + v % CH, column + (v // CH * NP)[:, None]
    return channel, channel[:, None] * N + column, (channel < D)[:, None] & (column < N)


@triton.jit
def _of_channels(values, GROUPS: tl.constexpr):
    """Sums over groups, of (V,) or (V, SEG, T)."""
    if GROUPS > 1:
        if len(values.shape) == 1:
            values = tl.sum(tl.reshape(values, (GROUPS, values.shape[0] // GROUPS)), 0)
        else:
            shape: tl.constexpr = (GROUPS, values.shape[0] // GROUPS, values.shape[1], values.shape[2])
            values = tl.sum(tl.reshape(values, shape), 0)
    return values


@triton.jit
def _join(
    ends, slopes, carry, carry_slope, fade, scratch, first, tokens, count, document,
    DOCUMENTS: tl.constexpr, BACK: tl.constexpr, SLOPES: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """What enters each segment of a tile (V, SEG, NP), of which `count` exist, and what leaves the tile (V, NP);
    `fade` is what a segment leaves of a state.

    BACK: from the last segment to the first.
    """
    V: tl.constexpr = ends.shape[0]
    SEG: tl.constexpr = ends.shape[1]
    NP: tl.constexpr = ends.shape[2]
    size: tl.constexpr = V * NP
    thin = scratch + tl.arange(0, V)[:, None] * NP + tl.arange(0, NP)[None, :]
    wide = scratch + tl.arange(0, SEG)[None, :, None] * size
    wide += tl.arange(0, V)[:, None, None] * NP + tl.arange(0, NP)[None, None, :]
    tl.debug_barrier()
    tl.store(wide, ends)
    if SLOPES:
        tl.store(wide + SEG * size, slopes)
    tl.debug_barrier()
    # All before the first store: several threads may hold the same number, and read what one of them overwrites.
    own, own_slopes = (), ()
    for i in tl.static_range(SEG):
        at = thin + (SEG - 1 - i if BACK else i) * size
        own = own + (tl.load(at),)
        if SLOPES:
            own_slopes = own_slopes + (tl.load(at + SEG * size),)
    tl.debug_barrier()
    for i in tl.static_range(SEG):
        s = SEG - 1 - i if BACK else i
        there, begin = s < count, first + s * tokens
        passes = _same(document, begin, begin + tl.where(there, tokens, 0), DOCUMENTS)
        tl.store(thin + s * size, carry)
        if SLOPES:
            tl.store(thin + (SEG + s) * size, carry_slope)
            further = _times(carry_slope + tokens * carry, fade, COMPLEX)
            further = own_slopes[i] + tl.where(passes, further, 0.0)
            carry_slope = tl.where(there, further, carry_slope)
        carry = tl.where(there, own[i] + tl.where(passes, _times(carry, fade, COMPLEX), 0.0), carry)
    tl.debug_barrier()
    return tl.load(wide), tl.load(wide + (SEG * size if SLOPES else 0)), carry, carry_slope


@triton.jit
def outputs_kernel(  # noqa: PLR0915 (one pass over a row)
    x, log_decay, gain, projection, angle, document, state, parts, y, end, scratch, L, D, HEAD, STEPS, TILES, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, SEG: tl.constexpr, CH: tl.constexpr,
    INITIAL: tl.constexpr, DOCUMENTS: tl.constexpr, OUTPUTS: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """With OUTPUTS y and the states after rows, `end`; else those after `parts` (B, SPLITS, D, N), begun at zero."""
    NUMBER: tl.constexpr = gain.dtype.element_ty
    WIDE: tl.constexpr = x.dtype.element_ty != tl.bfloat16 or gain.dtype.element_ty == tl.float64
    row, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    n, t, seg = tl.arange(0, NP), tl.arange(0, T), tl.arange(0, SEG)
    V: tl.constexpr = GROUPS * CH
    x, y, document = x + row * L * D, y + row * L * D, document + row * L
    scratch += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (2 * SEG * V * NP)
    own_channel = tl.program_id(1) * CH + tl.arange(0, CH)
    channel, at, there = _columns(tl.program_id(1) * CH, D, N, NP, GROUPS, CH)
    exponent = tl.load(log_decay + at, mask=there, other=0.0)
    weight = tl.load(gain + at, mask=there, other=0.0)
    own_out = tl.load(projection + at, mask=there, other=0.0)
    turns, shift, out, out_imag, enters = at, tl.zeros((1, NP), NUMBER), own_out, own_out, weight
    if COMPLEX:
        # Columns are real and imaginary parts in turns, and both columns of a pair need both parts of its projection.
        turns = tl.load(angle + at, mask=there, other=0)
        shift = (n % 2).to(NUMBER)[None, :] * 0.25
        out = tl.load(projection + at - (n % 2)[None, :], mask=there, other=0.0)
        out_imag = tl.load(projection + at + 1 - (n % 2)[None, :], mask=there, other=0.0)
        enters = tl.where(shift == 0, weight, 0.0)
    into = _power(exponent[:, None, :], turns[:, None, :], shift[:, None, :], (T - 1 - t)[None, :, None], COMPLEX)
    into = _parts(weight[:, None, :] * into, WIDE)
    from_state = _weights(
        exponent[:, :, None], turns[:, :, None], shift[:, :, None], out[:, :, None], out_imag[:, :, None],
        (t + 1)[None, None, :], COMPLEX,
    )  # fmt: skip
    from_state = _parts(from_state, WIDE)
    kernel = enters[:, None, :] * _weights(
        exponent[:, None, :], turns[:, None, :], shift[:, None, :], out[:, None, :], out_imag[:, None, :],
        t[None, :, None], COMPLEX,
    )  # fmt: skip
    toeplitz = _parts(_toeplitz(kernel, scratch, False), WIDE)
    tokens = STEPS * T
    decay, fade = _power(exponent, turns, shift, 1, COMPLEX), _power(exponent, turns, shift, T, COMPLEX)[:, None, :]
    segment_fade = _power(exponent, turns, shift, tokens, COMPLEX)
    read = _weights(exponent, turns, shift, out, out_imag, 0, COMPLEX)
    size = TILES * SEG * tokens

    carry = tl.load(state + row * D * N + at, mask=there & INITIAL, other=0.0)
    for part in range(split if OUTPUTS else 0):
        first, stop = tl.where(part == 0, 0, HEAD + part * size), HEAD + (part + 1) * size
        left = _times(carry, _power(exponent, turns, shift, stop - first, COMPLEX), COMPLEX)
        carry = tl.where(_same(document, first, stop, DOCUMENTS), left, 0.0)
        carry += tl.load(parts + (row * SPLITS + part) * D * N + at, mask=there, other=0.0)
    for i in range(tl.where(split == 0, HEAD, 0)):
        token = tl.load(x + i * D + channel, mask=channel < D, other=0.0).to(NUMBER)
        carry = tl.where(_same(document, i, i + 1, DOCUMENTS), _times(carry, decay, COMPLEX), 0.0)
        carry += enters * token[:, None]
        if OUTPUTS:
            found = _rounded(_of_channels(tl.sum(carry * read, 1), GROUPS), y)
            tl.store(y + i * D + own_channel, found, mask=own_channel < D)

    segment = seg * tokens
    of_tokens = (segment[:, None, None] + t[None, :, None]) * D
    place, own_place = of_tokens + channel[None, None, :], of_tokens + own_channel[None, None, :]
    for tile in range(TILES):
        first = HEAD + (split * TILES + tile) * SEG * tokens
        count = (L - first) // tokens
        real = seg < count
        mask = real[:, None, None] & (channel < D)[None, None, :]
        own_mask = real[:, None, None] & (own_channel < D)[None, None, :]
        states = tl.zeros((V, SEG, NP), NUMBER)
        for step in range(STEPS):
            block = first + step * T
            _, _, of_last, passes, _ = _borders(document, block + segment, real, T, DOCUMENTS)
            own = _read(x + block.to(tl.int64) * D + place, mask, WIDE, NUMBER)
            left = tl.where(passes, _times(states, fade, COMPLEX), 0.0)
            states = _product(tl.where(of_last, own, 0.0), into, left)
        states, _, carry, _ = _join(
            states, states, carry, carry, segment_fade, scratch, first, tokens, count, document,
            DOCUMENTS, False, False, COMPLEX,
        )  # fmt: skip
        for step in range(STEPS if OUTPUTS else 0):
            block = first + step * T
            here, of_before, of_last, passes, many = _borders(document, block + segment, real, T, DOCUMENTS)
            own = _read(x + block.to(tl.int64) * D + place, mask, WIDE, NUMBER)
            found = tl.where(of_before, _product(states, from_state, tl.zeros((V, SEG, T), NUMBER)), 0.0)
            for one in range(many):
                alike = (here == one)[None, :, :]
                found = tl.where(alike, _product(tl.where(alike, own, 0.0), toeplitz, found), found)
            result = _rounded(tl.permute(_of_channels(found, GROUPS), (1, 2, 0)), y)
            tl.store(y + block.to(tl.int64) * D + own_place, result, mask=own_mask)
            left = tl.where(passes, _times(states, fade, COMPLEX), 0.0)
            states = _product(tl.where(of_last, own, 0.0), into, left)
    if not OUTPUTS:
        tl.store(parts + (row * SPLITS + split) * D * N + at, carry, mask=there)
    elif split == SPLITS - 1:
        tl.store(end + row * D * N + at, carry, mask=there)


@triton.jit
def _receded(
    adjoint, slope, d_outputs, to_adjoint, to_slope, fade, of_before, passes,
    T: tl.constexpr, SLOPES: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Adjoints and slopes before a block, of the document before it."""
    d_outputs = tl.where(of_before, d_outputs, 0.0)
    if SLOPES:
        slope = tl.where(passes, _times(slope + T * adjoint, fade, COMPLEX), 0.0)
        slope = _product(d_outputs, to_slope, slope)
    adjoint = tl.where(passes, _times(adjoint, fade, COMPLEX), 0.0)
    return _product(d_outputs, to_adjoint, adjoint), slope


@triton.jit
def gradients_kernel(  # noqa: PLR0912, PLR0915 (what the forward pass does, from its end to its beginning)
    dy, log_decay, gain, projection, angle, document, x, d_end, parts, dx, sums, entered, scratch,
    L, D, HEAD, STEPS, TILES, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, SEG: tl.constexpr, CH: tl.constexpr,
    DOCUMENTS: tl.constexpr, LAST: tl.constexpr, DX: tl.constexpr, SUMS: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """With DX dx; with SUMS sums over tokens x, and adjoints and slopes before rows, `entered` (2, B, D, N); with
    neither those before `parts` (2, B, SPLITS, D, N), which are else read.

    `sums` (2 or 3, B SPLITS, D, N) are those of x times adjoints; times slopes times the projection; and with LAST,
    which is for the gradient by the end `d_end`, times adjoints times the projection. The last two count d_end, too.
    """
    NUMBER: tl.constexpr = gain.dtype.element_ty
    WIDE: tl.constexpr = dy.dtype.element_ty != tl.bfloat16 or gain.dtype.element_ty == tl.float64
    row, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    n, t, seg = tl.arange(0, NP), tl.arange(0, T), tl.arange(0, SEG)
    V: tl.constexpr = GROUPS * CH
    SLOPES: tl.constexpr = SUMS or not DX
    x, dy, dx, document = x + row * L * D, dy + row * L * D, dx + row * L * D, document + row * L
    scratch += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (2 * SEG * V * NP)
    own_channel = tl.program_id(1) * CH + tl.arange(0, CH)
    channel, at, there = _columns(tl.program_id(1) * CH, D, N, NP, GROUPS, CH)
    exponent = tl.load(log_decay + at, mask=there, other=0.0)
    weight = tl.load(gain + at, mask=there, other=0.0)
    own_out = tl.load(projection + at, mask=there, other=0.0)
    turns, shift, out, out_imag, enters = at, tl.zeros((1, NP), NUMBER), own_out, own_out, weight
    if COMPLEX:
        # Columns are real and imaginary parts in turns, and both columns of a pair need both parts of its projection.
        turns = tl.load(angle + at, mask=there, other=0)
        shift = (n % 2).to(NUMBER)[None, :] * 0.25
        out = tl.load(projection + at - (n % 2)[None, :], mask=there, other=0.0)
        out_imag = tl.load(projection + at + 1 - (n % 2)[None, :], mask=there, other=0.0)
        enters = tl.where(shift == 0, weight, 0.0)
    powers = _power(exponent[:, None, :], turns[:, None, :], shift[:, None, :], (t + 1)[None, :, None], COMPLEX)
    powers = tl.where(there[:, None, :], powers, 0.0)
    to_adjoint, to_slope = _parts(powers, WIDE), _parts(powers * (t + 1)[None, :, None], WIDE)
    powers = _power(exponent[:, None, :], turns[:, None, :], shift[:, None, :], (T - 1 - t)[None, :, None], COMPLEX)
    powers = tl.where(there[:, None, :], powers, 0.0)
    to_sum, to_slope_sum = _parts(powers, WIDE), _parts(powers * (T - 1 - t)[None, :, None], WIDE)
    if LAST:
        gives = tl.where(shift == 0, weight, -weight)[:, None, :] * powers
    else:
        gives = weight[:, None, :] * _weights(
            exponent[:, None, :], turns[:, None, :], shift[:, None, :], out[:, None, :], out_imag[:, None, :],
            (T - 1 - t)[None, :, None], COMPLEX,
        )  # fmt: skip
    from_adjoint = _parts(tl.permute(gives, (0, 2, 1)), WIDE)
    kernel = enters[:, None, :] * _weights(
        exponent[:, None, :], turns[:, None, :], shift[:, None, :], out[:, None, :], out_imag[:, None, :],
        t[None, :, None], COMPLEX,
    )  # fmt: skip
    toeplitz = _parts(_toeplitz(kernel, scratch, True), WIDE)
    tokens = STEPS * T
    decay, fade = _power(exponent, turns, shift, 1, COMPLEX), _power(exponent, turns, shift, T, COMPLEX)[:, None, :]
    segment_fade = _power(exponent, turns, shift, tokens, COMPLEX)
    size, kind = TILES * SEG * tokens, tl.num_programs(0).to(tl.int64) * D * N

    carry, carry_slope = tl.zeros((V, NP), NUMBER), tl.zeros((V, NP), NUMBER)
    from_end = tl.load(d_end + row * D * N + at, mask=there & LAST, other=0.0)
    for i in range(SPLITS - 1 - split if DX or SUMS else 0):
        first = HEAD + (SPLITS - 1 - i) * size
        stop = tl.minimum(first + size, L)
        passes, left = _same(document, first, stop, DOCUMENTS), _power(exponent, turns, shift, stop - first, COMPLEX)
        of_part = parts + (row * SPLITS + SPLITS - 1 - i) * D * N + at
        carry_slope = tl.where(passes, _times(carry_slope + (stop - first) * carry, left, COMPLEX), 0.0)
        carry_slope += tl.load(of_part + kind, mask=there, other=0.0)
        carry = tl.where(passes, _times(carry, left, COMPLEX), 0.0) + tl.load(of_part, mask=there, other=0.0)

    segment = seg * tokens
    of_tokens = (segment[:, None, None] + t[None, :, None]) * D
    place, own_place = of_tokens + channel[None, None, :], of_tokens + own_channel[None, None, :]
    sum_adjoint, sum_slope = tl.zeros((V, SEG, NP), NUMBER), tl.zeros((V, SEG, NP), NUMBER)
    sum_weighed, pairs = tl.zeros((V, SEG, NP), NUMBER), tl.zeros((V, T, T), NUMBER)
    for tile in range(TILES):
        first = HEAD + ((split + 1) * TILES - 1 - tile) * SEG * tokens
        count = (L - first) // tokens
        real = seg < count
        mask = real[:, None, None] & (channel < D)[None, None, :]
        own_mask = real[:, None, None] & (own_channel < D)[None, None, :]
        adjoint, slope = tl.zeros((V, SEG, NP), NUMBER), tl.zeros((V, SEG, NP), NUMBER)
        for step in range(STEPS):
            block = first + (STEPS - 1 - step) * T
            _, of_before, _, passes, _ = _borders(document, block + segment, real, T, DOCUMENTS)
            d_outputs = _read(dy + block.to(tl.int64) * D + place, mask, WIDE, NUMBER)
            adjoint, slope = _receded(
                adjoint, slope, d_outputs, to_adjoint, to_slope, fade, of_before, passes, T, SLOPES, COMPLEX
            )
        adjoint, slope, carry, carry_slope = _join(
            adjoint, slope, carry, carry_slope, segment_fade, scratch, first, tokens, count, document,
            DOCUMENTS, True, SLOPES, COMPLEX,
        )  # fmt: skip
        for step in range(STEPS if DX or SUMS else 0):
            block = first + (STEPS - 1 - step) * T
            here, of_before, of_last, passes, many = _borders(document, block + segment, real, T, DOCUMENTS)
            own = _read(x + block.to(tl.int64) * D + place, mask, WIDE, NUMBER)
            d_outputs = _read(dy + block.to(tl.int64) * D + place, mask, WIDE, NUMBER)
            after, after_slope = adjoint, slope
            if LAST:
                distance = tl.maximum(L - (block + segment + T), 0)[None, :, None]
                rest = _power(exponent[:, None, :], turns[:, None, :], shift[:, None, :], distance, COMPLEX)
                rest = _times(from_end[:, None, :], rest, COMPLEX)
                if DOCUMENTS:
                    counts = tl.load(document + block + segment + T - 1, mask=real, other=0)
                    rest = tl.where((counts == tl.load(document + L - 1))[None, :, None], rest, 0.0)
                after = _times(adjoint, own_out[:, None, :], COMPLEX) + rest
                after_slope = _times(slope, own_out[:, None, :], COMPLEX) + rest * distance
            found = tl.zeros((V, SEG, T), NUMBER)
            if DX:
                found = tl.where(of_last, _product(after, from_adjoint, found), 0.0)
            if SUMS:
                last_own = tl.where(of_last, own, 0.0)
                reached = _product(last_own, to_sum, tl.zeros((V, SEG, NP), NUMBER))
                sum_adjoint += _times(reached, adjoint, COMPLEX)
                sum_slope += _times(reached, after_slope, COMPLEX)
                if LAST:
                    sum_weighed += _times(reached, after, COMPLEX)
                reached = _product(last_own, to_slope_sum, tl.zeros((V, SEG, NP), NUMBER))
                sum_slope += _times(reached, after, COMPLEX)
            for one in range(many):
                alike = (here == one)[None, :, :]
                d_alike = tl.where(alike, d_outputs, 0.0)
                if DX:
                    found = tl.where(alike, _product(d_alike, toeplitz, found), found)
                if SUMS:
                    pairs = _dot(tl.permute(tl.where(alike, own, 0.0), (0, 2, 1)), d_alike, pairs)
            if DX:
                result = _rounded(tl.permute(_of_channels(found, GROUPS), (1, 2, 0)), dx)
                tl.store(dx + block.to(tl.int64) * D + own_place, result, mask=own_mask)
            adjoint, slope = _receded(
                adjoint, slope, d_outputs, to_adjoint, to_slope, fade, of_before, passes, T, SLOPES, COMPLEX
            )

    total, total_slope, total_weighed = tl.sum(sum_adjoint, 1), tl.sum(sum_slope, 1), tl.sum(sum_weighed, 1)
    if not LAST:
        total_slope = _times(total_slope, own_out, COMPLEX)
    for lag in range(T if SUMS else 0):
        of_lag = tl.where(t[None, None, :] - t[None, :, None] == lag, pairs, 0.0)
        both = tl.sum(tl.sum(of_lag, 2), 1)[:, None] * _power(exponent, turns, shift, lag, COMPLEX)
        weighed = _times(both, own_out, COMPLEX)
        total, total_slope, total_weighed = total + both, total_slope + lag * weighed, total_weighed + weighed
    for head in range(tl.where(split == 0, HEAD, 0)):
        i = HEAD - 1 - head
        d_output = tl.load(dy + i * D + channel, mask=channel < D, other=0.0).to(NUMBER)[:, None]
        token = tl.load(x + i * D + channel, mask=channel < D, other=0.0).to(NUMBER)[:, None]
        rest = _times(from_end, _power(exponent, turns, shift, L - 1 - i, COMPLEX), COMPLEX)
        rest = tl.where(_same(document, i + 1, L, DOCUMENTS), rest, 0.0)
        own = carry + tl.where(shift == 0, d_output, 0.0)
        after = _times(own, own_out, COMPLEX) + rest
        total += token * own
        total_slope += token * (_times(carry_slope, own_out, COMPLEX) + rest * (L - 1 - i))
        total_weighed += token * after
        if DX:
            found = _rounded(_of_channels(tl.sum(enters * after, 1), GROUPS), dx)
            tl.store(dx + i * D + own_channel, found, mask=own_channel < D)
        passes = _same(document, i, i + 1, DOCUMENTS)
        carry_slope = tl.where(passes, _times(carry_slope + own, decay, COMPLEX), 0.0)
        carry = tl.where(passes, _times(own, decay, COMPLEX), 0.0)

    if SUMS:
        sums += tl.program_id(0).to(tl.int64) * D * N + at
        tl.store(sums, total, mask=there)
        tl.store(sums + kind, total_slope, mask=there)
        if LAST:
            tl.store(sums + 2 * kind, total_weighed, mask=there)
        if split == 0:
            tl.store(entered + row * D * N + at, carry, mask=there)
            tl.store(entered + kind // SPLITS + row * D * N + at, carry_slope, mask=there)
    elif not DX:
        parts += (row * SPLITS + split) * D * N + at
        tl.store(parts, carry, mask=there)
        tl.store(parts + kind, carry_slope, mask=there)
