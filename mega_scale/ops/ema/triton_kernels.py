"""The damped EMA's Triton kernels; what starts them, and what they compute, is in `triton.py`.

COMPLEX: a moving average is two columns of a state, its real and its imaginary part. Coefficients are given by column.
NUMBER, fp32 or fp64, is the dtype of coefficients, and so of states, sums and scratch memory. WIDE: tokens are widened
to it, as they are not bf16 or have fp64 coefficients.

A warp multiplies for one channel, whose states and matrices it holds. With more columns than that leaves registers
for, a channel is several: GROUPS, each with NP columns, in which all is linear, so that only outputs are summed.

Legend: B batch, L length, D channels, N columns of a state, NP those of a group padded, CH channels of a program, V
those by group. x, y and their gradients are contiguous (B, L, D), coefficients (D, N), states (B, D, N). `document`
(B, L) counts the documents that have begun.

Segments are cells, STEPS T tokens each from token HEAD on, of which the last ends where the row does. Where documents
begin in a cell it is several segments: each has all places of the cell, of which only its own tokens are read and
written. So states are forgotten between segments only, and no product knows of documents; each costs one more segment.
`starts` (B, L + cells + 1) lists twice the first token of each segment, plus 1 where a document begins with it, and
then 2 L. A document that begins a cell leaves an empty segment before it: a row has as many segments as it has cells
and documents.
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
            # Cut off, not rounded, which takes fewer instructions: but for 2**-16 of it.
            bits = a.to(tl.int32, bitcast=True)
            low = (a - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
            high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
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
def _powers(decay, steps, COMPLEX: tl.constexpr):
    """(V, T, NP): q^steps of `decay`, which is exponent, turns and shift (V, NP), for steps (T,)."""
    exponent, turns, shift = decay
    return _power(exponent[:, None, :], turns[:, None, :], shift[:, None, :], steps[None, :, None], COMPLEX)


@triton.jit
def _weights(decay, out, steps, COMPLEX: tl.constexpr):
    """(V, T, NP): what the columns of a state so many steps old give an output: of complex ones Re(c q^steps),
    -Im(c q^steps), `out` being the parts of c."""
    exponent, turns, shift = decay
    weights = out[0][:, None, :] * _powers(decay, steps, COMPLEX)
    if COMPLEX:
        weights += out[1][:, None, :] * _powers((exponent, turns, shift - 0.25), steps, COMPLEX)
        weights = tl.where((shift == 0)[:, None, :], weights, -weights)
    return weights


@triton.jit
def _toeplitz(decay, out, enters, scratch, T: tl.constexpr, BACK: tl.constexpr, COMPLEX: tl.constexpr):
    """(V, T, T): what a row's token gives a column's output inside of a block, or with BACK the other way."""
    V: tl.constexpr = enters.shape[0]
    t = tl.arange(0, T)
    tl.store(
        scratch + tl.arange(0, V)[:, None] * T + t[None, :],
        tl.sum(enters[:, None, :] * _weights(decay, out, t, COMPLEX), 2),
    )
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
def _same(document, first, stop, DOCUMENTS: tl.constexpr):
    """Whether the token before `first` and that before `stop` are of one document."""
    before = tl.load(document + first - 1, mask=(first > 0) & DOCUMENTS, other=0)
    return before == tl.load(document + stop - 1, mask=(stop > 0) & DOCUMENTS, other=0)


@triton.jit
def _part(document, split, L, HEAD, tokens, TILES, SEG: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The first segment of a part of a row, and the one after its last."""
    first, stop = split * TILES * SEG, tl.minimum((split + 1) * TILES * SEG, (L - HEAD) // tokens)
    if DOCUMENTS:
        begin, end = HEAD + first * tokens, HEAD + stop * tokens
        before = tl.load(document + HEAD - 1, mask=HEAD > 0, other=0)
        first += tl.load(document + begin - 1, mask=begin > 0, other=0) - before
        stop += tl.load(document + end - 1, mask=end > 0, other=0) - before
    return first, stop


@triton.jit
def _tile(starts, number, stop, HEAD, tokens, T: tl.constexpr, SEG: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of the segments from `number` to before `stop`, or SEG of them: the token with which the cell of the first one
    begins; where their cells begin from there on, (SEG,); as bits, in which steps a place of a block has a token of
    theirs, (SEG, T), or (SEG, 1) where all of them have; and bits of segments with which documents begin."""
    segment = number + tl.arange(0, SEG)
    there = segment < stop
    first, cell, steps = HEAD + number * tokens, tl.arange(0, SEG) * tokens, tl.where(there, -1, 0)[:, None]
    begins = 0
    if DOCUMENTS:
        # Cells are powers of two.
        first = tl.load(starts + number) >> 1
        first -= (first - HEAD) & (tokens - 1)
        begin = tl.load(starts + segment, mask=there, other=0)
        begins = tl.sum((begin & 1) << tl.arange(0, SEG))
        begin = begin >> 1
        end = tl.load(starts + segment + 1, mask=there, other=0) >> 1
        skipped = (begin - HEAD) & (tokens - 1)
        cell = begin - skipped - first
        before = skipped[:, None] + (T - 1 - tl.arange(0, T))[None, :]
        steps = (1 << (before + (end - begin)[:, None]) // T) - (1 << before // T)
    return first, cell, steps, begins


@triton.jit
def _inside(steps, step):
    """Whether tokens of a step are of their segments, as `_tile` says."""
    return ((steps & (1 << step)) != 0)[:, :, None]


@triton.jit
def _channels(
    log_decay, gain, projection, angle, first, D, N: tl.constexpr, NP: tl.constexpr, GROUPS: tl.constexpr,
    CH: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Of channels from `first` on, group after group (V,): the channel; and of their columns (V, NP) the place in
    coefficients; whether there is one; `decay`; gain; what of it a token enters the column with; projection; and `out`.
    """
    NUMBER: tl.constexpr = gain.dtype.element_ty
    v, n = tl.arange(0, GROUPS * CH), tl.arange(0, NP)[None, :]
    channel, column = first + v, n
    if GROUPS > 1:
        channel, column = first + v % CH, n + (v // CH * NP)[:, None]
    at, there = channel[:, None] * N + column, (channel < D)[:, None] & (column < N)
    exponent = tl.load(log_decay + at, mask=there, other=0.0)
    weight = tl.load(gain + at, mask=there, other=0.0)
    own_out = tl.load(projection + at, mask=there, other=0.0)
    turns, shift, out, enters = at, tl.zeros((1, NP), NUMBER), (own_out, own_out), weight
    if COMPLEX:
        # Columns are real and imaginary parts in turns, and both columns of a pair need both parts of its projection.
        turns = tl.load(angle + at, mask=there, other=0)
        shift = (n % 2).to(NUMBER) * 0.25
        real = tl.load(projection + at - n % 2, mask=there, other=0.0)
        out = (real, tl.load(projection + at + 1 - n % 2, mask=there, other=0.0))
        enters = tl.where(shift == 0, weight, 0.0)
    return channel, at, there, (exponent, turns, shift), weight, enters, own_out, out


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
def _unless(begins, s: tl.constexpr, values, DOCUMENTS: tl.constexpr):
    """Values, or zeros where a document begins with segment s."""
    return tl.where((begins >> s) & 1 != 0, 0.0, values) if DOCUMENTS else values


@triton.jit
def _join(
    ends, carry, fade, scratch, count, begins, DOCUMENTS: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """The states that enter the segments of a tile (V, SEG, NP), of which `count` exist, and the state that leaves it
    (V, NP); a segment leaves `fade` of a state, and adds what is in `ends`. `begins` has bits of those with which
    documents begin."""
    SEG: tl.constexpr = ends.shape[1]
    size: tl.constexpr = ends.shape[0] * ends.shape[2]
    thin, wide = _places(scratch, ends)
    tl.debug_barrier()
    tl.store(wide, ends)
    tl.debug_barrier()
    # All before the first store: several threads may hold the same number, and read what one of them overwrites.
    own = ()
    for s in tl.static_range(SEG):
        own = own + (tl.load(thin + s * size),)
    tl.debug_barrier()
    for s in tl.static_range(SEG):
        entering = _unless(begins, s, carry, DOCUMENTS)
        tl.store(thin + s * size, entering)
        carry = tl.where(s < count, own[s] + _times(entering, fade, COMPLEX), carry)
    tl.debug_barrier()
    return tl.load(wide), carry


@triton.jit
def _join_back(
    adjoint, slope, carry, carry_slope, rest, out, fade, scratch, count, begins, tokens,
    DOCUMENTS: tl.constexpr, LAST: tl.constexpr, SLOPES: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """The same of adjoints, slopes and rests, from the last segment to the first: what segments receive from those
    behind them, and what the tile passes on."""
    SEG: tl.constexpr = adjoint.shape[1]
    size: tl.constexpr = adjoint.shape[0] * adjoint.shape[2]
    kind: tl.constexpr = SEG * size
    thin, wide = _places(scratch, adjoint)
    tl.debug_barrier()
    tl.store(wide, adjoint)
    if SLOPES:
        tl.store(wide + kind, slope)
    tl.debug_barrier()
    own, own_slopes = (), ()
    for i in tl.static_range(SEG):
        at = thin + (SEG - 1 - i) * size
        own = own + (tl.load(at),)
        if SLOPES:
            own_slopes = own_slopes + (tl.load(at + kind),)
    tl.debug_barrier()
    for i in tl.static_range(SEG):
        s = SEG - 1 - i
        at, there = thin + s * size, s < count
        tl.store(at, carry)
        if SLOPES:
            tl.store(at + kind, carry_slope)
            whole = _whole(carry, out, rest, LAST, COMPLEX)
            before = own_slopes[i] + _times(carry_slope + tokens * whole, fade, COMPLEX)
            carry_slope = tl.where(there, _unless(begins, s, before, DOCUMENTS), carry_slope)
        if LAST:
            tl.store(at + 2 * kind, rest)
            rest = tl.where(there, _unless(begins, s, _times(rest, fade, COMPLEX), DOCUMENTS), rest)
        before = own[i] + _times(carry, fade, COMPLEX)
        carry = tl.where(there, _unless(begins, s, before, DOCUMENTS), carry)
    tl.debug_barrier()
    received = tl.load(wide), tl.load(wide + (kind if SLOPES else 0)), tl.load(wide + (2 * kind if LAST else 0))
    return received[0], received[1], received[2], carry, carry_slope, rest


@triton.jit
def _places(scratch, states):
    """Where numbers of states (V, SEG, NP) are exchanged: those of a segment (V, NP), and all."""
    V: tl.constexpr = states.shape[0]
    SEG: tl.constexpr = states.shape[1]
    NP: tl.constexpr = states.shape[2]
    thin = scratch + tl.arange(0, V)[:, None] * NP + tl.arange(0, NP)[None, :]
    wide = scratch + tl.arange(0, SEG)[None, :, None] * (V * NP)
    return thin, wide + tl.arange(0, V)[:, None, None] * NP + tl.arange(0, NP)[None, None, :]


@triton.jit
def _most_segments(L, HEAD, tokens):
    """Numbers of a row in `starts`: with a document for each token."""
    return L + (L - HEAD) // tokens + 1


@triton.jit
def starts_kernel(document, starts, L, HEAD, tokens, BLOCK: tl.constexpr):
    """`starts` of rows; a program takes BLOCK tokens of those to L, where the last segment ends."""
    row, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    document, starts = document + row * L, starts + row * _most_segments(L, HEAD, tokens)
    there = (token >= HEAD) & (token <= L)
    count = tl.load(document + token - 1, mask=there & (token > 0), other=0)
    begun = tl.load(document + token, mask=there & (token < L), other=0)
    cell = (token - HEAD) // tokens - tl.load(document + HEAD - 1, mask=HEAD > 0, other=0)
    tl.store(starts + cell + count, 2 * token, mask=there & ((token - HEAD) % tokens == 0))
    tl.store(starts + cell + begun, 2 * token + 1, mask=there & (token < L) & (begun > count))


@triton.jit
def outputs_kernel(
    x, log_decay, gain, projection, angle, document, starts, state, parts, y, end, scratch,
    L, D, HEAD, STEPS, TILES, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, SEG: tl.constexpr, CH: tl.constexpr,
    INITIAL: tl.constexpr, DOCUMENTS: tl.constexpr, OUTPUTS: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """With OUTPUTS y and the states after rows, `end`; else those after `parts` (B, SPLITS, D, N), begun at zero."""
    NUMBER: tl.constexpr = gain.dtype.element_ty
    WIDE: tl.constexpr = x.dtype.element_ty != tl.bfloat16 or gain.dtype.element_ty == tl.float64
    V: tl.constexpr = GROUPS * CH
    row, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    t, tokens = tl.arange(0, T), STEPS * T
    x, y, document = x + row * L * D, y + row * L * D, document + row * L
    starts += row * _most_segments(L, HEAD, tokens)
    scratch += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (3 * SEG * V * NP)
    own_channel = tl.program_id(1) * CH + tl.arange(0, CH)
    channel, at, there, decay, weight, enters, _, out = _channels(
        log_decay, gain, projection, angle, tl.program_id(1) * CH, D, N, NP, GROUPS, CH, COMPLEX
    )
    into = _parts(weight[:, None, :] * _powers(decay, T - 1 - t, COMPLEX), WIDE)
    from_state = _parts(tl.permute(_weights(decay, out, t + 1, COMPLEX), (0, 2, 1)), WIDE)
    toeplitz = _parts(_toeplitz(decay, out, enters, scratch, T, False, COMPLEX), WIDE)
    fade = _power(decay[0], decay[1], decay[2], T, COMPLEX)[:, None, :]
    segment_fade = _power(decay[0], decay[1], decay[2], tokens, COMPLEX)

    carry = tl.load(state + row * D * N + at, mask=there & INITIAL, other=0.0)
    for part in range(split if OUTPUTS else 0):
        size = TILES * SEG * tokens
        first, stop = tl.where(part == 0, 0, HEAD + part * size), HEAD + (part + 1) * size
        left = _times(carry, _power(decay[0], decay[1], decay[2], stop - first, COMPLEX), COMPLEX)
        carry = tl.where(_same(document, first, stop, DOCUMENTS), left, 0.0)
        carry += tl.load(parts + (row * SPLITS + part) * D * N + at, mask=there, other=0.0)
    read = tl.sum(_weights(decay, out, tl.zeros((1,), tl.int32), COMPLEX), 1)
    for i in range(tl.where(split == 0, HEAD, 0)):
        token = tl.load(x + i * D + channel, mask=channel < D, other=0.0).to(NUMBER)
        left = _times(carry, _power(decay[0], decay[1], decay[2], 1, COMPLEX), COMPLEX)
        carry = tl.where(_same(document, i, i + 1, DOCUMENTS), left, 0.0) + enters * token[:, None]
        if OUTPUTS:
            found = _rounded(_of_channels(tl.sum(carry * read, 1), GROUPS), y)
            tl.store(y + i * D + own_channel, found, mask=own_channel < D)

    begin, stop = _part(document, split, L, HEAD, tokens, TILES, SEG, DOCUMENTS)
    for number in range(begin, stop, SEG):
        first, cell, steps, begins = _tile(starts, number, stop, HEAD, tokens, T, SEG, DOCUMENTS)
        of_tokens = (cell[:, None, None] + t[None, :, None]) * D
        place, own_place = of_tokens + channel[None, None, :], of_tokens + own_channel[None, None, :]
        states = tl.zeros((V, SEG, NP), NUMBER)
        for step in range(STEPS):
            mask = _inside(steps, step) & (channel < D)[None, None, :]
            own = _read(x + (first + step * T).to(tl.int64) * D + place, mask, WIDE, NUMBER)
            states = _product(own, into, _times(states, fade, COMPLEX))
        states, carry = _join(states, carry, segment_fade, scratch, stop - number, begins, DOCUMENTS, COMPLEX)
        for step in range(STEPS if OUTPUTS else 0):
            block, inside = (first + step * T).to(tl.int64) * D, _inside(steps, step)
            own = _read(x + block + place, inside & (channel < D)[None, None, :], WIDE, NUMBER)
            found = _product(states, from_state, tl.zeros((V, SEG, T), NUMBER))
            found = _product(own, toeplitz, found)
            result = _rounded(tl.permute(_of_channels(found, GROUPS), (1, 2, 0)), y)
            tl.store(y + block + own_place, result, mask=inside & (own_channel < D)[None, None, :])
            states = _product(own, into, _times(states, fade, COMPLEX))
    if not OUTPUTS:
        tl.store(parts + (row * SPLITS + split) * D * N + at, carry, mask=there)
    elif split == SPLITS - 1:
        tl.store(end + row * D * N + at, carry, mask=there)


@triton.jit
def _whole(adjoint, out, rest, LAST: tl.constexpr, COMPLEX: tl.constexpr):
    """With LAST the gradient by a state: what outputs and the end of the row give it; else the adjoint, which lacks the
    projection."""
    return _times(adjoint, out, COMPLEX) + rest if LAST else adjoint


@triton.jit
def _matrices_back(
    decay, there, weight, enters, out, scratch,
    T: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """(V, T, NP): what gradients of outputs add to adjoints and slopes before a block, and tokens to those sums of them
    that adjoints and slopes behind it multiply; (V, NP, T): what adjoints give gradients of tokens; and `_toeplitz`."""
    t = tl.arange(0, T)
    powers = tl.where(there[:, None, :], _powers(decay, t + 1, COMPLEX), 0.0)
    slopes = powers
    if LAST:
        slopes = _weights(decay, out, t + 1, COMPLEX)
        slopes = tl.where((decay[2] == 0)[:, None, :], slopes, -slopes)
    to_adjoint, to_slope = _parts(powers, WIDE), _parts(slopes * (t + 1)[None, :, None], WIDE)
    powers = tl.where(there[:, None, :], _powers(decay, T - 1 - t, COMPLEX), 0.0)
    to_sum, to_slope_sum = _parts(powers, WIDE), _parts(powers * (T - 1 - t)[None, :, None], WIDE)
    if LAST:
        gives = tl.where(decay[2] == 0, weight, -weight)[:, None, :] * powers
    else:
        gives = weight[:, None, :] * _weights(decay, out, T - 1 - t, COMPLEX)
    from_adjoint = _parts(tl.permute(gives, (0, 2, 1)), WIDE)
    toeplitz = _parts(_toeplitz(decay, out, enters, scratch, T, True, COMPLEX), WIDE)
    return to_adjoint, to_slope, to_sum, to_slope_sum, from_adjoint, toeplitz


@triton.jit
def _receded(
    adjoint, slope, whole, d_outputs, to_adjoint, to_slope, fade,
    T: tl.constexpr, SLOPES: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Adjoints and slopes before a block."""
    if SLOPES:
        slope = _product(d_outputs, to_slope, _times(slope + T * whole, fade, COMPLEX))
    return _product(d_outputs, to_adjoint, _times(adjoint, fade, COMPLEX)), slope


@triton.jit
def _from_parts(
    parts, d_end, decay, own_out, document, at, there, kind, row, split, L, D, HEAD, size, SPLITS,
    N: tl.constexpr, DOCUMENTS: tl.constexpr, LAST: tl.constexpr, INNER: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Adjoint, slope and rest behind a part of a row, of the parts that follow unless INNER, and of the row's end."""
    exponent, turns, shift = decay
    carry, carry_slope = tl.zeros_like(exponent), tl.zeros_like(exponent)
    for i in range(0 if INNER else SPLITS - 1 - split):
        first = HEAD + (SPLITS - 1 - i) * size
        stop = tl.minimum(first + size, L)
        passes, left = _same(document, first, stop, DOCUMENTS), _power(exponent, turns, shift, stop - first, COMPLEX)
        of_part = parts + (row * SPLITS + SPLITS - 1 - i) * D * N + at
        carry_slope = tl.where(passes, _times(carry_slope + (stop - first) * carry, left, COMPLEX), 0.0)
        carry_slope += tl.load(of_part + kind, mask=there, other=0.0)
        carry = tl.where(passes, _times(carry, left, COMPLEX), 0.0) + tl.load(of_part, mask=there, other=0.0)
    rest = carry
    if LAST:
        distance = tl.maximum(L - HEAD - (split + 1) * size, 0)
        rest = tl.load(d_end + row * D * N + at, mask=there, other=0.0)
        rest = _times(rest, _power(exponent, turns, shift, distance, COMPLEX), COMPLEX)
        rest = tl.where(_same(document, L - distance, L, DOCUMENTS), rest, 0.0)
        carry_slope = _times(carry_slope, own_out, COMPLEX) + distance * rest
    return carry, carry_slope, rest


@triton.jit
def _inner_sums(pairs, decay, own_out, sums, slopes, weighed, LAST: tl.constexpr, COMPLEX: tl.constexpr):
    """Sums (V, NP) of what tokens and gradients of outputs in the same blocks give, added to those between blocks;
    `pairs` (V, T, T) are sums of their products."""
    T: tl.constexpr = pairs.shape[1]
    t = tl.arange(0, T)
    if not LAST:
        slopes = _times(slopes, own_out, COMPLEX)
    for lag in range(T):
        of_lag = tl.sum(tl.sum(tl.where(t[None, None, :] - t[None, :, None] == lag, pairs, 0.0), 2), 1)
        both = of_lag[:, None] * _power(decay[0], decay[1], decay[2], lag, COMPLEX)
        given = _times(both, own_out, COMPLEX)
        sums, slopes, weighed = sums + both, slopes + lag * given, weighed + given
    return sums, slopes, weighed


@triton.jit
def _sums(
    own, adjoint, slope, whole, to_sum, to_slope_sum, sums, slopes, weighed, LAST: tl.constexpr, COMPLEX: tl.constexpr
):
    """Sums (V, SEG, NP) of tokens times what is behind them: adjoints, slopes and, with LAST, wholes."""
    reached = _product(own, to_sum, tl.zeros_like(sums))
    sums += _times(reached, adjoint, COMPLEX)
    slopes += _times(reached, slope, COMPLEX)
    if LAST:
        weighed += _times(reached, whole, COMPLEX)
    slopes += _times(_product(own, to_slope_sum, tl.zeros_like(sums)), whole, COMPLEX)
    return sums, slopes, weighed


@triton.jit
def _head_back(
    dy, x, dx, document, channel, own_channel, decay, enters, own_out, carry, carry_slope, rest,
    sums, slopes, weighed, head, D,
    GROUPS: tl.constexpr, DOCUMENTS: tl.constexpr, LAST: tl.constexpr, DX: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """The first `head` tokens of a row, one by one from the last: adjoint, slope and rest before them, and sums (V, NP)
    that count them."""
    exponent, turns, shift = decay
    once = _power(exponent, turns, shift, 1, COMPLEX)
    for behind in range(head):
        i = head - 1 - behind
        d_output = tl.load(dy + i * D + channel, mask=channel < D, other=0.0).to(carry.dtype)[:, None]
        token = tl.load(x + i * D + channel, mask=channel < D, other=0.0).to(carry.dtype)[:, None]
        carry += tl.where(shift == 0, d_output, 0.0)
        whole = _whole(carry, own_out, rest, LAST, COMPLEX)
        given = whole if LAST else _times(carry, own_out, COMPLEX)
        sums += token * carry
        slopes += token * (carry_slope if LAST else _times(carry_slope, own_out, COMPLEX))
        weighed += token * given
        if DX:
            found = _rounded(_of_channels(tl.sum(enters * given, 1), GROUPS), dx)
            tl.store(dx + i * D + own_channel, found, mask=own_channel < D)
        passes = _same(document, i, i + 1, DOCUMENTS)
        carry_slope = tl.where(passes, _times(carry_slope + whole, once, COMPLEX), 0.0)
        carry = tl.where(passes, _times(carry, once, COMPLEX), 0.0)
        if LAST:
            rest = tl.where(passes, _times(rest, once, COMPLEX), 0.0)
    return carry, carry_slope, rest, sums, slopes, weighed


@triton.jit
def gradients_kernel(  # noqa: PLR0915 (what the forward pass does, from its end to its beginning)
    dy, log_decay, gain, projection, angle, document, starts, x, d_end, parts, dx, sums, entered, scratch,
    L, D, HEAD, STEPS, TILES, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, SEG: tl.constexpr, CH: tl.constexpr,
    DOCUMENTS: tl.constexpr, LAST: tl.constexpr, DX: tl.constexpr, SUMS: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """With DX dx; with SUMS sums over tokens x, and adjoints and slopes before rows, `entered` (2, B, D, N); with
    neither those before `parts` (2, B, SPLITS, D, N), which are else read.

    LAST is for gradients by states after rows, `d_end` (B, D, N). Of them a `rest` is left at each token, and slopes
    are those of projection times adjoint plus rest; but `entered` never counts rests. `sums` (2 or 3, B SPLITS, D, N)
    are those of x times adjoints; times slopes, and without LAST times the projection; and with LAST, times projection
    times adjoints plus rests.
    """
    NUMBER: tl.constexpr = gain.dtype.element_ty
    WIDE: tl.constexpr = dy.dtype.element_ty != tl.bfloat16 or gain.dtype.element_ty == tl.float64
    V: tl.constexpr = GROUPS * CH
    SLOPES: tl.constexpr = SUMS or not DX
    INNER: tl.constexpr = not (DX or SUMS)
    row, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    x, dy, dx, document = x + row * L * D, dy + row * L * D, dx + row * L * D, document + row * L
    t, tokens = tl.arange(0, T), STEPS * T
    starts += row * _most_segments(L, HEAD, tokens)
    scratch += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (3 * SEG * V * NP)
    own_channel = tl.program_id(1) * CH + tl.arange(0, CH)
    channel, at, there, decay, weight, enters, own_out, out = _channels(
        log_decay, gain, projection, angle, tl.program_id(1) * CH, D, N, NP, GROUPS, CH, COMPLEX
    )
    to_adjoint, to_slope, to_sum, to_slope_sum, from_adjoint, toeplitz = _matrices_back(
        decay, there, weight, enters, out, scratch, T, WIDE, LAST, COMPLEX
    )
    fade, wide_out = _power(decay[0], decay[1], decay[2], T, COMPLEX)[:, None, :], own_out[:, None, :]
    segment_fade = _power(decay[0], decay[1], decay[2], tokens, COMPLEX)
    kind = tl.num_programs(0).to(tl.int64) * D * N
    carry, carry_slope, rest = _from_parts(
        parts, d_end, decay, own_out, document, at, there, kind, row, split, L, D, HEAD, TILES * SEG * tokens, SPLITS,
        N, DOCUMENTS, LAST, INNER, COMPLEX,
    )  # fmt: skip

    sum_adjoint, sum_slope = tl.zeros((V, SEG, NP), NUMBER), tl.zeros((V, SEG, NP), NUMBER)
    sum_weighed, pairs = tl.zeros((V, SEG, NP), NUMBER), tl.zeros((V, T, T), NUMBER)
    begin, stop = _part(document, split, L, HEAD, tokens, TILES, SEG, DOCUMENTS)
    for tile in range(tl.cdiv(stop - begin, SEG)):
        number = begin + (tl.cdiv(stop - begin, SEG) - 1 - tile) * SEG
        first, cell, steps, begins = _tile(starts, number, stop, HEAD, tokens, T, SEG, DOCUMENTS)
        of_tokens = (cell[:, None, None] + t[None, :, None]) * D
        place, own_place = of_tokens + channel[None, None, :], of_tokens + own_channel[None, None, :]
        adjoint, slope = tl.zeros((V, SEG, NP), NUMBER), tl.zeros((V, SEG, NP), NUMBER)
        for i in range(STEPS):
            step = STEPS - 1 - i
            mask = _inside(steps, step) & (channel < D)[None, None, :]
            d_outputs = _read(dy + (first + step * T).to(tl.int64) * D + place, mask, WIDE, NUMBER)
            whole = _whole(adjoint, wide_out, 0.0, LAST, COMPLEX)
            adjoint, slope = _receded(adjoint, slope, whole, d_outputs, to_adjoint, to_slope, fade, T, SLOPES, COMPLEX)
        adjoint, slope, left, carry, carry_slope, rest = _join_back(
            adjoint, slope, carry, carry_slope, rest, own_out, segment_fade, scratch, stop - number, begins, tokens,
            DOCUMENTS, LAST, SLOPES, COMPLEX,
        )  # fmt: skip
        for i in range(0 if INNER else STEPS):
            step = STEPS - 1 - i
            block, inside = (first + step * T).to(tl.int64) * D, _inside(steps, step)
            mask = inside & (channel < D)[None, None, :]
            own = _read(x + block + place, mask, WIDE, NUMBER)
            d_outputs = _read(dy + block + place, mask, WIDE, NUMBER)
            whole = _whole(adjoint, wide_out, left, LAST, COMPLEX)
            if DX:
                found = _product(whole, from_adjoint, tl.zeros((V, SEG, T), NUMBER))
                found = _product(d_outputs, toeplitz, found)
                result = _rounded(tl.permute(_of_channels(found, GROUPS), (1, 2, 0)), dx)
                tl.store(dx + block + own_place, result, mask=inside & (own_channel < D)[None, None, :])
            if SUMS:
                sum_adjoint, sum_slope, sum_weighed = _sums(
                    own, adjoint, slope, whole, to_sum, to_slope_sum, sum_adjoint, sum_slope, sum_weighed, LAST, COMPLEX
                )
                pairs = _dot(tl.permute(own, (0, 2, 1)), d_outputs, pairs)
            adjoint, slope = _receded(adjoint, slope, whole, d_outputs, to_adjoint, to_slope, fade, T, SLOPES, COMPLEX)
            if LAST:
                left = _times(left, fade, COMPLEX)

    # Read again, as registers are short in loops.
    channel, at, there, decay, weight, enters, own_out, out = _channels(
        log_decay, gain, projection, angle, tl.program_id(1) * CH, D, N, NP, GROUPS, CH, COMPLEX
    )
    total, total_slope, total_weighed = tl.sum(sum_adjoint, 1), tl.sum(sum_slope, 1), tl.sum(sum_weighed, 1)
    if SUMS:
        total, total_slope, total_weighed = _inner_sums(
            pairs, decay, own_out, total, total_slope, total_weighed, LAST, COMPLEX
        )
    carry, carry_slope, rest, total, total_slope, total_weighed = _head_back(
        dy, x, dx, document, channel, own_channel, decay, enters, own_out, carry, carry_slope, rest,
        total, total_slope, total_weighed, tl.where(split == 0, HEAD, 0), D, GROUPS, DOCUMENTS, LAST, DX, COMPLEX,
    )  # fmt: skip
    if SUMS:
        sums += tl.program_id(0).to(tl.int64) * D * N + at
        tl.store(sums, total, mask=there)
        tl.store(sums + kind, total_slope, mask=there)
        if LAST:
            tl.store(sums + 2 * kind, total_weighed, mask=there)
            carry_slope -= L * rest
        if split == 0:
            tl.store(entered + row * D * N + at, carry, mask=there)
            tl.store(entered + kind // SPLITS + row * D * N + at, carry_slope, mask=there)
    elif not DX:
        parts += (row * SPLITS + split) * D * N + at
        tl.store(parts, carry, mask=there)
        tl.store(parts + kind, carry_slope, mask=there)
