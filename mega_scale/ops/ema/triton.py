"""The damped EMA by Triton kernels: one pass over memory forward and backward, products on matrix units.

A program owns CH channels of a row, or of one of its SPLITS parts. It goes over tiles of SEG segments, the rows of its
products; a segment is STEPS blocks of T tokens. q does not depend on the input, so all blocks of a channel share their
matrices: tokens X and the state h before them give outputs `X toeplitz + h out`, and the next state `q^T h + X into`.
A tile is read twice, the second time from a cache: first for what each segment adds to the state, which is joined from
segment to segment, and then for outputs, segments side by side. The first HEAD tokens of a row, which fill no segment,
go one by one, so that all states, first and last ones too, lie between whole segments.

The backward pass does the same from the last tile, and needs no states of the forward pass. With adjoints
`a_t = dy_t + q a_{t+1}` and slopes `s_t = d a_t / d log q`, gradients are `projection sum x_t a_t` by gain, `gain sum
x_t a_t` by projection, `gain projection sum x_t s_t` by log q. Between tokens an adjoint is that of the state, q a_t.

Legend: B batch, L length, D channels, N moving averages per channel, NP those padded. x, y and their gradients are
contiguous (B, L, D), coefficients (D, N), states (B, D, N). `document` (B, L) counts the documents that have begun.
"""

# Tuples grow in loops that the compiler unrolls; it knows no starred elements.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import once_differentiable
from mega_scale.ops.ema.coefficients import EmaCoefficients, Fade

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the EMA's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
MOST_AVERAGES = 32


class Tile(NamedTuple):
    """Sizes of the kernels, powers of two: guesses until they are measured, that fit into registers."""

    segments: int = 16  # SEG: the rows that a matrix unit takes
    block: int = 16  # T
    steps: int = 4  # STEPS, at most: rows shorter than a tile have fewer
    channels: int = 16  # CH, at most: 32 bytes of bf16
    warps: int = 8
    splits: int | None = None  # SPLITS, at most; none: as many as keep a GPU busy

    def constants(self, averages: int, wide: bool, documents: bool, last: bool = False) -> dict[str, int]:
        """What kernels are compiled for: fewer channels where tokens are `wide`, or there is more to hold."""
        padded = max(self.block, 1 << (averages - 1).bit_length())
        more = (wide or documents or last) + (wide and documents and last) + (padded > 16)
        channels = max(self.channels >> more, 1)
        return {"N": averages, "NP": padded, "T": self.block, "SEG": self.segments, "CH": channels,
                "DOCUMENTS": documents, "num_warps": self.warps}  # fmt: skip


def gradient_flags(wide: bool, documents: bool, last: bool) -> list[dict[str, int]]:
    """The runs of `gradients_kernel`: two, without buffers, where registers do not hold everything at once."""
    if wide and (documents or last):
        return [{"LAST": last, "DX": dx, "SUMS": not dx, "num_stages": 1} for dx in (True, False)]
    return [{"LAST": last, "DX": True, "SUMS": True, "num_stages": 3}]


TILE = Tile()
OUTPUTS = {"OUTPUTS": True, "num_stages": 2}  # with more buffers registers spill


