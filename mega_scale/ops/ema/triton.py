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

Numbers of a complex average are real columns in turns: real part, imaginary part. All of the above then has no
conjugates: the loss changes by the real part of a gradient times a change, and PyTorch's pair is its conjugate.

Legend: B batch, L length, D channels, N moving averages per channel, K columns of a state: N, or 2N where it
is complex.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import device_capability, device_kind, launch, multiprocessors, once_differentiable, operator
from mega_scale.ops.ema import EmaCoefficients
from mega_scale.ops.ema.triton_gradients import gradients_kernel
from mega_scale.ops.ema.triton_kernels import INTERPRETED, starts_kernel
from mega_scale.ops.ema.triton_outputs import outputs_kernel

MOST_COLUMNS = 32
_STARTS = 1024  # tokens of a program that lists segments
_MANY = 16  # columns: with more of them a warp has registers for one channel, not two


class Tile(NamedTuple):
    """Sizes of the kernels, powers of two: guesses until they are measured, that fit into registers."""

    segments: int = 16  # SEG: the rows that a matrix unit takes
    block: int = 16  # T
    steps: int = 8  # STEPS, at most: rows shorter than a tile have fewer
    channels: int = 16  # CH, at most: 32 bytes of bf16
    warps: int = 8
    splits: int | None = None  # SPLITS, at most; none: as many as keep a GPU busy

    def constants(self, columns: int, wide: bool, double: bool = False) -> dict[str, int]:
        """What kernels are compiled for, of fp64 numbers with `double`. There are fewer channels with more columns than
        `_MANY`, and where tokens are `wide`."""
        padded = max(self.block, 1 << (columns - 1).bit_length())
        channels = max(self.channels >> (wide + double + (columns > _MANY)), 1)
        # What threads of a program exchange and keep: five numbers a segment and column, ten a column, four matrices.
        room = channels * ((5 * self.segments + 10) * padded + 4 * self.block * max(padded, self.block))
        return {"N": columns, "NP": padded, "T": self.block, "SEG": self.segments,
                "CH": channels, "ROOM": room, "num_warps": min(self.warps, channels)}  # fmt: skip


def output_flags(wide: bool, double: bool, columns: int, pairs: bool, capability: tuple[int, int]) -> dict[str, int]:
    """How `outputs_kernel` runs. No kernel has buffers of loads, from which threads would read single numbers, up to 16
    of them from one bank of shared memory at a time."""
    # So that a multiprocessor holds two programs, where the compiler then spills nothing.
    limited = not wide and capability[0] < 10 if columns > _MANY else not (double or pairs)
    return {"OUTPUTS": True, "num_stages": 1} | ({"maxnreg": 128} if limited else {})


def gradient_flags(wide: bool, last: bool, columns: int, pairs: bool = False) -> list[dict[str, int]]:
    """The runs of `gradients_kernel`: two where registers do not hold everything at once."""
    if wide and (pairs or columns > _MANY):
        # Without a limit of its own ptxas may spill to halve the registers, so that two programs fit.
        return [{"LAST": last, "DX": dx, "SUMS": not dx, "num_stages": 1, "maxnreg": 255} for dx in (True, False)]
    return [{"LAST": last, "DX": True, "SUMS": True, "num_stages": 1}]


TILE = Tile()
ENDS = {"OUTPUTS": False, "INITIAL": False, "num_stages": 1}
ADJOINTS = {"MORE": False, "LAST": False, "DX": False, "SUMS": False, "num_stages": 1, "maxnreg": 255}


def triton_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Any,
    resets: Tensor | None = None,
    tile: Tile = TILE,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `recurrent_ema` by Triton kernels, for a GPU (or anywhere, interpreted: TRITON_INTERPRET=1).

    x (B, L, D) is bf16, fp16 or fp32, and all of its size that is kept for the backward pass; coefficients (D, N), N up
    to 32, or 16 complex ones, and state are fp32; resets (B, L) bool. All of them may be fp64, or all but x. A `Carry`
    with its last two arguments bound may stand for the state. Returns y (B, L, D) in the dtype of x, and h after the
    last token in that of the state. Raises ValueError if x is not on a GPU and kernels are not interpreted, a dtype has
    no kernel, or N is too large.
    """
    y, _, end = triton_ema_and_residual(x, coefficients, state, resets, tile=tile)
    return y, end


def triton_ema_and_residual(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Any,
    resets: Tensor | None = None,
    omega: Tensor | None = None,
    tile: Tile = TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `triton_ema`, and between its results x for what else reads it, whose gradient is added as that of x is
    written. Omega (D,), in the dtype of coefficients, adds omega times x to y, within the kernels' products."""
    coefficients = EmaCoefficients(*coefficients)
    rows = _Rows(x, coefficients, resets, tile)
    carry, state = (state, None) if callable(state) else (None, state)
    tensors = *(c.contiguous() for c in coefficients), *(() if omega is None else (omega.contiguous(),))
    y, residual, end = _Average.apply(rows, carry, omega is not None, state, x.contiguous(), *tensors)
    return y, residual, end


