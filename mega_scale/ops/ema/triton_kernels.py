"""The damped EMA's Triton kernels; what starts them, and what they compute, is in `triton.py`.

COMPLEX: a moving average is two columns of a state, its real and its imaginary part. Coefficients are given by column.
NUMBER, fp32 or fp64, is the dtype of coefficients, and so of states, sums and scratch memory. WIDE: tokens are widened
to it, as they are not bf16 or have fp64 coefficients.

A warp multiplies for one or two channels, whose states and matrices it holds.

Legend: B batch, L length, D channels, N columns of a state, NP those padded, CH channels of a program. x, y and their
gradients are contiguous (B, L, D), coefficients (D, N), states (B, D, N). `document` (B, L) counts the documents that
have begun.

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
AHEAD = tl.constexpr(2)
"""Steps of a tile for which tokens are asked for before they are read."""


@triton.jit
def ask_for(pointer, offset):
    """Have memory bring what is `offset` bytes behind a pointer to the GPU's cache, and do not wait for it."""
    if not INTERPRETED:
        ask: tl.constexpr = "{ .reg .u64 at; mad.wide.s32 at, $2, 1, $1; prefetch.global.L2 [at]; mov.u32 $0, 0; }"
        tl.inline_asm_elementwise(ask, "=r,l,r", [pointer.to(tl.int64), offset], tl.int32, is_pure=False, pack=1)


