"""The damped EMA by Triton kernels that walk from token to token with states in registers, and read tokens once.

A program owns some channels of one sequence. It goes over tiles of tokens; a tile is cut into segments that lie side by
side in the program's threads, and a thread holds the N states of one channel in one segment. While outputs of a tile
are computed, the same loop finds how the segments of the next tile would end, had they begun at zero. At the end of a
tile those ends are joined, from one segment to the next, by threads that hold one average of one channel each; what
travels between the two kinds of threads goes through `scratch`, which stays in the caches of a multiprocessor.

The backward pass is the same walk from the last token. With adjoints `a_t = q a_{t+1} + projection dy_t`, what the
input's gradient needs is there as it is read. No state of the forward pass is needed for the gradient by q either: with
the slopes `s_t = da_t/dq = q s_{t+1} + a_{t+1}` it is `gain sum_t x_t s_t`, as that by the gain is `sum_t x_t a_t`.

Legend: B batch, L length, D channels, N moving averages per channel; SEGMENTS of TOKENS tokens make a tile, CHANNELS
are what one program holds, NP is N padded. Program (i, j) holds the i-th sequence and the j-th group of channels.
Tuples hold N tensors (SEGMENTS, CHANNELS), an average each, or UNROLL, a token each.

    x, y, dy, dx     (B, L, D), contiguous, any floating dtype up to fp32
    decay, log_decay, gain, projection   (N, D): fp32
    retain           (B, L) fp32: 0 where a document begins and the state is forgotten, else 1; with DOCUMENTS only
    states           (B, N, D) fp32
    scratch          fp32, N numbers a segment and channel, and one for whether a state gets through
"""

# Tuples grow in loops that the compiler unrolls; it knows no starred elements.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.ops.ema.reference import EmaCoefficients
from mega_scale.ops.ema.triton_blocks import check_inputs
from mega_scale.ops.modes import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the EMA's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

MOST_AVERAGES = 16  # more do not fit the registers of a thread


class Walk(NamedTuple):
    """What a kernel is compiled for; all powers of two."""

    segments: int  # of a tile, side by side in a program's threads
    tokens: int  # of a segment
    unroll: int  # tokens that are read at once; half as many where registers hold documents' borders, or states
    channels: int  # of a program
    warps: int  # so many that each thread has one segment and channel

    def constants(self, averages: int, documents: bool, states: bool) -> dict[str, int]:
        """The kernels' own names for them, with N as it is and padded.

        Args:
            averages: N.
            documents: whether there are borders.
            states: whether a state is given, or the gradient by one.
        """
        unroll = max(1, self.unroll // (1 + documents) // (1 + states))
        return {
            "N": averages, "NP": 1 << (averages - 1).bit_length(), "SEGMENTS": self.segments, "TOKENS": self.tokens,
            "UNROLL": unroll, "CHANNELS": self.channels, "DOCUMENTS": documents,
        }  # fmt: skip


# Guesses until they are measured. The backward pass holds more than 128 numbers a thread, of which there can be 65,536.
OUTPUTS = Walk(segments=16, tokens=64, unroll=8, channels=32, warps=16)
GRADIENTS = Walk(segments=8, tokens=64, unroll=4, channels=32, warps=8)


def walk_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None,
    resets: Tensor | None = None,
    walks: tuple[Walk, Walk] = (OUTPUTS, GRADIENTS),
) -> tuple[Tensor, Tensor]:
    """The recurrence of `recurrent_ema` by Triton kernels, for a GPU (or anywhere, interpreted: TRITON_INTERPRET=1).

    Forward keeps x, and backward needs no states; either reads and writes tokens once.

    Args:
        x: (B, L, D), bf16, fp16 or fp32.
        coefficients: (D, N) fp32 each, N up to 16.
        state: h before the first token, (B, D, N) fp32; none means zero.
        resets: (B, L) bool, true where a document begins.
        walks: of the forward and of the backward kernel, with segments of equal length.

    Returns:
        y (B, L, D) in the dtype of x, and h after the last token (B, D, N) fp32.

    Raises:
        ValueError: x is not on a GPU and kernels are not interpreted, a dtype has no kernel, or N is too large.
    """
    log_decay = coefficients.log_decay
    check_inputs("triton_walk", x, log_decay)
    if log_decay.shape[1] > MOST_AVERAGES:
        raise ValueError(
            f"impl='triton_walk' holds up to {MOST_AVERAGES} moving averages per channel, not {log_decay.shape[1]}: "
            "use impl='triton'"
        )
    tokens, length = walks[0].tokens, x.shape[1]
    x = x.contiguous()
    retain = None if resets is None else (~resets).float()
    by_average = [c.mT.contiguous() for c in coefficients]
    y, last_before = _WalkFunction.apply(
        x, *by_average, None if state is None else state.mT.contiguous(), retain, walks
    )

    # The last segment may be part full: its end state follows from its own tokens and the state before it.
    filled = (length - 1) % tokens + 1
    tail = x[:, -filled:].to(log_decay.dtype)
    if resets is not None:
        alive = resets[:, -filled:].flip(1).cumsum(1).flip(1)  # borders at or behind a token
        tail = tail.masked_fill((alive > resets[:, -filled:])[..., None], 0)
        last_before = last_before.masked_fill((alive[:, :1] > 0)[..., None], 0)
    steps = torch.arange(filled - 1, -1, -1, device=x.device, dtype=log_decay.dtype)
    into = torch.exp(log_decay[:, None] * steps[:, None]) * coefficients.gain[:, None]
    fading = torch.exp(log_decay * (filled - 1))
    return y, fading * last_before.mT + torch.einsum("dcn,bcd->bdn", into, tail)