class Cut(NamedTuple):
    """How rows are cut into a head, and parts of tiles of segments."""

    head: int  # HEAD, tokens
    steps: int  # STEPS, blocks of a segment
    tiles: int  # TILES, of a part
    splits: int  # SPLITS, parts of a row


class _Rows:
    """Rows like x (B, L, D): their documents, how they are cut, and what kernels compute of them.

    `parts` are states, or adjoints and slopes, at the ends of parts of rows, as if nothing came from other parts.
    """

    def __init__(self, x: Tensor, coefficients: EmaCoefficients, resets: Tensor | None, tile: Tile) -> None:
        dtype = coefficients.gain.dtype
        self.complex = coefficients.angle is not None
        if device_kind(x) != "cuda" and not INTERPRETED.value:
            raise ValueError(f"impl='triton' needs a GPU and x is on {x.device}: use impl='blocked'")
        taken = {torch.bfloat16, torch.float16, torch.float32, dtype}
        if dtype not in (torch.float32, torch.float64) or x.dtype not in taken:
            raise ValueError(
                "impl='triton' takes bf16, fp16 or fp32 inputs and fp32 coefficients, or fp64 coefficients and any of "
                f"these or fp64 inputs, not {x.dtype} and {dtype}: use impl='blocked'"
            )
        averages, most = coefficients.gain.shape[1], MOST_COLUMNS // (1 + self.complex)
        if averages > most:
            kind = "complex moving" if self.complex else "moving"
            raise ValueError(
                f"impl='triton' takes up to {most} {kind} averages per channel, not {averages}: use impl='blocked'"
            )
        self._length, self._tile = x.shape[1], tile
        columns = averages * (1 + self.complex)
        channels = _constants(x, coefficients.gain, columns, tile)["CH"]
        self.cut = _cut(x, tile, channels)
        tokens = self.cut.steps * tile.block
        documents = () if resets is None else _ema_documents(resets.contiguous(), self.cut.head, tokens)
        self.document = documents[0] if documents else None
        self._layout = (documents, self.complex, self.cut, tile[:-1])

    def columns(self, numbers: Tensor) -> Tensor:
        """Columns (..., D, K) of numbers (..., D, N), real or complex; complex ones may be pairs."""
        if not self.complex:
            return numbers
        return (torch.view_as_real(numbers.resolve_conj()) if numbers.is_complex() else numbers).flatten(-2)

    def numbers(self, columns: Tensor) -> Tensor:
        """Numbers (..., D, N), real or complex, of columns (..., D, K)."""
        return torch.view_as_complex(columns.unflatten(-1, (-1, 2))) if self.complex else columns

    def given(self, coefficients: EmaCoefficients) -> tuple[Tensor, ...]:
        """What kernels take, by column (D, K): log_decay, gain, projection, and angles in units of 2^-64 turns."""
        log_decay, gain, projection, angle, imaginary = coefficients[:]
        if angle is None or imaginary is None:
            return log_decay, gain, projection, gain  # which a real average does not read
        # Doubles have 53 bits. Of 63 bits one is left, so that half a turn fits.
        turns = (angle.double() / (2 * math.pi) * 2.0**62).long() << 2
        log_decay, gain, turns = (t.repeat_interleave(2, 1) for t in (log_decay.to(gain.dtype), gain, turns))
        return log_decay, gain, torch.stack([projection, imaginary], -1).flatten(1), turns

    def ends(self, x: Tensor, given: Any) -> Tensor:
        """States after parts, (B, SPLITS, D, K)."""
        return _ema_ends(x, given, *self._layout)

    def joined(self, parts: Tensor, coefficients: EmaCoefficients, back: bool = False) -> Tensor:
        """States after rows, or if `back` adjoints before them, (B, D, N) real or complex, from columns (B, SPLITS, D,
        K) of those of parts."""
        found = self.numbers(parts)
        head, steps, tiles, splits = self.cut
        if splits == 1:
            return found[:, 0] * self.fade(coefficients, 1) if back else found[:, 0]
        length, size = self._length, tiles * steps * self._tile.segments * self._tile.block
        inner = torch.arange(head + size, head + size * splits, size, device=parts.device)
        border = F.pad(inner, (1, 0)) if back else F.pad(inner, (0, 1), value=length)
        if self.document is not None:
            of_parts = self.document[:, (border - 1).clamp_min(0)]
            found = found.masked_fill((of_parts != (0 if back else self.document[:, -1:]))[..., None, None], 0)
        return (found * self.fade(coefficients, (border + 1 if back else length - border)[:, None, None])).sum(1)

    def outputs(
        self, x: Tensor, given: Any, omega: Tensor | None, state: Tensor | None, parts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y, and columns of the states after rows, from columns of those before."""
        y, end = _ema_outputs(x, given, omega, state, parts, *self._layout)
        return y, end

    def adjoints(self, dy: Tensor, given: Any) -> Tensor:
        """Adjoints and slopes before parts, (2, B, SPLITS, D, K)."""
        return _ema_adjoints(dy, given, *self._layout)

    def gradients(
        self, x: Tensor, dy: Tensor, coefficients: EmaCoefficients, omega: Tensor | None, more: Tensor | None,
        state: Tensor | None, d_end: Tensor | None, parts: Tensor | None, d_reached: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """By the state, x (with `more`), omega, log q, gain and projection; of `d_end`, only `d_reached` counts the
        state.

        States and gradients but that of x are (..., D, N), real, or complex without conjugates.
        """
        given = self.given(coefficients)
        gain, projection = coefficients.gain, self.numbers(given[2])
        d_state = None
        dx, sums, crossings, entered = _ema_gradients(
            x, dy, given, omega, more, None if d_end is None else self.columns(d_end), parts, *self._layout
        )
        # Summed here and not by atomic additions, whose order, and so whose last bits, change from run to run.
        adjoint, slope, whole = self.numbers(sums.sum(1))
        d_log_decay, d_projection, before = gain * slope, gain * adjoint, self.numbers(entered)
        if state is not None:
            if self.document is not None:  # a document that begins the row keeps the state out, be it infinite
                state = state.masked_fill((self.document[:, 0] > 0)[:, None, None], 0)
            d_state, d_slope = projection * before[0], projection * before[1]
            if d_reached is not None:
                reached = self.through(coefficients) * d_reached
                d_state, d_slope = d_state + reached, d_slope + x.shape[1] * reached
            d_projection = d_projection + (state * before[0]).sum(0)
            d_log_decay = d_log_decay + (state * d_slope).sum(0)
        return d_state, dx, crossings.sum(0), d_log_decay, whole, d_projection

    def fade(self, coefficients: EmaCoefficients, tokens: int | Tensor) -> Tensor:
        """q^tokens, (..., D, N), real or complex."""
        value = coefficients.fade(tokens).value(coefficients.gain.dtype)
        return torch.view_as_complex(value) if self.complex else value

    def through(self, coefficients: EmaCoefficients) -> Tensor:
        """What is left of a state after all tokens, (D, N) or (B, D, N)."""
        fade = self.fade(coefficients, self._length)
        return fade if self.document is None else fade * (self.document[:, -1] == 0)[:, None, None]

    def paired(self, gradient: Tensor) -> Tensor:
        """PyTorch's gradient by states, (B, D, N) or pairs, of real ones, or of complex ones without conjugates."""
        return torch.view_as_real(gradient.conj().resolve_conj()) if self.complex else gradient

    def unpaired(self, gradient: Tensor) -> Tensor:
        """The other way."""
        return torch.view_as_complex(gradient.contiguous()).conj().resolve_conj() if self.complex else gradient


def _cut(x: Tensor, tile: Tile, channels: int) -> Cut:
    """How to cut rows like x (B, L, D), of which a program owns so many channels."""
    batch, length, width = x.shape
    steps = tile.steps
    while steps > 1 and steps * tile.block * tile.segments > length:
        steps //= 2
    segments, head = divmod(length, steps * tile.block)
    tiles = -(-segments // tile.segments)
    splits = tile.splits
    if splits is None:
        # Only where multiprocessors would idle, as parts are read once more, before: then two waves of gradients, of
        # which a multiprocessor holds one program, or one wave of outputs, of which it holds two.
        programs, most = batch * -(-width // channels), multiprocessors(x)
        splits = 1 if 4 * programs >= 3 * most else 2 * most // programs
    tiles = -(-tiles // max(1, min(splits, tiles)))
    return Cut(head, steps, tiles, max(1, -(-segments // max(1, tiles * tile.segments))))


def _constants(x: Tensor, gain: Tensor, columns: int, tile: Tile) -> dict[str, int]:
    return tile.constants(columns, _wide(x, gain), gain.dtype == torch.float64)


def _wide(x: Tensor, gain: Tensor) -> bool:
    return gain.dtype == torch.float64 or x.dtype != torch.bfloat16


def _launch(
    kernel: Any, x: Tensor, given: Sequence[Tensor], omega: Tensor | None, more: Sequence[Tensor | None],
    documents: Sequence[Tensor], pairs: bool, cut: Sequence[int], tile: Sequence[int], **flags: int,
) -> None:  # fmt: skip
    gain = given[1]  # what a kernel does not read is any tensor
    own = _constants(x, gain, gain.shape[1], Tile(*tile))
    own |= {"DOCUMENTS": bool(documents), "OMEGA": omega is not None}
    grid = (len(x) * Cut(*cut).splits, -(-x.shape[2] // own["CH"]))
    others = [gain if t is None else t.contiguous() for t in (*(documents or (None, None)), omega, *more)]
    scratch = gain.new_empty(grid[0] * grid[1] * own["ROOM"])
    launch(kernel, grid, x.contiguous(), *given, *others, scratch, *x.shape[1:], *cut, COMPLEX=pairs, **own, **flags)


def _documents_like(resets: Tensor, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    length = resets.shape[1]
    size = len(resets), length + (length - head) // tokens + 1
    return torch.empty_like(resets, dtype=torch.int32), resets.new_empty(size, dtype=torch.int32)


@operator(_documents_like)
def _ema_documents(resets: Tensor, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """`document` and `starts` that kernels take, of rows whose segments have so many tokens; resets (B, L) bool."""
    document, (_, starts) = resets.cumsum(1, dtype=torch.int32), _documents_like(resets, head, tokens)
    grid = len(resets), resets.shape[1] // _STARTS + 1
    launch(starts_kernel, grid, document, starts, resets.shape[1], head, tokens, BLOCK=_STARTS)
    return document, starts


def _parts_like(
    x: Tensor, given: Sequence[Tensor], documents: Sequence[Tensor], pairs: bool, cut: Sequence[int],
    tile: Sequence[int],
) -> Tensor:  # fmt: skip
    return given[1].new_empty(len(x), Cut(*cut).splits, *given[1].shape)


@operator(_parts_like)
def _ema_ends(
    x: Tensor, given: Sequence[Tensor], documents: Sequence[Tensor], pairs: bool, cut: Sequence[int],
    tile: Sequence[int],
) -> Tensor:  # fmt: skip
    parts = _parts_like(x, given, documents, pairs, cut, tile)
    more = None, parts, x, None
    _launch(outputs_kernel, x, given, None, more, documents, pairs, cut, tile, **ENDS)
    return parts


def _outputs_like(x: Tensor, given: Sequence[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), given[1].new_empty(len(x), *given[1].shape)


@operator(_outputs_like)
def _ema_outputs(
    x: Tensor, given: Sequence[Tensor], omega: Tensor | None, state: Tensor | None, parts: Tensor | None,
    documents: Sequence[Tensor], pairs: bool, cut: Sequence[int], tile: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, end = _outputs_like(x, given)
    more = state, parts, y, end
    gain, capability = given[1], device_capability(x) if device_kind(x) == "cuda" else (9, 0)  # interpreted
    flags = output_flags(_wide(x, gain), gain.dtype == torch.float64, gain.shape[1], pairs, capability)
    flags["INITIAL"] = state is not None
    _launch(outputs_kernel, x, given, omega, more, documents, pairs, cut, tile, **flags)
    return y, end


def _adjoints_like(
    dy: Tensor, given: Sequence[Tensor], documents: Sequence[Tensor], pairs: bool, cut: Sequence[int],
    tile: Sequence[int],
) -> Tensor:  # fmt: skip
    return given[1].new_empty(2, len(dy), Cut(*cut).splits, *given[1].shape)


@operator(_adjoints_like)
def _ema_adjoints(
    dy: Tensor, given: Sequence[Tensor], documents: Sequence[Tensor], pairs: bool, cut: Sequence[int],
    tile: Sequence[int],
) -> Tensor:  # fmt: skip
    parts = _adjoints_like(dy, given, documents, pairs, cut, tile)
    more = dy, None, None, parts, dy, None, None, None
    _launch(gradients_kernel, dy, given, None, more, documents, pairs, cut, tile, **ADJOINTS)
    return parts


def _gradients_like(
    x: Tensor, dy: Tensor, given: Sequence[Tensor], omega: Tensor | None, more: Tensor | None, ends: Tensor | None,
    parts: Tensor | None, documents: Sequence[Tensor], pairs: bool, cut: Sequence[int], tile: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gain = given[1]
    sums = gain.new_empty(3, parts_of_rows := len(x) * Cut(*cut).splits, *gain.shape)
    crossings = gain.new_empty(parts_of_rows, x.shape[2])
    return torch.empty_like(x), sums, crossings, gain.new_empty(2, len(x), *gain.shape)


@operator(_gradients_like)
def _ema_gradients(
    x: Tensor, dy: Tensor, given: Sequence[Tensor], omega: Tensor | None, more: Tensor | None, ends: Tensor | None,
    parts: Tensor | None, documents: Sequence[Tensor], pairs: bool, cut: Sequence[int], tile: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, two kinds of sums over tokens, and what reaches the beginnings of rows; see `gradients_kernel`."""
    made = _gradients_like(x, dy, given, omega, more, ends, parts, documents, pairs, cut, tile)
    others = x, more, ends, parts, *made
    wide, columns = _wide(x, given[1]), given[1].shape[1]
    for flags in gradient_flags(wide, ends is not None, columns, pairs):
        _launch(gradients_kernel, dy, given, omega, others, documents, pairs, cut, tile, MORE=more is not None, **flags)
    return made


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: _Rows, carry: Any, beside: bool, state: Tensor | None, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors are coefficients and, where it is `beside` them, omega."""
        ctx.set_materialize_grads(False)
        own: Any = tensors if beside else (*tensors, None)
        ctx.rows, ctx.turn, ctx.beside, coefficients, omega = rows, None, beside, EmaCoefficients(*own[:-1]), own[-1]
        given = rows.given(coefficients)
        parts: Any = rows.ends(x, given) if carry is not None or rows.cut.splits > 1 else None
        if carry is not None:
            end = rows.joined(parts, coefficients)
            state, ctx.turn = carry(torch.view_as_real(end) if rows.complex else end, coefficients.fade(x.shape[1]))
        ctx.save_for_backward(state, x, *tensors)
        y, end = rows.outputs(x, given, omega, None if state is None else rows.columns(state), parts)
        return y, x, end.view(coefficients.state_shape(len(x)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, more: Tensor | None, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
        state, x, *tensors = ctx.saved_tensors
        own: Any = tensors if ctx.beside else (*tensors, None)
        rows, coefficients, omega = ctx.rows, EmaCoefficients(*own[:-1]), own[-1]
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        given = rows.given(coefficients)
        state = state if state is None or not rows.complex else torch.view_as_complex(state.contiguous())
        reached = None if d_end is None else rows.unpaired(d_end)
        parts: Any = rows.adjoints(dy, given) if ctx.turn is not None or rows.cut.splits > 1 else None
        both, d_fade = reached, None
        if ctx.turn is not None:
            d_state = rows.numbers(given[2]) * rows.joined(parts[0], coefficients, back=True)
            d_state = d_state if reached is None else d_state + rows.through(coefficients) * reached
            d_sent, d_fade = ctx.turn(rows.paired(d_state))
            # What was sent does not count the state that arrived.
            both = rows.unpaired(d_sent if d_end is None else d_sent + d_end)
        d_state, dx, d_omega, d_log, d_gain, d_projection = rows.gradients(
            x, dy, coefficients, omega, more, state, both, parts, reached
        )
        if rows.complex:
            found = [d_log.real, d_gain.real, d_projection.real, -d_log.imag, -d_projection.imag]
        else:
            found = [d_log, d_gain, d_projection]
        if d_fade is not None:
            d_state = None
            for place, own in zip((0, 3), d_fade, strict=False):
                found[place] = found[place] + x.shape[1] * own
        d_state = None if d_state is None else rows.paired(d_state)
        return None, None, None, d_state, dx, *found, *((d_omega,) if ctx.beside else ())
