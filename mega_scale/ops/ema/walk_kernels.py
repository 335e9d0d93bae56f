"""A Triton kernel of the damped EMA that walks from token to token with states in registers, and reads tokens once.

A program owns some channels of one sequence. It goes over tiles of tokens; a tile is cut into segments that lie side by
side in the program's threads, and a thread holds the N states of one channel in one segment. While outputs of a tile
are computed, the same loop finds how the segments of the next tile would end, had they begun at zero. At the end of a
tile those ends are joined, from one segment to the next, by threads that hold one average of one channel each; what
travels between the two kinds of threads goes through `scratch`, which stays in the caches of a multiprocessor.

Legend: D channels, N moving averages per channel; SEGMENTS of TOKENS tokens make a tile, CHANNELS are what one program
holds, NP is N padded. Program (i, j) holds the i-th sequence and the j-th group of channels. Tuples hold N tensors
(SEGMENTS, CHANNELS), an average each, or UNROLL, a token each.

    x, y             (B, L, D), contiguous, any floating dtype up to fp32
    decay, log_decay, gain, projection   (N, D): fp32
    retain           (B, L) fp32: 0 where a document begins and the state is forgotten, else 1; with DOCUMENTS only
    states           (B, N, D) fp32
    scratch          fp32, N numbers a segment and channel, and one for whether a state gets through
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


@triton.jit
def averages_of(pointer, channel, D, N: tl.constexpr, SEGMENTS: tl.constexpr):
    """N numbers a channel, alike in all segments."""
    at = channel + 0 * tl.arange(0, SEGMENTS)[:, None]
    found = ()
    for n in tl.static_range(N):
        found = found + (tl.load(pointer + n * D + at, mask=at < D, other=0.0),)
    return found


@triton.jit
def zeros(N: tl.constexpr, SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr):
    """N times zero."""
    found = ()
    for _ in tl.static_range(N):
        found = found + (tl.zeros((SEGMENTS, CHANNELS), tl.float32),)
    return found


@triton.jit
def products(a, b, N: tl.constexpr):
    """Of numbers with numbers."""
    found = ()
    for n in tl.static_range(N):
        found = found + (a[n] * b[n],)
    return found


@triton.jit
def kept(states, retained, N: tl.constexpr):
    """States where `retained` is not 0; else they are forgotten, whatever they are: infinity times zero would stay."""
    found = ()
    for n in tl.static_range(N):
        found = found + (tl.where(retained != 0, states[n], 0.0),)
    return found


@triton.jit
def read(place, stride, token, L, there, other: tl.constexpr, UNROLL: tl.constexpr, STEP: tl.constexpr):
    """What lies at `place` for `token` and those after it, or with STEP -1 before it; `other` where there is none."""
    found = ()
    for u in tl.static_range(UNROLL):
        real = there & (token + STEP * u < L)
        found = found + (tl.load(place + STEP * u * stride, mask=real, other=other),)
    return found


@triton.jit
def places(
    scratch, log_decay, D, numbers, N: tl.constexpr, NP: tl.constexpr, SEGMENTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Where a program's threads meet, and the place of each there, `numbers` for a segment and channel; and, for the
    threads that join, which hold an average and a channel each: the offsets of states, which there are, log decays."""
    sequence = tl.program_id(0).to(tl.int64)
    own_channel = tl.arange(0, CHANNELS)[None, :]
    channel = tl.program_id(1) * CHANNELS + own_channel
    average = tl.arange(0, NP)[:, None]
    shared = scratch + (sequence * tl.num_programs(1) + tl.program_id(1)) * (numbers * SEGMENTS * CHANNELS)
    place = shared + tl.arange(0, SEGMENTS)[:, None] * CHANNELS + own_channel
    there = (average < N) & (channel < D)
    exponent = tl.load(log_decay + average * D + channel, mask=there, other=0.0)
    return shared, place, sequence * N * D + average * D + channel, there, exponent


@triton.jit
def give(states, place, size, N: tl.constexpr):
    """Store states where other threads look for them."""
    for n in tl.static_range(N):
        tl.store(place + n * size, states[n])


@triton.jit
def take(place, size, there, N: tl.constexpr):
    """Load states that other threads have stored."""
    found = ()
    for n in tl.static_range(N):
        found = found + (tl.load(place + n * size, mask=there, other=0.0),)
    return found


@triton.jit
def _advanced(state, ends, token, next_token, q, into, out, N: tl.constexpr, INITIAL: tl.constexpr):
    """One token further: states and output of this tile, ends of the next one's segments."""
    states, next_ends = (), ()
    output = tl.zeros_like(token)
    for n in tl.static_range(N):
        if INITIAL:
            h = state[n] * q[n] + into[n] * token
            next_ends = next_ends + (ends[n] * q[n] + into[n] * next_token,)
        else:
            h = state[n] * q[n] + token
            next_ends = next_ends + (ends[n] * q[n] + next_token,)
        output += h * out[n]
        states = states + (h,)
    return states, next_ends, output


