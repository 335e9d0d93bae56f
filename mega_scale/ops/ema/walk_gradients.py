"""The Triton kernel of the backward pass of `walk_kernels`: the same walk from the last token, tokens read once.

With adjoints `a_t = q a_{t+1} + projection dy_t`, what the input's gradient needs is there as it is read. No state of
the forward pass is needed for the gradient by q either: with the slopes `s_t = da_t/dq = q s_{t+1} + a_{t+1}` it is
`gain sum_t x_t s_t`, as that by the gain is `sum_t x_t a_t`. Legend, layouts and names as there.
"""

# Tuples grow in loops that the compiler unrolls; it knows no starred elements.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the EMA's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

from mega_scale.ops.ema.walk_kernels import averages_of, give, kept, places, products, read, take, zeros


@triton.jit
def _receded(
    adjoint, slopes, of_output, ends, end_slopes, d_output, next_output, q, out, weights, N: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """One token back: adjoints and the input's gradient of this tile, ends of the next one's segments."""
    adjoints, new_slopes, outputs, next_ends, next_slopes = (), (), (), (), ()
    d_token = tl.zeros_like(d_output)
    for n in tl.static_range(N):
        if LAST:
            a = adjoint[n] * q[n] + out[n] * d_output
            outputs = outputs + (of_output[n] * q[n] + d_output,)
        else:
            a = adjoint[n] * q[n] + d_output
        d_token += a * weights[n]
        adjoints = adjoints + (a,)
        new_slopes = new_slopes + (slopes[n] * q[n] + adjoint[n],)
        next_slopes = next_slopes + (end_slopes[n] * q[n] + ends[n],)
        next_ends = next_ends + (ends[n] * q[n] + next_output,)
    return adjoints, new_slopes, outputs, next_ends, next_slopes, d_token


@triton.jit
def _added(
    sums, slope_sums, output_sums, adjoint, slopes, of_output, token, N: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """Sums of a token times what came back to it."""
    new_sums, new_slope_sums, new_output_sums = (), (), ()
    for n in tl.static_range(N):
        new_sums = new_sums + (sums[n] + adjoint[n] * token,)
        new_slope_sums = new_slope_sums + (slope_sums[n] + slopes[n] * token,)
        if LAST:
            new_output_sums = new_output_sums + (output_sums[n] + of_output[n] * token,)
    return new_sums, new_slope_sums, new_output_sums


@triton.jit
def _with_rests(values, out, rests, N: tl.constexpr):
    """Adjoints of outputs and of the end together."""
    found = ()
    for n in tl.static_range(N):
        found = found + (values[n] * out[n] + rests[n],)
    return found


@triton.jit
def _store_sums(sums, place, D, there, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(place + n * D, tl.sum(sums[n], 0, keep_dims=True), mask=there)


@triton.jit
def _faded(values, slopes, exponent, passed, TOKENS: tl.constexpr):
    """What is left of adjoints and their slopes behind a segment, where they get through."""
    values, slopes = tl.where(passed, values, 0.0), tl.where(passed, slopes, 0.0)
    whole = tl.exp(TOKENS * exponent)
    return values * whole, slopes * whole + values * (TOKENS * tl.exp((TOKENS - 1) * exponent))


@triton.jit
def _joined(
    carry, carry_slope, rest, rest_slope, exponent, shared, d_last, state_there, last, N: tl.constexpr,
    NP: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Put what comes back to a tile's segments in the place of what leaves them; returns what leaves the tile."""
    size: tl.constexpr = SEGMENTS * CHANNELS
    average, channel = tl.arange(0, NP)[:, None], tl.arange(0, CHANNELS)[None, :]
    joint = shared + average * size + channel
    there = (average < N) & (channel < CHANNELS)
    # All before the first store: several threads may hold the same average, and read what one of them overwrites.
    joint += (SEGMENTS - 1) * CHANNELS
    ends = take(joint, -CHANNELS, there, SEGMENTS)
    end_slopes = take(joint + N * size, -CHANNELS, there, SEGMENTS)
    passes = ()
    if DOCUMENTS:
        place = shared + (4 * N if LAST else 2 * N) * size + (SEGMENTS - 1) * CHANNELS + 0 * average + channel
        passes = take(place, -CHANNELS, True, SEGMENTS)
    tl.debug_barrier()
    from_last = carry
    if LAST:
        from_last = tl.load(d_last, mask=state_there, other=0.0)
    for back in tl.static_range(SEGMENTS):
        at = joint - back * CHANNELS
        tl.store(at, carry, mask=there)
        tl.store(at + N * size, carry_slope, mask=there)
        passed = there
        if DOCUMENTS:
            passed = passes[back] != 0
        carry, carry_slope = _faded(carry, carry_slope, exponent, passed, TOKENS)
        carry, carry_slope = carry + ends[back], carry_slope + end_slopes[back]
        if LAST:
            tl.store(at + 2 * N * size, rest, mask=there)
            tl.store(at + 3 * N * size, rest_slope, mask=there)
            rest, rest_slope = _faded(rest, rest_slope, exponent, passed, TOKENS)
            rest += tl.where(SEGMENTS - 1 - back == last, from_last, 0.0)
    return carry, carry_slope, rest, rest_slope


@triton.jit
def gradients_kernel(  # noqa: PLR0915 (a walk from its end to its beginning)
    x, dy, decay, log_decay, gain, projection, retain, d_last, scratch, dx, by_adjoint, by_slope, by_output, entered,
    L, D, TILES,
    N: tl.constexpr, NP: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Input gradients dx, and sums over each sequence's tokens x, (B, N, D).

    With LAST, `d_last` is the gradient by `last_before`, adjoints are those above, and sums are of x times adjoints
    (`by_adjoint`), times their slopes (`by_slope`), and times adjoints of outputs alone without the projection
    (`by_output`). Without, adjoints lack the projection, and there is no `by_output`.

    `entered` (4 with LAST, else 2; B, N, D): what reaches the token before the first, but for one decay: adjoints of
    outputs alone without the projection, their slopes, with LAST those of `d_last` and theirs. As many numbers each
    segment and channel has in `scratch`, and one.
    """
    size: tl.constexpr = SEGMENTS * CHANNELS
    kinds: tl.constexpr = 4 if LAST else 2
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    own = tl.arange(0, SEGMENTS)[:, None]
    q = averages_of(decay, channel, D, N, SEGMENTS)
    weights = averages_of(gain, channel, D, N, SEGMENTS)
    out = averages_of(projection, channel, D, N, SEGMENTS)
    if not LAST:
        weights = products(weights, out, N)

    shared, place, state_at, state_there, exponent = places(
        scratch, log_decay, D, kinds * N + 1, N, NP, SEGMENTS, CHANNELS
    )  # fmt: skip
    carry, carry_slope = tl.zeros((NP, CHANNELS), tl.float32), tl.zeros((NP, CHANNELS), tl.float32)
    rest, rest_slope = tl.zeros((NP, CHANNELS), tl.float32), tl.zeros((NP, CHANNELS), tl.float32)

    more: tl.constexpr = N if LAST else 0
    adjoint, slopes, of_output = (
        zeros(N, SEGMENTS, CHANNELS),
        zeros(N, SEGMENTS, CHANNELS),
        zeros(more, SEGMENTS, CHANNELS),
    )
    sums, slope_sums, output_sums = adjoint, slopes, of_output
    # Tile TILES has no tokens: its loop finds what leaves the last tile's segments.
    for step in range(TILES + 1):
        tile = TILES - step
        first = tile * (SEGMENTS * TOKENS) + own * TOKENS
        before = first - SEGMENTS * TOKENS
        here = (sequence * L + first) * D + channel
        further = (sequence * L + before) * D + channel
        ends, end_slopes = zeros(N, SEGMENTS, CHANNELS), zeros(N, SEGMENTS, CHANNELS)
        passes = tl.full((SEGMENTS, CHANNELS), 1.0, tl.float32)
        for back in range(0, TOKENS, UNROLL):
            t = TOKENS - 1 - back
            tokens = read(x + here + t * D, D, first + t, L, channel < D, 0.0, UNROLL, -1)
            d_outputs = read(dy + here + t * D, D, first + t, L, channel < D, 0.0, UNROLL, -1)
            there = (channel < D) & (tile > 0)
            next_outputs = read(dy + further + t * D, D, before + t, L, there, 0.0, UNROLL, -1)
            retained, next_retained = (), ()
            if DOCUMENTS:
                # A document that begins at the next token keeps its gradients from this one.
                row = retain + sequence * L + t + 1
                retained = read(row + first, 1, first + t + 1, L, True, 1.0, UNROLL, -1)
                next_retained = read(row + before, 1, before + t + 1, L, tile > 0, 1.0, UNROLL, -1)
            for u in tl.static_range(UNROLL):
                if DOCUMENTS:
                    adjoint, slopes = kept(adjoint, retained[u], N), kept(slopes, retained[u], N)
                    of_output = kept(of_output, retained[u], more)
                    ends, end_slopes = kept(ends, next_retained[u], N), kept(end_slopes, next_retained[u], N)
                    passes = passes * next_retained[u]
                adjoint, slopes, of_output, ends, end_slopes, d_token = _receded(
                    adjoint, slopes, of_output, ends, end_slopes, d_outputs[u].to(tl.float32),
                    next_outputs[u].to(tl.float32), q, out, weights, N, LAST,
                )  # fmt: skip
                sums, slope_sums, output_sums = _added(
                    sums, slope_sums, output_sums, adjoint, slopes, of_output, tokens[u].to(tl.float32), N, LAST
                )
                real = (channel < D) & (first + t - u < L)
                tl.store(dx + here + (t - u) * D, d_token.to(dx.dtype.element_ty), mask=real)

        give(ends, place, size, N)
        give(end_slopes, place + N * size, size, N)
        if DOCUMENTS:
            tl.store(place + kinds * N * size, passes)
        tl.debug_barrier()
        carry, carry_slope, rest, rest_slope = _joined(
            carry, carry_slope, rest, rest_slope, exponent, shared, d_last + state_at, state_there,
            (L - 1) // TOKENS - (tile - 1) * SEGMENTS, N, NP, SEGMENTS, TOKENS, CHANNELS, LAST, DOCUMENTS,
        )  # fmt: skip
        tl.debug_barrier()
        adjoint, slopes = take(place, size, True, N), take(place + N * size, size, True, N)
        if LAST:
            of_output = adjoint
            adjoint = _with_rests(adjoint, out, take(place + 2 * N * size, size, True, N), N)
            slopes = _with_rests(slopes, out, take(place + 3 * N * size, size, True, N), N)
        tl.debug_barrier()
        # The first tile's segments have just been joined.
        found = state_there & (tile == 1)
        kind = tl.num_programs(0).to(tl.int64) * N * D
        tl.store(entered + state_at, carry, mask=found)
        tl.store(entered + kind + state_at, carry_slope, mask=found)
        if LAST:
            tl.store(entered + 2 * kind + state_at, rest, mask=found)
            tl.store(entered + 3 * kind + state_at, rest_slope, mask=found)
    sums_at = sequence * N * D + channel
    _store_sums(sums, by_adjoint + sums_at, D, channel < D, N)
    _store_sums(slope_sums, by_slope + sums_at, D, channel < D, N)
    _store_sums(output_sums, by_output + sums_at, D, channel < D, more)
