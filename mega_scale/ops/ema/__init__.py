"""The damped exponential moving average: one entry, several implementations."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mega_scale.ops.ema.blocked import BlockedEma
from mega_scale.ops.ema.native import library, native_ema, shipped
from mega_scale.ops.ema.reference import EmaCoefficients, fft_ema, recurrent_ema, scan_ema
from mega_scale.ops.modes import in_memory, traced, without_autocast, written_out

IMPLEMENTATIONS = ("auto", "recurrent", "fft", "blocked", "triton", "native")


class Carry(Protocol):
    """How states travel between the parts of a sequence that is cut along its length.

    The average is linear and its decay does not depend on the input, so every part can start from zero; what the others
    send is added afterwards.
    """

    def __call__(
        self, end: Tensor, log_fade: Tensor, passes: Tensor | None, bidirectional: bool
    ) -> Callable[[], Tensor]:
        """Send this part's end state, and do not wait for the others'.

        Args:
            end: h after this part's last token, had it begun at zero, (B, D, N); with `bidirectional` (B, 2D, N), the
                second half being h before its first token, coming from the right.
            log_fade: logarithm of what is left of a state at the other end of this part, (D or 2D, N).
            passes: (B,) bool, false where a document begins in this part, and no state gets through; none: all do.
            bidirectional: whether the second half travels from right to left.

        Returns:
            A function that waits, and returns the state before this part, in the shape of `end`.
        """
        ...


def damped_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    bidirectional: bool = False,
    truncation: int | None = None,
    carry: Carry | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Multi-dimensional damped EMA (arXiv 2209.10655, equations 5 and 6).

    `h_t = q h_{t-1} + gain x_t`, `y_t = sum_n projection_n h_{t,n}`, per channel. With `bidirectional`, the second half
    of the coefficients runs from right to left, and both outputs are added (each counts the token itself).

    Args:
        x: (B, L, D), L at least 1, any floating dtype. Padded positions are to be zero.
        coefficients: (D, N) each; (2D, N) when bidirectional.
        state: h before the first token (second half: after the last), (B, D or 2D, N); none means zero.
        resets: (B, L) bool, true where a document begins: neither side of that border reaches the other.
        bidirectional: whether the average also runs from right to left.
        truncation: taps of the kernel, tokens; none means unlimited.
        carry: where x is one part of a longer sequence, brings the state before it, in place of `state`; blocked or
            triton, which then reads x twice: for the state that it sends, and with the one that arrives.
        impl: auto, recurrent (the reference), fft, blocked, triton or native. auto is recurrent for one token; fft for
            a truncated kernel; triton on an NVIDIA GPU of compute capability 8 or newer where triton is installed, for
            64 tokens or more and N up to 32, outside torch.compile; native on a CPU in fp32, outside torch.compile and
            without `carry`, where a C++ compiler is found (else it warns); else blocked.

    Returns:
        y (B, L, D) in the dtype of x; and the state after the last token (second half: before the first),
        (B, D or 2D, N) in the dtype of the coefficients, at least fp32; none when the kernel is truncated, which has no
        finite state.

    Raises:
        ValueError: a shape does not fit, or the implementation lacks what is asked for.
    """
    _check(x, coefficients, state, resets, bidirectional, impl)
    if carry is not None and (state is not None or truncation is not None or impl not in ("auto", "blocked", "triton")):
        raise ValueError(
            f"carry brings the state, of the blocked and the Triton form: it excludes state, truncation={truncation} "
            f"and impl={impl!r}"
        )
    with without_autocast(x.device):
        if impl == "auto" and truncation is None:
            if _suits_triton(x, coefficients):
                impl = "triton"
            elif carry is None and _suits_native(x, coefficients):
                impl = "native"
        # The kernels widen tokens as they read them.
        inputs = x if impl == "triton" else x.to(coefficients.log_decay.dtype)
        state = None if state is None else state.to(coefficients.log_decay.dtype)
        directions = [_Direction(inputs, coefficients, state, resets)]
        if bidirectional:
            ahead, back = (EmaCoefficients(*half) for half in zip(*(c.chunk(2) for c in coefficients), strict=True))
            state_ahead, state_back = (None, None) if state is None else state.chunk(2, dim=1)
            directions = [
                _Direction(inputs, ahead, state_ahead, resets),
                _Direction(inputs.flip(1), back, state_back, _flip_resets(resets)),
            ]
        found: Sequence[tuple[Tensor, Tensor | None]]
        if carry is not None:
            found = _carried(directions, carry, resets, impl == "triton")
        else:
            found = [_whole(direction, truncation, impl) for direction in directions]
        y, end = found[0]
        if bidirectional:
            y = y + found[1][0].flip(1)
            end = None if end is None or found[1][1] is None else torch.cat([end, found[1][1]], 1)
        return y.to(x.dtype), end


class _Direction(NamedTuple):
    x: Tensor
    coefficients: EmaCoefficients
    state: Tensor | None
    resets: Tensor | None