@triton.jit
def _joined(
    carry, exponent, shared, last_before, state_there, last, N: tl.constexpr, NP: tl.constexpr, SEGMENTS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Put the states that enter a tile's segments in the place of their ends; returns what leaves the tile."""
    size: tl.constexpr = SEGMENTS * CHANNELS
    average, channel = tl.arange(0, NP)[:, None], tl.arange(0, CHANNELS)[None, :]
    joint = shared + average * size + channel
    there = (average < N) & (channel < CHANNELS)
    # All before the first store: several threads may hold the same average, and read what one of them overwrites.
    ends = take(joint, CHANNELS, there, SEGMENTS)
    passes = ()
    if DOCUMENTS:
        passes = take(shared + N * size + 0 * average + channel, CHANNELS, True, SEGMENTS)
    tl.debug_barrier()
    for s in tl.static_range(SEGMENTS):
        tl.store(joint + s * CHANNELS, carry, mask=there)
        tl.store(last_before, carry * tl.exp(exponent), mask=state_there & (s == last))
        if DOCUMENTS:
            carry = tl.where(passes[s] != 0, carry, 0.0)
        carry = carry * tl.exp(TOKENS * exponent) + ends[s]
    return carry


@triton.jit
def outputs_kernel(
    x, decay, log_decay, gain, projection, initial, retain, scratch, y, last_before, L, D, TILES,
    N: tl.constexpr, NP: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
    CHANNELS: tl.constexpr, INITIAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The outputs y; and the state before the last segment that has a token, faded once, `last_before`.

    With INITIAL the sequence begins with `initial`, and states are those of the recurrence. Else they lack the gain,
    which is part of the weights of outputs then.
    """
    size: tl.constexpr = SEGMENTS * CHANNELS
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    own = tl.arange(0, SEGMENTS)[:, None]
    q = averages_of(decay, channel, D, N, SEGMENTS)
    into = averages_of(gain, channel, D, N, SEGMENTS)
    out = averages_of(projection, channel, D, N, SEGMENTS)
    if not INITIAL:
        out = products(out, into, N)

    shared, place, state_at, state_there, exponent = places(
        scratch, log_decay, D, N + 1, N, NP, SEGMENTS, CHANNELS
    )  # fmt: skip
    carry = tl.zeros((NP, CHANNELS), tl.float32)
    if INITIAL:
        carry = tl.load(initial + state_at, mask=state_there, other=0.0)

    state = zeros(N, SEGMENTS, CHANNELS)
    # Tile -1 has no outputs: its loop finds the ends of the first tile's segments.
    for tile in range(-1, TILES):
        first = tile * (SEGMENTS * TOKENS) + own * TOKENS
        behind = first + SEGMENTS * TOKENS
        here = (sequence * L + first) * D + channel
        further = (sequence * L + behind) * D + channel
        ends = zeros(N, SEGMENTS, CHANNELS)
        passes = tl.full((SEGMENTS, CHANNELS), 1.0, tl.float32)
        for t in range(0, TOKENS, UNROLL):
            there = (channel < D) & (tile >= 0)
            tokens = read(x + here + t * D, D, first + t, L, there, 0.0, UNROLL, 1)
            next_tokens = read(x + further + t * D, D, behind + t, L, channel < D, 0.0, UNROLL, 1)
            if DOCUMENTS:
                row = retain + sequence * L + t
                retained = read(row + first, 1, first + t, L, tile >= 0, 1.0, UNROLL, 1)
                next_retained = read(row + behind, 1, behind + t, L, True, 1.0, UNROLL, 1)
            for u in tl.static_range(UNROLL):
                if DOCUMENTS:
                    state, ends = kept(state, retained[u], N), kept(ends, next_retained[u], N)
                    passes = passes * next_retained[u]
                token, next_token = tokens[u].to(tl.float32), next_tokens[u].to(tl.float32)
                state, ends, output = _advanced(state, ends, token, next_token, q, into, out, N, INITIAL)
                real = there & (first + t + u < L)
                tl.store(y + here + (t + u) * D, output.to(y.dtype.element_ty), mask=real)

        give(ends, place, size, N)
        if DOCUMENTS:
            tl.store(place + N * size, passes)
        tl.debug_barrier()
        carry = _joined(
            carry, exponent, shared, last_before + state_at, state_there, (L - 1) // TOKENS - (tile + 1) * SEGMENTS,
            N, NP, SEGMENTS, TOKENS, CHANNELS, DOCUMENTS,
        )  # fmt: skip
        tl.debug_barrier()
        state = take(place, size, True, N)
        tl.debug_barrier()
