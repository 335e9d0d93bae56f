"""The damped exponential moving average: one entry, several implementations."""

import torch
from torch import Tensor

from mega_scale.ops.ema.blocked import blocked_ema
from mega_scale.ops.ema.coefficients import EmaCoefficients
from mega_scale.ops.ema.fft import fft_ema
from mega_scale.ops.ema.recurrent import recurrent_ema

IMPLEMENTATIONS = ("auto", "recurrent", "fft", "blocked")


def damped_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    bidirectional: bool = False,
    truncation: int | None = None,
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
        impl: auto, recurrent (the reference), fft or blocked.

    Returns:
        y (B, L, D) in the dtype of x; and the state after the last token (second half: before the first),
        (B, D or 2D, N) in the dtype of the coefficients, at least fp32; none when the kernel is truncated, which has no
        finite state.

    Raises:
        ValueError: a shape does not fit, or the implementation lacks what is asked for.
    """
    _check(x, coefficients, state, resets, bidirectional, impl)
    with torch.autocast(x.device.type, enabled=False):
        inputs = x.to(coefficients.log_decay.dtype)
        if not bidirectional:
            y, state = _one_direction(inputs, coefficients, state, resets, truncation, impl)
            return y.to(x.dtype), state
        ahead, back = (EmaCoefficients(*half) for half in zip(*(c.chunk(2) for c in coefficients), strict=True))
        state_ahead, state_back = (None, None) if state is None else state.chunk(2, dim=1)
        y_ahead, state_ahead = _one_direction(inputs, ahead, state_ahead, resets, truncation, impl)
        y_back, state_back = _one_direction(inputs.flip(1), back, state_back, _flip_resets(resets), truncation, impl)
        state = None if state_ahead is None or state_back is None else torch.cat([state_ahead, state_back], 1)
        return (y_ahead + y_back.flip(1)).to(x.dtype), state


def _one_direction(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None,
    resets: Tensor | None,
    truncation: int | None,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    if truncation is not None:
        if impl not in ("auto", "fft"):
            raise ValueError(f"impl={impl!r} has no truncated kernel: use impl='fft', or truncation=None")
        if state is not None or resets is not None:
            raise ValueError(f"truncation={truncation} keeps no state: it takes neither state nor resets")
        return fft_ema(x, coefficients, None, truncation)
    if state is None:
        state = x.new_zeros(x.shape[0], *coefficients.log_decay.shape)
    if impl == "fft":
        if resets is not None:
            raise ValueError("impl='fft' has one kernel for the whole sequence and takes no resets: use impl='blocked'")
        return fft_ema(x, coefficients, state)
    if impl == "recurrent":
        return recurrent_ema(x, coefficients, state, resets)
    return blocked_ema(x, coefficients, state, resets)


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


__all__ = ["IMPLEMENTATIONS", "EmaCoefficients", "blocked_ema", "damped_ema", "fft_ema", "recurrent_ema"]