def triton_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Any,
    resets: Tensor | None = None,
    tile: Tile = TILE,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `recurrent_ema` by Triton kernels, for a GPU (or anywhere, interpreted: TRITON_INTERPRET=1).

    x (B, L, D) is bf16, fp16 or fp32, and all of its size that is kept for the backward pass; coefficients (D, N), N up
    to 32, and state (B, D, N) are fp32; resets (B, L) bool. A `Carry` with its last two arguments bound may stand for
    the state. Returns y (B, L, D) in the dtype of x, and h after the last token (B, D, N) fp32. Raises ValueError if x
    is not on a GPU and kernels are not interpreted, a dtype has no kernel, or N is too large.
    """
    rows = _Rows(x, coefficients[0], resets, tile)
    carry, state = (state, None) if callable(state) else (None, state)
    y, end = _Average.apply(rows, carry, state, x.contiguous(), *(c.contiguous() for c in coefficients[:3]))
    return y, end


class _Rows:
    """Rows like x (B, L, D): their documents, how they are cut, and what kernels compute of them.

    `parts` are states, or adjoints and slopes, at the ends of parts of rows, as if nothing came from other parts.
    """

    def __init__(self, x: Tensor, log_decay: Tensor, resets: Tensor | None, tile: Tile) -> None:
        self.wide = x.dtype != torch.bfloat16
        if not x.is_cuda and not INTERPRETED.value:
            raise ValueError(f"impl='triton' needs a GPU and x is on {x.device}: use impl='blocked'")
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or log_decay.dtype != torch.float32:
            raise ValueError(
                f"impl='triton' takes bf16, fp16 or fp32 inputs and fp32 coefficients, not {x.dtype} and "
                f"{log_decay.dtype}: use impl='blocked'"
            )
        self._tile, self._averages = tile, log_decay.shape[1]
        if self._averages > MOST_AVERAGES:
            raise ValueError(
                f"impl='triton' takes up to {MOST_AVERAGES} moving averages per channel, not {self._averages}: use "
                "impl='blocked'"
            )
        self.document = None if resets is None else resets.cumsum(1, dtype=torch.int32)
        batch, length, channels = x.shape
        steps = tile.steps
        while steps > 1 and steps * tile.block * tile.segments > length:
            steps //= 2
        segments, head = divmod(length, steps * tile.block)
        tiles = -(-segments // tile.segments)
        splits = tile.splits
        if splits is None:
            # Only where multiprocessors would idle, as parts are read once more, before.
            programs = batch * -(-channels // tile.constants(self._averages, self.wide, resets is not None)["CH"])
            units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
            splits = units // programs
        tiles = -(-tiles // max(1, min(splits, tiles)))
        self.splits = max(1, -(-segments // max(1, tiles * tile.segments)))
        self._sizes = (length, channels, head, steps, tiles, self.splits)

    def _run(self, kernel: Any, x: Tensor, coefficients: Any, *more: Tensor | None, **flags: int) -> None:
        documents = self.document is not None
        own = self._tile.constants(self._averages, self.wide, documents, bool(flags.get("LAST")))
        grid = (len(x) * self.splits, -(-x.shape[2] // own["CH"]))
        gain = coefficients[1]  # what a kernel does not read is any tensor
        given = [gain if t is None else t.contiguous() for t in (self.document, *more)]
        # What threads of a program exchange: two numbers a segment, channel and average.
        scratch = gain.new_empty(grid[0] * grid[1] * 2 * own["SEG"] * own["CH"] * own["NP"])
        with torch.cuda.device_of(x):
            kernel[grid](x.contiguous(), *coefficients, *given, scratch, *self._sizes, **own, **flags)

    def ends(self, x: Tensor, coefficients: Any) -> Tensor:
        """States after parts, (B, SPLITS, D, N)."""
        parts = coefficients[1].new_empty(len(x), self.splits, *coefficients[1].shape)
        self._run(outputs_kernel, x, coefficients, None, parts, x, None, INITIAL=False, OUTPUTS=False)
        return parts

    def joined(self, parts: Tensor, log_decay: Tensor, back: bool = False) -> Tensor:
        """States after rows, or if `back` adjoints before them, (B, D, N), from those of parts (B, SPLITS, D, N)."""
        if self.splits == 1:
            return parts[:, 0]
        length, _, head, steps, tiles, splits = self._sizes
        size = tiles * steps * self._tile.segments * self._tile.block
        inner = torch.arange(head + size, head + size * splits, size, device=parts.device)
        border = F.pad(inner, (1, 0)) if back else F.pad(inner, (0, 1), value=length)
        if self.document is not None:
            of_parts = self.document[:, (border - 1).clamp_min(0)]
            parts = parts.masked_fill((of_parts != (0 if back else self.document[:, -1:]))[..., None, None], 0)
        return (parts * torch.exp(log_decay * (border if back else length - border)[:, None, None])).sum(1)

    def outputs(
        self, x: Tensor, coefficients: Any, state: Tensor | None, parts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y, and the states after rows."""
        y, end = torch.empty_like(x), coefficients[1].new_empty(len(x), *coefficients[1].shape)
        self._run(outputs_kernel, x, coefficients, state, parts, y, end, INITIAL=state is not None, **OUTPUTS)
        return y, end

    def adjoints(self, dy: Tensor, coefficients: Any) -> Tensor:
        """Adjoints and slopes before parts, (2, B, SPLITS, D, N)."""
        parts = coefficients[1].new_empty(2, len(dy), self.splits, *coefficients[1].shape)
        flags = {"LAST": False, "DX": False, "SUMS": False}
        self._run(gradients_kernel, dy, coefficients, dy, None, parts, dy, None, None, **flags)
        return parts

    def gradients(
        self, x: Tensor, dy: Tensor, coefficients: Any, state: Tensor | None, d_end: Tensor | None,
        parts: Tensor | None, d_reached: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """By the state, x, log_decay, gain and projection; of `d_end`, only `d_reached` counts the state."""
        log_decay, gain, projection = coefficients
        last, d_state = d_end is not None, None
        dx, entered = torch.empty_like(x), gain.new_empty(2, len(x), *gain.shape)
        sums = gain.new_empty(3 if last else 2, len(x) * self.splits, *gain.shape)
        for flags in gradient_flags(self.wide, self.document is not None, last):
            self._run(gradients_kernel, dy, coefficients, x, d_end, parts, dx, sums, entered, **flags)
        # Summed here and not by atomic additions, whose order, and so whose last bits, change from run to run.
        adjoint, slope, *weighed = sums.sum(1)
        d_log_decay, d_projection = gain * slope, gain * adjoint
        if state is not None:
            if self.document is not None:  # a document that begins the row keeps the state out, be it infinite
                state = state.masked_fill((self.document[:, 0] > 0)[:, None, None], 0)
            d_state, d_slope = projection * entered[0], projection * entered[1]
            if d_reached is not None:
                reached = self.through(log_decay) * d_reached
                d_state, d_slope = d_state + reached, d_slope + x.shape[1] * reached
            d_projection = d_projection + (state * entered[0]).sum(0)
            d_log_decay = d_log_decay + (state * d_slope).sum(0)
        return d_state, dx, d_log_decay, weighed[0] if last else projection * adjoint, d_projection

    def through(self, log_decay: Tensor) -> Tensor:
        """What is left of a state after all tokens, (D, N) or (B, D, N)."""
        fade = torch.exp(log_decay * self._sizes[0])
        return fade if self.document is None else fade * (self.document[:, -1] == 0)[:, None, None]


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: _Rows, carry: Any, state: Tensor | None, x: Tensor, *coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.turn = rows, None
        parts: Any = rows.ends(x, coefficients) if carry is not None or rows.splits > 1 else None
        if carry is not None:
            state, ctx.turn = carry(rows.joined(parts, coefficients[0]), Fade(coefficients[0] * x.shape[1]))
        ctx.save_for_backward(state, x, *coefficients)
        return rows.outputs(x, coefficients, state, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
        state, x, *coefficients = ctx.saved_tensors
        rows: _Rows = ctx.rows
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        parts: Any = rows.adjoints(dy, coefficients) if ctx.turn is not None or rows.splits > 1 else None
        if ctx.turn is None:
            return None, None, *rows.gradients(x, dy, coefficients, state, d_end, parts, d_end)
        log_decay, _, projection = coefficients
        d_state = projection * rows.joined(parts[0], log_decay, back=True)
        d_sent, (d_log_fade,) = ctx.turn(d_state if d_end is None else d_state + rows.through(log_decay) * d_end)
        # What was sent does not count the state that arrived.
        both = d_sent if d_end is None else d_sent + d_end
        _, dx, d_log_decay, *rest = rows.gradients(x, dy, coefficients, state, both, parts, d_end)
        return None, None, None, dx, d_log_decay + x.shape[1] * d_log_fade, *rest


@triton.jit
def _parts(values, WIDE: tl.constexpr):
    """Two bf16 numbers whose sum is an fp32 value but for 2**-17 of it; with WIDE the value itself."""
    high, low = values, values
    if not WIDE:
        high = values.to(tl.bfloat16)
        low = (values - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:  # which multiplies the bits of bf16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _product(a, matrix, acc):
    """acc + a matrix, which is in `_parts`: of bf16 tokens as they are, of fp32 states in parts, or all in fp32."""
    high = a
    if matrix[0].dtype == tl.bfloat16:
        if a.dtype == tl.float32:
            high, low = _parts(a, False)
            acc = _dot(low, matrix[0], acc)
        acc = _dot(high, matrix[1], acc)
    return _dot(high, matrix[0], acc)


@triton.jit
def _toeplitz(weights, exponent, scratch, BACK: tl.constexpr, T: tl.constexpr, CH: tl.constexpr):
    """(CH, T, T): what a row's token weighs in a column's output, or with BACK the other way."""
    t = tl.arange(0, T)
    own = scratch + tl.arange(0, CH)[:, None] * T + t[None, :]
    tl.store(own, tl.sum(weights[:, None, :] * tl.exp(exponent[:, None, :] * t[None, :, None]), 2))
    tl.debug_barrier()
    lag = (t[:, None] - t[None, :] if BACK else t[None, :] - t[:, None])[None, :, :]
    return tl.load(scratch + tl.arange(0, CH)[:, None, None] * T + lag, mask=lag >= 0, other=0.0)


@triton.jit
def _read(pointer, mask, WIDE: tl.constexpr):
    """Tokens (SEG, T, CH) as (CH, SEG, T)."""
    tokens = tl.permute(tl.load(pointer, mask=mask, other=0.0), (2, 0, 1))
    return tokens.to(tl.float32) if WIDE else tokens


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
def _join(
    ends, slopes, carry, carry_slope, exponent, scratch, first, tokens, count, document,
    DOCUMENTS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """What enters each segment of a tile (CH, SEG, NP), of which `count` exist, and what leaves the tile (CH, NP).

    BACK: from the last segment to the first, with slopes.
    """
    CH: tl.constexpr = ends.shape[0]
    SEG: tl.constexpr = ends.shape[1]
    NP: tl.constexpr = ends.shape[2]
    size: tl.constexpr = CH * NP
    thin = scratch + tl.arange(0, CH)[:, None] * NP + tl.arange(0, NP)[None, :]
    wide = scratch + tl.arange(0, SEG)[None, :, None] * size
    wide += tl.arange(0, CH)[:, None, None] * NP + tl.arange(0, NP)[None, None, :]
    tl.debug_barrier()
    tl.store(wide, ends)
    if BACK:
        tl.store(wide + SEG * size, slopes)
    tl.debug_barrier()
    # All before the first store: several threads may hold the same number, and read what one of them overwrites.
    own, own_slopes = (), ()
    for i in tl.static_range(SEG):
        at = thin + (SEG - 1 - i if BACK else i) * size
        own = own + (tl.load(at),)
        if BACK:
            own_slopes = own_slopes + (tl.load(at + SEG * size),)
    tl.debug_barrier()
    fade = tl.exp(exponent * tokens)
    for i in tl.static_range(SEG):
        s = SEG - 1 - i if BACK else i
        there, begin = s < count, first + s * tokens
        passes = _same(document, begin, begin + tl.where(there, tokens, 0), DOCUMENTS)
        tl.store(thin + s * size, carry)
        if BACK:
            tl.store(thin + (SEG + s) * size, carry_slope)
            further = own_slopes[i] + tl.where(passes, (carry_slope + tokens * carry) * fade, 0.0)
            carry_slope = tl.where(there, further, carry_slope)
        carry = tl.where(there, own[i] + tl.where(passes, carry * fade, 0.0), carry)
    tl.debug_barrier()
    return tl.load(wide), tl.load(wide + (SEG * size if BACK else 0)), carry, carry_slope


@triton.jit
def outputs_kernel(
    x, log_decay, gain, projection, document, state, parts, y, end, scratch, L, D, HEAD, STEPS, TILES, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, SEG: tl.constexpr, CH: tl.constexpr,
    INITIAL: tl.constexpr, DOCUMENTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """With OUTPUTS y and the states after rows, `end`; else those after `parts` (B, SPLITS, D, N), begun at zero."""
    WIDE: tl.constexpr = x.dtype.element_ty != tl.bfloat16
    row, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    channel, n, t, seg = tl.program_id(1) * CH + tl.arange(0, CH), tl.arange(0, NP), tl.arange(0, T), tl.arange(0, SEG)
    x, y, document = x + row * L * D, y + row * L * D, document + row * L
    scratch += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (2 * SEG * CH * NP)
    at, there = channel[:, None] * N + n[None, :], (channel < D)[:, None] & (n < N)[None, :]
    exponent = tl.load(log_decay + at, mask=there, other=0.0)
    weight = tl.load(gain + at, mask=there, other=0.0)
    out = tl.load(projection + at, mask=there, other=0.0)
    into = _parts(weight[:, None, :] * tl.exp(exponent[:, None, :] * (T - 1 - t)[None, :, None]), WIDE)
    from_state = _parts(out[:, :, None] * tl.exp(exponent[:, :, None] * (t + 1)[None, None, :]), WIDE)
    toeplitz = _parts(_toeplitz(weight * out, exponent, scratch, False, T, CH), WIDE)
    decay, fade = tl.exp(exponent), tl.exp(exponent * T)[:, None, :]
    tokens = STEPS * T
    size = TILES * SEG * tokens

    carry = tl.load(state + row * D * N + at, mask=there & INITIAL, other=0.0)
    for part in range(split if OUTPUTS else 0):
        first, stop = tl.where(part == 0, 0, HEAD + part * size), HEAD + (part + 1) * size
        carry = tl.where(_same(document, first, stop, DOCUMENTS), carry * tl.exp(exponent * (stop - first)), 0.0)
        carry += tl.load(parts + (row * SPLITS + part) * D * N + at, mask=there, other=0.0)
    for i in range(tl.where(split == 0, HEAD, 0)):
        token = tl.load(x + i * D + channel, mask=channel < D, other=0.0).to(tl.float32)
        carry = tl.where(_same(document, i, i + 1, DOCUMENTS), carry * decay, 0.0) + weight * token[:, None]
        if OUTPUTS:
            tl.store(y + i * D + channel, tl.sum(carry * out, 1).to(y.dtype.element_ty), mask=channel < D)

    segment = seg * tokens
    place = (segment[:, None, None] + t[None, :, None]) * D + channel[None, None, :]
    for tile in range(TILES):
        first = HEAD + (split * TILES + tile) * SEG * tokens
        count = (L - first) // tokens
        real = seg < count
        mask = real[:, None, None] & (channel < D)[None, None, :]
        states = tl.zeros((CH, SEG, NP), tl.float32)
        for step in range(STEPS):
            block = first + step * T
            _, _, of_last, passes, _ = _borders(document, block + segment, real, T, DOCUMENTS)
            own = _read(x + block.to(tl.int64) * D + place, mask, WIDE)
            states = _product(tl.where(of_last, own, 0.0), into, tl.where(passes, states * fade, 0.0))
        states, _, carry, _ = _join(
            states, states, carry, carry, exponent, scratch, first, tokens, count, document, DOCUMENTS, False
        )
        for step in range(STEPS if OUTPUTS else 0):
            block = first + step * T
            here, of_before, of_last, passes, many = _borders(document, block + segment, real, T, DOCUMENTS)
            own = _read(x + block.to(tl.int64) * D + place, mask, WIDE)
            found = tl.where(of_before, _product(states, from_state, tl.zeros((CH, SEG, T), tl.float32)), 0.0)
            for one in range(many):
                alike = (here == one)[None, :, :]
                found = tl.where(alike, _product(tl.where(alike, own, 0.0), toeplitz, found), found)
            result = tl.permute(found, (1, 2, 0)).to(y.dtype.element_ty)
            tl.store(y + block.to(tl.int64) * D + place, result, mask=mask)
            states = _product(tl.where(of_last, own, 0.0), into, tl.where(passes, states * fade, 0.0))
    if not OUTPUTS:
        tl.store(parts + (row * SPLITS + split) * D * N + at, carry, mask=there)
    elif split == SPLITS - 1:
        tl.store(end + row * D * N + at, carry, mask=there)


@triton.jit
def _receded(adjoint, slope, d_outputs, to_adjoint, to_slope, fade, of_before, passes, T: tl.constexpr):
    """Adjoints and slopes before a block, of the document before it."""
    slope, adjoint = tl.where(passes, (slope + T * adjoint) * fade, 0.0), tl.where(passes, adjoint * fade, 0.0)
    d_outputs = tl.where(of_before, d_outputs, 0.0)
    return _product(d_outputs, to_adjoint, adjoint), _product(d_outputs, to_slope, slope)


@triton.jit
def gradients_kernel(  # noqa: PLR0912, PLR0915 (what the forward pass does, from its end to its beginning)
    dy, log_decay, gain, projection, document, x, d_end, parts, dx, sums, entered, scratch,
    L, D, HEAD, STEPS, TILES, SPLITS,
    N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, SEG: tl.constexpr, CH: tl.constexpr,
    DOCUMENTS: tl.constexpr, LAST: tl.constexpr, DX: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """With DX dx; with SUMS sums over tokens x, and adjoints and slopes before rows, `entered` (2, B, D, N); with
    neither those before `parts` (2, B, SPLITS, D, N), which are else read.

    `sums` (2 or 3, B SPLITS, D, N) are those of x times adjoints; times slopes times the projection; and with LAST,
    which is for the gradient by the end `d_end`, times adjoints times the projection. The last two count d_end, too.
    """
    WIDE: tl.constexpr = dy.dtype.element_ty != tl.bfloat16
    row, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    channel, n, t, seg = tl.program_id(1) * CH + tl.arange(0, CH), tl.arange(0, NP), tl.arange(0, T), tl.arange(0, SEG)
    x, dy, dx, document = x + row * L * D, dy + row * L * D, dx + row * L * D, document + row * L
    scratch += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (2 * SEG * CH * NP)
    at, there = channel[:, None] * N + n[None, :], (channel < D)[:, None] & (n < N)[None, :]
    exponent = tl.load(log_decay + at, mask=there, other=0.0)
    weight = tl.load(gain + at, mask=there, other=0.0)
    out = tl.load(projection + at, mask=there, other=0.0)
    powers = tl.where(there[:, None, :], tl.exp(exponent[:, None, :] * (t + 1)[None, :, None]), 0.0)
    to_adjoint, to_slope = _parts(powers, WIDE), _parts(powers * (t + 1)[None, :, None], WIDE)
    powers = tl.where(there[:, None, :], tl.exp(exponent[:, None, :] * (T - 1 - t)[None, :, None]), 0.0)
    to_sum, to_slope_sum = _parts(powers, WIDE), _parts(powers * (T - 1 - t)[None, :, None], WIDE)
    from_adjoint = _parts(tl.permute(powers * (weight if LAST else weight * out)[:, None, :], (0, 2, 1)), WIDE)
    toeplitz = _parts(_toeplitz(weight * out, exponent, scratch, True, T, CH), WIDE)
    decay, fade = tl.exp(exponent), tl.exp(exponent * T)[:, None, :]
    tokens = STEPS * T
    size, kind = TILES * SEG * tokens, tl.num_programs(0).to(tl.int64) * D * N

    carry, carry_slope = tl.zeros((CH, NP), tl.float32), tl.zeros((CH, NP), tl.float32)
    from_end = tl.load(d_end + row * D * N + at, mask=there & LAST, other=0.0)
    for i in range(SPLITS - 1 - split if DX or SUMS else 0):
        first = HEAD + (SPLITS - 1 - i) * size
        stop = tl.minimum(first + size, L)
        passes, left = _same(document, first, stop, DOCUMENTS), tl.exp(exponent * (stop - first))
        of_part = parts + (row * SPLITS + SPLITS - 1 - i) * D * N + at
        carry_slope = tl.where(passes, (carry_slope + (stop - first) * carry) * left, 0.0)
        carry_slope += tl.load(of_part + kind, mask=there, other=0.0)
        carry = tl.where(passes, carry * left, 0.0) + tl.load(of_part, mask=there, other=0.0)

    segment = seg * tokens
    place = (segment[:, None, None] + t[None, :, None]) * D + channel[None, None, :]
    sum_adjoint, sum_slope = tl.zeros((CH, SEG, NP), tl.float32), tl.zeros((CH, SEG, NP), tl.float32)
    sum_weighed, pairs = tl.zeros((CH, SEG, NP), tl.float32), tl.zeros((CH, T, T), tl.float32)
    for tile in range(TILES):
        first = HEAD + ((split + 1) * TILES - 1 - tile) * SEG * tokens
        count = (L - first) // tokens
        real = seg < count
        mask = real[:, None, None] & (channel < D)[None, None, :]
        adjoint, slope = tl.zeros((CH, SEG, NP), tl.float32), tl.zeros((CH, SEG, NP), tl.float32)
        for step in range(STEPS):
            block = first + (STEPS - 1 - step) * T
            _, of_before, _, passes, _ = _borders(document, block + segment, real, T, DOCUMENTS)
            d_outputs = _read(dy + block.to(tl.int64) * D + place, mask, WIDE)
            adjoint, slope = _receded(adjoint, slope, d_outputs, to_adjoint, to_slope, fade, of_before, passes, T)
        adjoint, slope, carry, carry_slope = _join(
            adjoint, slope, carry, carry_slope, exponent, scratch, first, tokens, count, document, DOCUMENTS, True
        )
        for step in range(STEPS if DX or SUMS else 0):
            block = first + (STEPS - 1 - step) * T
            here, of_before, of_last, passes, many = _borders(document, block + segment, real, T, DOCUMENTS)
            own = _read(x + block.to(tl.int64) * D + place, mask, WIDE)
            d_outputs = _read(dy + block.to(tl.int64) * D + place, mask, WIDE)
            after, after_slope = adjoint, slope
            if LAST:
                distance = tl.maximum(L - (block + segment + T), 0)[None, :, None]
                rest = from_end[:, None, :] * tl.exp(exponent[:, None, :] * distance)
                if DOCUMENTS:
                    counts = tl.load(document + block + segment + T - 1, mask=real, other=0)
                    rest = tl.where((counts == tl.load(document + L - 1))[None, :, None], rest, 0.0)
                after = adjoint * out[:, None, :] + rest
                after_slope = slope * out[:, None, :] + rest * distance
            found = tl.zeros((CH, SEG, T), tl.float32)
            if DX:
                found = tl.where(of_last, _product(after, from_adjoint, found), 0.0)
            if SUMS:
                of_tokens = tl.where(of_last, own, 0.0)
                reached = _product(of_tokens, to_sum, tl.zeros((CH, SEG, NP), tl.float32))
                sum_adjoint += reached * adjoint
                sum_slope += reached * after_slope
                if LAST:
                    sum_weighed += reached * after
                sum_slope += _product(of_tokens, to_slope_sum, tl.zeros((CH, SEG, NP), tl.float32)) * after
            for one in range(many):
                alike = (here == one)[None, :, :]
                d_alike = tl.where(alike, d_outputs, 0.0)
                if DX:
                    found = tl.where(alike, _product(d_alike, toeplitz, found), found)
                if SUMS:
                    pairs = _dot(tl.permute(tl.where(alike, own, 0.0), (0, 2, 1)), d_alike, pairs)
            if DX:
                result = tl.permute(found, (1, 2, 0)).to(dx.dtype.element_ty)
                tl.store(dx + block.to(tl.int64) * D + place, result, mask=mask)
            adjoint, slope = _receded(adjoint, slope, d_outputs, to_adjoint, to_slope, fade, of_before, passes, T)

    total, total_slope, total_weighed = tl.sum(sum_adjoint, 1), tl.sum(sum_slope, 1), tl.sum(sum_weighed, 1)
    if not LAST:
        total_slope *= out
    for lag in range(T if SUMS else 0):
        of_lag = tl.where(t[None, None, :] - t[None, :, None] == lag, pairs, 0.0)
        both = tl.sum(tl.sum(of_lag, 2), 1)[:, None] * tl.exp(exponent * lag)
        total, total_slope, total_weighed = total + both, total_slope + lag * both * out, total_weighed + both * out
    for head in range(tl.where(split == 0, HEAD, 0)):
        i = HEAD - 1 - head
        d_output = tl.load(dy + i * D + channel, mask=channel < D, other=0.0).to(tl.float32)[:, None]
        token = tl.load(x + i * D + channel, mask=channel < D, other=0.0).to(tl.float32)[:, None]
        rest = from_end * tl.exp(exponent * (L - 1 - i))
        rest = tl.where(_same(document, i + 1, L, DOCUMENTS), rest, 0.0)
        after = (carry + d_output) * out + rest
        total += token * (carry + d_output)
        total_slope += token * (carry_slope * out + rest * (L - 1 - i))
        total_weighed += token * after
        if DX:
            found = tl.sum(weight * after, 1).to(dx.dtype.element_ty)
            tl.store(dx + i * D + channel, found, mask=channel < D)
        passes = _same(document, i, i + 1, DOCUMENTS)
        carry_slope = tl.where(passes, (carry_slope + carry + d_output) * decay, 0.0)
        carry = tl.where(passes, (carry + d_output) * decay, 0.0)

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