class _WalkFunction(torch.autograd.Function):
    """Outputs, and the state before the last segment's tokens, faded once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_decay: Tensor,
        gain: Tensor,
        projection: Tensor,
        state: Tensor | None,
        retain: Tensor | None,
        walks: tuple[Walk, Walk],
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, D), coefficients (N, D), state (B, N, D), retain (B, L)."""
        ctx.set_materialize_grads(False)
        y, last_before = torch.empty_like(x), log_decay.new_empty(len(x), *log_decay.shape)
        run = _Run(x, log_decay, walks[0], 1, retain is not None, state is not None)
        run(
            walk_outputs_kernel, x, log_decay.exp(), log_decay, gain, projection, gain if state is None else state,
            gain if retain is None else retain, run.scratch, y, last_before, INITIAL=state is not None,
        )  # fmt: skip
        if state is None:
            last_before *= gain
        ctx.save_for_backward(x, log_decay, gain, projection, state, retain)
        ctx.walk = walks[1]
        return y, last_before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        x, log_decay, gain, projection, state, retain = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        ends = d_last is not None
        d_last = gain if d_last is None else d_last.contiguous()  # what is not read is any tensor
        decay, dx = log_decay.exp(), torch.empty_like(x)
        sums = log_decay.new_empty(3 if ends else 2, len(x), *log_decay.shape)
        entered = log_decay.new_empty(4 if ends else 2, len(x), *log_decay.shape)
        run = _Run(x, log_decay, ctx.walk, len(entered), retain is not None, ends)
        run(
            walk_gradients_kernel, x, dy, decay, log_decay, gain, projection, gain if retain is None else retain,
            d_last, run.scratch, dx, sums[0], sums[1], sums[-1], entered, LAST=ends,
        )  # fmt: skip
        # Summed here and not by atomic additions, whose order, and so whose last bits, change from run to run.
        adjoint, slope, output = sums[0].sum(0), sums[1].sum(0), sums[-1].sum(0)
        if ends:
            d_gain, d_projection, d_decay = adjoint, gain * output, gain * slope
        else:
            d_gain, d_projection, d_decay = projection * adjoint, gain * adjoint, gain * projection * slope
        d_state = None
        if state is not None:
            output, slope = entered[0], projection * entered[1] + (entered[3] if ends else 0)
            adjoint = projection * output + (entered[2] if ends else 0)
            if retain is not None:
                lost = retain[:, :1, None] == 0
                # Neither side reaches the other, be it infinite.
                state, output, slope, adjoint = (t.masked_fill(lost, 0) for t in (state, output, slope, adjoint))
            d_state = decay * adjoint
            d_projection = d_projection + (state * decay * output).sum(0)
            d_decay = d_decay + (state * (adjoint + decay * slope)).sum(0)
        return dx, d_decay * decay, d_gain, d_projection, d_state, None, None


class _Run:
    """Starts a kernel over the sequences and groups of channels of x, with memory for what its threads exchange."""

    def __init__(self, x: Tensor, log_decay: Tensor, walk: Walk, kinds: int, documents: bool, states: bool) -> None:
        batch, length, channels = x.shape
        averages = len(log_decay)
        self.grid = (batch, -(-channels // walk.channels))
        slots = (kinds * averages + 1) * walk.segments * walk.channels
        self.scratch = log_decay.new_empty(self.grid[0] * self.grid[1] * slots)
        self._constants = {**walk.constants(averages, documents, states), "num_warps": walk.warps}
        self._sizes = (length, channels, -(-length // (walk.segments * walk.tokens)))
        self._device = x

    def __call__(self, kernel: Any, *arguments: Tensor, **constants: Any) -> None:
        with torch.cuda.device_of(self._device):
            kernel[self.grid](*arguments, *self._sizes, **self._constants, **constants)


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
def walk_outputs_kernel(
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
def _joined_back(
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
def walk_gradients_kernel(  # noqa: PLR0915 (a walk from its end to its beginning)
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
    adjoint, slopes = zeros(N, SEGMENTS, CHANNELS), zeros(N, SEGMENTS, CHANNELS)
    of_output = zeros(more, SEGMENTS, CHANNELS)
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
        carry, carry_slope, rest, rest_slope = _joined_back(
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