def _whole(direction: _Direction, truncation: int | None, impl: str) -> tuple[Tensor, Tensor | None]:
    x, coefficients, state, resets = direction
    if truncation is not None:
        if impl not in ("auto", "fft"):
            raise ValueError(f"impl={impl!r} has no truncated kernel: use impl='fft', or truncation=None")
        if state is not None or resets is not None:
            raise ValueError(f"truncation={truncation} keeps no state: it takes neither state nor resets")
        return fft_ema(x, coefficients, None, truncation)
    if impl == "triton":
        # Not before it is needed: triton may not be installed.
        from mega_scale.ops.ema.triton import triton_ema  # noqa: PLC0415

        return triton_ema(x, coefficients, state, resets)
    if impl == "native":
        return native_ema(x, coefficients, state, resets)
    # A decoding step, for which blocks would be idle ceremony.
    one_token = impl == "auto" and x.shape[1] == 1 and not traced()
    if impl == "auto" and not one_token and written_out():
        if resets is None:
            return scan_ema(x, coefficients, state)
        if traced():
            impl = "recurrent"
    if impl in ("auto", "blocked") and not one_token:
        form = BlockedEma(x, coefficients, state, resets)
        form.inside()
        return form.outputs()
    if state is None:
        state = x.new_zeros(x.shape[0], *coefficients.log_decay.shape)
    if impl == "recurrent" or one_token:
        return recurrent_ema(x, coefficients, state, resets)
    if resets is not None:
        raise ValueError("impl='fft' has one kernel for the whole sequence and takes no resets: use impl='blocked'")
    return fft_ema(x, coefficients, state)


def _suits_triton(x: Tensor, coefficients: EmaCoefficients) -> bool:
    """Whether `auto` takes the Triton kernels; asks for the cheapest first, as models on CPUs ask at every call."""
    return (
        x.is_cuda
        and x.shape[1] >= 64
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and coefficients.log_decay.dtype == torch.float32
        and coefficients.log_decay.shape[1] <= 32
        and in_memory(x)
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


def _suits_native(x: Tensor, coefficients: EmaCoefficients) -> bool:
    """Whether `auto` takes the compiled C++, which is compiled now if it never was."""
    return (
        x.device.type == "cpu"
        and x.shape[1] > 1
        and coefficients.log_decay.dtype == torch.float32
        and in_memory(x, coefficients.log_decay)
        and shipped()
        and library() is not None
    )


def _carried(
    directions: list[_Direction], carry: Carry, resets: Tensor | None, kernels: bool
) -> list[tuple[Tensor, Tensor]]:
    """Both directions' states travel at once, in the blocked form while the products inside blocks are computed."""
    form_of: Any = BlockedEma
    if kernels:
        from mega_scale.ops.ema.triton import TritonEma  # noqa: PLC0415

        form_of = TritonEma
    forms = [form_of(*direction) for direction in directions]
    sent = [form.end for form in forms]
    passes = None
    if resets is not None:
        passes = ~resets.any(1)
        if len(sent) == 2:
            # A document that begins this part keeps what lies to its right from what lies to its left.
            sent[1] = sent[1] * (~resets[:, 0])[:, None, None]
    log_fade = torch.cat([direction.coefficients.log_decay for direction in directions]) * directions[0].x.shape[1]
    arrive = carry(torch.cat(sent, 1) if len(sent) == 2 else sent[0], log_fade, passes, len(sent) == 2)
    for form in forms:
        form.inside()
    incoming = arrive().chunk(len(forms), dim=1)
    return [form.outputs(state) for form, state in zip(forms, incoming, strict=True)]


def _flip_resets(resets: Tensor | None) -> Tensor | None:
    """Read from the right, a border before token t lies before token t - 1; one before token 0 has no other side."""
    if resets is None:
        return None
    return torch.cat([torch.zeros_like(resets[:, :1]), resets[:, 1:].flip(1)], 1)


def _check(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None,
    resets: Tensor | None,
    bidirectional: bool,
    impl: str,
) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (batch, length of at least 1, channels)")
    rows, averages = coefficients.log_decay.shape
    if rows != x.shape[2] * (2 if bidirectional else 1):
        raise ValueError(
            f"coefficients have {rows} rows for {x.shape[2]} channels with bidirectional={bidirectional}: "
            "one row a channel and direction is needed"
        )
    if state is not None and tuple(state.shape) != (x.shape[0], rows, averages):
        raise ValueError(f"state has shape {tuple(state.shape)}: expected {(x.shape[0], rows, averages)}")
    if resets is not None and (resets.shape != x.shape[:2] or resets.dtype != torch.bool):
        raise ValueError(f"resets are {resets.dtype} {tuple(resets.shape)}: expected bool {tuple(x.shape[:2])}")


__all__ = ["IMPLEMENTATIONS", "Carry", "EmaCoefficients", "damped_ema", "fft_ema", "recurrent_ema"]