@triton.jit
def in_parts(values, WIDE: tl.constexpr):
    """Two bf16 numbers whose sum is an fp32 value but for 2**-17 of it; with WIDE the value itself, fp32 or fp64."""
    high, low = values, values
    if not WIDE:
        high = values.to(tl.bfloat16)
        low = (values - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def dot(a, b, acc):
    if acc.dtype == tl.float64:  # without matrix units: of some of these products Triton compiles none in fp64
        acc += tl.sum(a[:, :, :, None] * b[:, None, :, :], 2)
    else:
        if INTERPRETED:  # which multiplies the bits of bf16 numbers
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


@triton.jit
def product(a, matrix, acc):
    """acc + a matrix, which is in `in_parts`: of bf16 tokens as they are, of fp32 states in parts, or all in NUMBER."""
    high = a
    if matrix[0].dtype == tl.bfloat16:
        if a.dtype == tl.float32:
            # Cut off, not rounded, which takes fewer instructions: but for 2**-16 of it.
            bits = a.to(tl.int32, bitcast=True)
            low = (a - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
            high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
            acc = dot(low, matrix[0], acc)
        acc = dot(high, matrix[1], acc)
    return dot(high, matrix[0], acc)


@triton.jit
def _halves(numbers):
    """Real and imaginary parts of pairs in the last of two or three dimensions."""
    if len(numbers.shape) == 2:
        re, im = tl.split(tl.reshape(numbers, (numbers.shape[0], numbers.shape[1] // 2, 2)))
    else:
        re, im = tl.split(tl.reshape(numbers, (numbers.shape[0], numbers.shape[1], numbers.shape[2] // 2, 2)))
    return re, im


@triton.jit
def times(a, b, COMPLEX: tl.constexpr):
    """a b, number by number."""
    result = a * b
    if COMPLEX:
        a_re, a_im = _halves(a)
        b_re, b_im = _halves(b)
        result = tl.reshape(tl.join(a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re), result.shape)
    return result


@triton.jit
def plus_times(sum, a, b, COMPLEX: tl.constexpr):
    """sum + a b, number by number, by as few instructions as there are products."""
    result = sum + a * b
    if COMPLEX:
        re, im = _halves(sum)
        a_re, a_im = _halves(a)
        b_re, b_im = _halves(b)
        re, im = re + a_re * b_re - a_im * b_im, im + a_re * b_im + a_im * b_re
        result = tl.reshape(tl.join(re, im), result.shape)
    return result


@triton.jit
def parts_of(numbers, COMPLEX: tl.constexpr):
    """A tuple of numbers (CH, NP), or of their real and imaginary parts (CH, NP // 2), which threads then multiply
    without those of others."""
    parts = (numbers,)
    if COMPLEX:
        parts = _halves(numbers)
    return parts


@triton.jit
def numbers_of(parts, COMPLEX: tl.constexpr):
    """The other way."""
    numbers = parts[0]
    if COMPLEX:
        joined = tl.join(parts[0], parts[1])
        numbers = tl.reshape(joined, (joined.shape[0], joined.shape[1] * 2))
    return numbers


@triton.jit
def load_parts(places, COMPLEX: tl.constexpr):
    """`parts_of` numbers that begin at `places`."""
    parts = (tl.load(places),)
    if COMPLEX:
        parts = parts + (tl.load(places + 1),)
    return parts


@triton.jit
def store_parts(places, parts):
    for i in tl.static_range(len(parts)):
        tl.store(places + i, parts[i])


@triton.jit
def plus_times_parts(sum, a, b, COMPLEX: tl.constexpr):
    """`plus_times` of `parts_of`."""
    parts = (sum[0] + a[0] * b[0],)
    if COMPLEX:
        parts = (sum[0] + a[0] * b[0] - a[1] * b[1], sum[1] + a[0] * b[1] + a[1] * b[0])
    return parts


@triton.jit
def parts_where(condition, parts, others):
    chosen = ()
    for i in tl.static_range(len(parts)):
        chosen = chosen + (tl.where(condition, parts[i], others[i]),)
    return chosen


@triton.jit
def _cosine(turns):
    """The cosine of fp32 angles of up to 0.75 turns each way, within 2e-7. The vendor's has branches for large angles,
    which take registers where programs begin."""
    # Folded to the sine of up to a quarter turn each way, by the polynomial that errs least there.
    turns = tl.abs(tl.abs(turns) - 0.5) - 0.25
    square = turns * turns
    sine = 81.60247802734375 + square * (-76.58128356933594 + square * 39.76072311401367)
    return turns * (6.2831854820251465 + square * (-41.34168243408203 + square * sine))


@triton.jit
def power_of(exponent, turns, shift, steps, COMPLEX: tl.constexpr):
    """q^steps; of complex ones real parts in columns whose shift is 0, and imaginary parts where it is a quarter turn.

    `turns` are angles in units of 2^-64 turns, so that integers, which wrap, keep the phase of any power exact.
    """
    size = tl.exp(exponent * steps)
    if COMPLEX:
        if exponent.dtype == tl.float64:
            phase = (turns * steps).to(tl.float64) * 2.0**-64
            size *= tl.cos(6.283185307179586 * (phase - shift))
        else:
            phase = turns * steps
            phase = (phase if turns.dtype == tl.int32 else phase >> 32).to(tl.float32) * 2.0**-32
            size *= _cosine(phase - shift)
    return size


@triton.jit
def powers_of(decay, steps, COMPLEX: tl.constexpr):
    """(CH, T, NP): q^steps of `decay`, which is exponent, turns and shift (CH, NP), for steps (T,), up to T."""
    exponent, turns, shift = decay
    if COMPLEX and exponent.dtype == tl.float32:
        turns = (turns >> 32).to(tl.int32)  # as few steps need no more
    return power_of(exponent[:, None, :], turns[:, None, :], shift[:, None, :], steps[None, :, None], COMPLEX)


@triton.jit
def weights_of(decay, out, steps, COMPLEX: tl.constexpr):
    """(CH, T, NP): what the columns of a state so many steps old give an output: of complex ones Re(c q^steps),
    -Im(c q^steps), `out` being the parts of c."""
    exponent, turns, shift = decay
    weights = out[0][:, None, :] * powers_of(decay, steps, COMPLEX)
    if COMPLEX:
        weights += out[1][:, None, :] * powers_of((exponent, turns, shift - 0.25), steps, COMPLEX)
        weights = tl.where((shift == 0)[:, None, :], weights, -weights)
    return weights


@triton.jit
def toeplitz_of(decay, out, enters, beside, scratch, T: tl.constexpr, BACK: tl.constexpr, COMPLEX: tl.constexpr):
    """(CH, T, T): what a row's token gives a column's output inside of a block, or with BACK the other way; its own
    output has `beside` (CH,) times the token as well."""
    CH: tl.constexpr = enters.shape[0]
    t = tl.arange(0, T)
    tl.store(
        scratch + tl.arange(0, CH)[:, None] * T + t[None, :],
        tl.sum(enters[:, None, :] * weights_of(decay, out, t, COMPLEX), 2) + tl.where(t == 0, beside[:, None], 0.0),
    )
    tl.debug_barrier()
    lag = (t[:, None] - t[None, :] if BACK else t[None, :] - t[:, None])[None, :, :]
    return tl.load(scratch + tl.arange(0, CH)[:, None, None] * T + lag, mask=lag >= 0, other=0.0)


@triton.jit
def load_tokens(pointer, mask, WIDE: tl.constexpr, NUMBER: tl.constexpr):
    """Tokens (SEG, T, CH) as (CH, SEG, T)."""
    tokens = tl.permute(tl.load(pointer, mask=mask, other=0.0), (2, 0, 1))
    return tokens.to(NUMBER) if WIDE else tokens


@triton.jit
def rounded(values, pointer):
    """Values in the dtype of what `pointer` points to; fp64 ones by way of fp32, as none become bf16 at once."""
    if values.dtype == tl.float64 and pointer.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)
    return values.to(pointer.dtype.element_ty)


@triton.jit
def same_document(document, first, stop, DOCUMENTS: tl.constexpr):
    """Whether the token before `first` and that before `stop` are of one document."""
    before = tl.load(document + first - 1, mask=(first > 0) & DOCUMENTS, other=0)
    return before == tl.load(document + stop - 1, mask=(stop > 0) & DOCUMENTS, other=0)


@triton.jit
def part_of(document, split, L, HEAD, tokens, TILES, SEG: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The first segment of a part of a row, and the one after its last."""
    first, stop = split * TILES * SEG, tl.minimum((split + 1) * TILES * SEG, (L - HEAD) // tokens)
    if DOCUMENTS:
        begin, end = HEAD + first * tokens, HEAD + stop * tokens
        before = tl.load(document + HEAD - 1, mask=HEAD > 0, other=0)
        first += tl.load(document + begin - 1, mask=begin > 0, other=0) - before
        stop += tl.load(document + end - 1, mask=end > 0, other=0) - before
    return first, stop


@triton.jit
def cells_of(starts, number, stop, HEAD, tokens, SEG: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of the segments from `number` to before `stop`, or SEG of them: the token with which the cell of the first one
    begins; where their cells begin from there on, (SEG,); how many tokens of their cells are before their own, and how
    many are their own, (SEG,); and bits of segments with which documents begin."""
    segment = number + tl.arange(0, SEG)
    there = segment < stop
    first, cell, begins = HEAD + number * tokens, tl.arange(0, SEG) * tokens, 0
    skipped, count = tl.zeros((SEG,), tl.int32), tl.where(there, tokens, 0)
    if DOCUMENTS:
        # Cells are powers of two.
        first = tl.load(starts + number) >> 1
        first -= (first - HEAD) & (tokens - 1)
        begin = tl.load(starts + segment, mask=there, other=0)
        begins = tl.sum((begin & 1) << tl.arange(0, SEG))
        begin = begin >> 1
        skipped = (begin - HEAD) & (tokens - 1)
        count = (tl.load(starts + segment + 1, mask=there, other=0) >> 1) - begin
        cell = begin - skipped - first
    return first, cell, (skipped, count), begins


@triton.jit
def steps_of(own, T: tl.constexpr, BACK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """As bits, in which steps a place of a block has a token of segments, (SEG, T), or (SEG, 1) where all of them have;
    with BACK places count from the last one. `own` is as `cells_of` has it."""
    skipped, count = own
    if DOCUMENTS:
        t = tl.arange(0, T)
        # Without signs, of which a division has to take care.
        before = (skipped[:, None] + (t if BACK else T - 1 - t)[None, :]).to(tl.uint32)
        steps = (1 << (before + count[:, None].to(tl.uint32)) // T) - (1 << before // T)
    else:
        steps = tl.where(count > 0, -1, 0)[:, None]
    return steps


@triton.jit
def has_token(steps, step):
    """Whether tokens of a step are of their segments, as `steps_of` says."""
    return ((steps & (1 << step)) != 0)[:, :, None]


@triton.jit
def channels_of(
    log_decay, gain, projection, angle, first, D, N: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr,
    COMPLEX: tl.constexpr,
):  # fmt: skip
    """Of channels from `first` on (CH,): the channel; and of their columns (CH, NP) the place in
    coefficients; whether there is one; `decay`; gain; what of it a token enters the column with; projection; and `out`.
    """
    NUMBER: tl.constexpr = gain.dtype.element_ty
    channel, n = first + tl.arange(0, CH), tl.arange(0, NP)[None, :]
    at, there = channel[:, None] * N + n, (channel < D)[:, None] & (n < N)
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
def beside_of(omega, first, D, NUMBER: tl.constexpr, CH: tl.constexpr, OMEGA: tl.constexpr):
    """Omega of channels from `first` on (CH,), or zeros."""
    channel = first + tl.arange(0, CH)
    return tl.load(omega + channel, mask=OMEGA & (channel < D), other=0.0).to(NUMBER)


@triton.jit
def unless_begun(begins, s: tl.constexpr, parts, DOCUMENTS: tl.constexpr):
    """`parts_of` numbers, or zeros where a document begins with segment s."""
    if DOCUMENTS:
        parts = parts_where((begins & (1 << s)) == 0, parts, (0.0, 0.0))
    return parts


@triton.jit
def numbers_at(scratch, CH: tl.constexpr, NP: tl.constexpr, COMPLEX: tl.constexpr):
    """Where numbers of columns (CH, NP) begin: (CH, NP), or of complex ones (CH, NP // 2)."""
    WIDTH: tl.constexpr = 1 + COMPLEX
    return scratch + tl.arange(0, CH)[:, None] * NP + tl.arange(0, NP // WIDTH)[None, :] * WIDTH


@triton.jit
def places_of(scratch, states, COMPLEX: tl.constexpr):
    """Where numbers of states (CH, SEG, NP) are exchanged: those of a segment, for `load_parts`, and all."""
    CH: tl.constexpr = states.shape[0]
    SEG: tl.constexpr = states.shape[1]
    NP: tl.constexpr = states.shape[2]
    thin = numbers_at(scratch, CH, NP, COMPLEX)
    wide = scratch + tl.arange(0, SEG)[None, :, None] * (CH * NP)
    return thin, wide + tl.arange(0, CH)[:, None, None] * NP + tl.arange(0, NP)[None, None, :]


@triton.jit
def most_segments(L, HEAD, tokens):
    """Numbers of a row in `starts`: with a document for each token."""
    return L + (L - HEAD) // tokens + 1


@triton.jit
def starts_kernel(document, starts, L, HEAD, tokens, BLOCK: tl.constexpr):
    """`starts` of rows; a program takes BLOCK tokens of those to L, where the last segment ends."""
    row, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    document, starts = document + row * L, starts + row * most_segments(L, HEAD, tokens)
    there = (token >= HEAD) & (token <= L)
    count = tl.load(document + token - 1, mask=there & (token > 0), other=0)
    begun = tl.load(document + token, mask=there & (token < L), other=0)
    cell = (token - HEAD) // tokens - tl.load(document + HEAD - 1, mask=HEAD > 0, other=0)
    tl.store(starts + cell + count, 2 * token, mask=there & ((token - HEAD) % tokens == 0))
    tl.store(starts + cell + begun, 2 * token + 1, mask=there & (token < L) & (begun > count))
