"""The damped EMA's outputs by a Triton kernel; legends are in `triton_kernels.py`."""

# Tuples grow in loops that the compiler unrolls; it knows no starred elements.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the EMA's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

from mega_scale.ops.ema.triton_kernels import (
    AHEAD,
    ask_for,
    beside_of,
    cells_of,
    channels_of,
    has_token,
    in_parts,
    load_parts,
    load_tokens,
    most_segments,
    numbers_of,
    part_of,
    parts_of,
    parts_where,
    places_of,
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
def _join(
    ends, carry, fade, scratch, count, begins, DOCUMENTS: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """The states that enter the segments of a tile (CH, SEG, NP), of which `count` exist, and `parts_of` the state that
    leaves it; a segment leaves `fade` of a state, and adds what is in `ends`. `begins` has bits of those with which
    documents begin."""
    SEG: tl.constexpr = ends.shape[1]
    size: tl.constexpr = ends.shape[0] * ends.shape[2]
    thin, wide = places_of(scratch, ends, COMPLEX)
    tl.debug_barrier()
    tl.store(wide, ends)
    tl.debug_barrier()
    # All before the first store: several threads may hold the same number, and read what one of them overwrites.
    own = ()
    for s in tl.static_range(SEG):
        own = own + (load_parts(thin + s * size, COMPLEX),)
    tl.debug_barrier()
    for s in tl.static_range(SEG):
        entering = unless_begun(begins, s, carry, DOCUMENTS)
        store_parts(thin + s * size, entering)
        carry = parts_where(s < count, plus_times_parts(own[s], entering, fade, COMPLEX), carry)
    tl.debug_barrier()
    return tl.load(wide), carry


@triton.jit
def outputs_kernel(  # noqa: PLR0915 (a row's head, then its tiles)
    x, log_decay, gain, projection, angle, document, starts, omega, state, parts, y, end, scratch,
    L, D, HEAD, STEPS, TILES, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, SEG: tl.constexpr, CH: tl.constexpr,
    ROOM: tl.constexpr, INITIAL: tl.constexpr, DOCUMENTS: tl.constexpr, OMEGA: tl.constexpr, OUTPUTS: tl.constexpr,
    COMPLEX: tl.constexpr,
):  # fmt: skip
    """With OUTPUTS y, to which OMEGA adds omega (D,) times x, and the states after rows, `end`; else those after
    `parts` (B, SPLITS, D, N), begun at zero."""
    NUMBER: tl.constexpr = gain.dtype.element_ty
    WIDE: tl.constexpr = x.dtype.element_ty != tl.bfloat16 or gain.dtype.element_ty == tl.float64
    BYTES: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    row, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    t, tokens = tl.arange(0, T), STEPS * T
    x, y, document = x + row * L * D, y + row * L * D, document + row * L
    starts += row * most_segments(L, HEAD, tokens)
    scratch += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * ROOM
    channel, at, there, decay, weight, enters, _, out = channels_of(
        log_decay, gain, projection, angle, tl.program_id(1) * CH, D, N, NP, CH, COMPLEX
    )
    into = in_parts(weight[:, None, :] * powers_of(decay, T - 1 - t, COMPLEX), WIDE)
    from_state = in_parts(tl.permute(weights_of(decay, out, t + 1, COMPLEX), (0, 2, 1)), WIDE)
    beside = beside_of(omega, tl.program_id(1) * CH, D, NUMBER, CH, OMEGA)
    toeplitz = in_parts(toeplitz_of(decay, out, enters, beside, scratch, T, False, COMPLEX), WIDE)
    fade = power_of(decay[0], decay[1], decay[2], T, COMPLEX)[:, None, :]
    segment_fade = parts_of(power_of(decay[0], decay[1], decay[2], tokens, COMPLEX), COMPLEX)

    carry = tl.load(state + row * D * N + at, mask=there & INITIAL, other=0.0)
    for part in range(split if OUTPUTS else 0):
        size = TILES * SEG * tokens
        first, stop = tl.where(part == 0, 0, HEAD + part * size), HEAD + (part + 1) * size
        left = times(carry, power_of(decay[0], decay[1], decay[2], stop - first, COMPLEX), COMPLEX)
        carry = tl.where(same_document(document, first, stop, DOCUMENTS), left, 0.0)
        carry += tl.load(parts + (row * SPLITS + part) * D * N + at, mask=there, other=0.0)
    read = tl.sum(weights_of(decay, out, tl.zeros((1,), tl.int32), COMPLEX), 1)
    for i in range(tl.where(split == 0, HEAD, 0)):
        token = tl.load(x + i * D + channel, mask=channel < D, other=0.0).to(NUMBER)
        left = times(carry, power_of(decay[0], decay[1], decay[2], 1, COMPLEX), COMPLEX)
        carry = tl.where(same_document(document, i, i + 1, DOCUMENTS), left, 0.0) + enters * token[:, None]
        if OUTPUTS:
            found = rounded(tl.sum(carry * read, 1) + beside * token, y)
            tl.store(y + i * D + channel, found, mask=channel < D)

    carry = parts_of(carry, COMPLEX)
    begin, stop = part_of(document, split, L, HEAD, tokens, TILES, SEG, DOCUMENTS)
    for number in range(begin, stop, SEG):
        first, cell, own_cells, begins = cells_of(starts, number, stop, HEAD, tokens, SEG, DOCUMENTS)
        steps = steps_of(own_cells, T, False, DOCUMENTS)
        of_tokens = (cell[:, None, None] + t[None, :, None]) * D
        place = of_tokens + channel[None, None, :]
        rows = (tl.where(own_cells[1] > 0, cell, 0)[:, None] + t[None, :]) * D * BYTES
        states = tl.zeros((CH, SEG, NP), NUMBER)
        for step in range(STEPS):
            mask = has_token(steps, step) & (channel < D)[None, None, :]
            own = load_tokens(x + (first + step * T).to(tl.int64) * D + place, mask, WIDE, NUMBER)
            states = product(own, into, times(states, fade, COMPLEX))
            if COMPLEX or NP > T:  # others wait for memory's speed, not for its answers
                # Of a tile's next steps, or of the next tile, if it lies as this one, which with documents is a guess.
                later = first + (step + AHEAD) * T
                beyond = tl.minimum(later + (SEG - 1) * tokens, tl.maximum(L - SEG * tokens, 0))
                later = tl.where(STEPS - step > AHEAD, later, beyond).to(tl.int64) * D + tl.program_id(1) * CH
                ask_for(x + later, rows)
        states, carry = _join(states, carry, segment_fade, scratch, stop - number, begins, DOCUMENTS, COMPLEX)
        for step in range(STEPS if OUTPUTS else 0):
            block, mask = (first + step * T).to(tl.int64) * D, has_token(steps, step) & (channel < D)[None, None, :]
            own = load_tokens(x + block + place, mask, WIDE, NUMBER)
            found = product(states, from_state, tl.zeros((CH, SEG, T), NUMBER))
            found = product(own, toeplitz, found)
            tl.store(y + block + place, rounded(tl.permute(found, (1, 2, 0)), y), mask=mask)
            states = product(own, into, times(states, fade, COMPLEX))
    carry = numbers_of(carry, COMPLEX)
    if not OUTPUTS:
        tl.store(parts + (row * SPLITS + split) * D * N + at, carry, mask=there)
    elif split == SPLITS - 1:
        tl.store(end + row * D * N + at, carry, mask=there)
