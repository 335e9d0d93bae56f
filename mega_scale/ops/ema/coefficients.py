"""Coefficients of the damped exponential moving average, real and complex, and their powers.

Complex numbers are pairs of reals, in a last dimension of 2: real part, imaginary part. No parameter, buffer or
collective has a complex dtype.

Legend: D channels (2D when bidirectional), N moving averages per channel.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Fade(NamedTuple):
    """A power of the decays, q^t: what is left of a state after t tokens.

    log is its magnitude's logarithm (D, N). angle is its phase (D, N) in fp64, radians in (-pi, pi], and log is then
    fp64, too; none: the average is real.
    """

    log: Tensor
    angle: Tensor | None = None

    def power(self, exponent: Tensor | float) -> "Fade":
        """Raised to an exponent that broadcasts against (D, N)."""
        return Fade(self.log * exponent, None if self.angle is None else wrap(self.angle * exponent))

    def value(self, dtype: torch.dtype) -> Tensor:
        """The number itself: (D, N), or pairs (D, N, 2) of a complex average; computed in the dtype of log."""
        size = self.log.exp()
        if self.angle is None:
            return size.to(dtype)
        return torch.stack([size * self.angle.cos(), size * self.angle.sin()], -1).to(dtype)

    def times(self, state: Tensor) -> Tensor:
        """What is left of states (..., D, N), or pairs (..., D, N, 2) of a complex average."""
        value = self.value(state.dtype)
        return value * state if self.angle is None else complex_product(value, state)


class EmaCoefficients(NamedTuple):
    """What the recurrence `h_t = q h_{t-1} + gain x_t`, `y_t = Re sum_n c_n h_{t,n}` needs.

    `q = exp(log_decay + i angle)`, `c = projection + i projection_imag`. Without angle and projection_imag the average
    is real. All are (D, N), fp32 or fp64. The decay is kept as a logarithm because it rounds to 1 when it is close to
    1. Of a complex average, log_decay and angle are best fp64 whatever the others are: phases over a long row need it.
    """

    log_decay: Tensor
    gain: Tensor
    projection: Tensor
    angle: Tensor | None = None
    projection_imag: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Those that there are: three tensors of a real average, five of a complex one."""
        return (tensor for tensor in self[:] if tensor is not None)

    def fade(self, tokens: int | Tensor) -> Fade:
        """What so many tokens leave of a state; a tensor broadcasts against (D, N)."""
        if self.angle is None:
            return Fade(self.log_decay).power(tokens)
        return Fade(self.log_decay.double(), self.angle.double()).power(tokens)

    def weights(self, powers: Tensor) -> Tensor:
        """What parts of a state give `y = Re sum_n c_n w_n h_n`, w being powers (..., D, N) or pairs: Re(c w), and
        -Im(c w), in that shape."""
        if self.projection_imag is None:
            return self.projection * powers
        re, im = powers.unbind(-1)
        of_imaginary = -(self.projection * im + self.projection_imag * re)
        return torch.stack([self.projection * re - self.projection_imag * im, of_imaginary], -1)

    def kernel(self, weights: Tensor) -> Tensor:
        """What a token gives outputs later on, (..., D), from `weights` of the decays' powers."""
        return (self.gain * (weights if self.angle is None else weights[..., 0])).sum(-1)

    def columns(self, states: Tensor, weighed: bool = False) -> Tensor:
        """States (..., D, N) or pairs (..., D, N, 2), times the gain if `weighed`, as reals: (..., D, N or 2N)."""
        if self.angle is None:
            return states * self.gain if weighed else states
        return (states * self.gain[..., None] if weighed else states).flatten(-2)

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """(B, D, N), or (B, D, N, 2) of a complex average."""
        return (batch, *self.gain.shape) if self.angle is None else (batch, *self.gain.shape, 2)


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers as pairs, (..., 2) each."""
    (a_re, a_im), (b_re, b_im) = a.unbind(-1), b.unbind(-1)
    return torch.stack([a_re * b_re - a_im * b_im, a_im * b_re + a_re * b_im], -1)


def forget(state: Tensor, rows: Tensor) -> Tensor:
    """States (B, ...), zero in rows (B,) bool."""
    return state.masked_fill(rows.view(-1, *[1] * (state.dim() - 1)), 0.0)


def wrap(angle: Tensor) -> Tensor:
    """The same angle in (-pi, pi], with a gradient of 1."""
    return angle - 2 * math.pi * (angle.detach() / (2 * math.pi) - 0.5).ceil()
