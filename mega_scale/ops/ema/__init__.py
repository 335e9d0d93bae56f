"""The damped exponential moving average: coefficients, one entry, and its forms in PyTorch's own operators.

* recurrent: one token after the other. The truth that all other forms are tested against.
* fft: a convolution, as in the public implementations; the only form with truncated kernels.
* blocked, in `blocked.py`: matrix products inside blocks of tokens, each of which needs the past as one state.

A form takes x (B, L, D) in the dtype of gain and projection (D, N), h before the first token, none meaning zero, and
`resets` (B, L) bool, true where a document begins: h is zeroed before that token. It returns y (B, L, D) and h after
the last token. h is (B, D, N), or pairs of reals (B, D, N, 2) where coefficients are complex.

Complex numbers are pairs of reals, in a last dimension of 2: real part, imaginary part. No parameter, buffer or
collective has a complex dtype.

Legend: B batch, L length, D channels (2D when bidirectional), N moving averages per channel.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.ops import (
    device_kind,
    once_differentiable,
    opaque,
    runs_native,
    runs_triton,
    tracing,
    without_autocast,
)
from mega_scale.ops.elementwise import plus_scaled

__all__ = [
    "IMPLEMENTATIONS", "Carry", "EmaCoefficients", "Fade", "Turn", "complex_ema_coefficients", "damped_ema",
    "damped_ema_and_residual", "ema_coefficients", "forget",
]  # fmt: skip
IMPLEMENTATIONS = ("auto", "recurrent", "fft", "blocked", "triton", "native")


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


Turn = Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]
Carry = Callable[[Tensor, Fade, Tensor | None, bool], tuple[Tensor, Turn]]
"""How states travel between the parts of a sequence that is cut along its length, without autograd: sends this part's
end state and returns the state before this part, in the same shape, and what turns its gradient into those of the first
argument and of the tensors of the second: (log,), or (log, angle) of a complex average.

Arguments:

* h after this part's last token, had it begun at zero, (B, D, N), or (B, D, N, 2) of a complex average; if `back`,
  before its first, coming from the right;
* what is left of a state at the other end of this part;
* (B, L) bool, true where a document begins in this part; none: nowhere;
* `back`: whether states travel from right to left.
"""


def ema_coefficients(damping: Tensor, decay: Tensor, expansion: Tensor, projection: Tensor) -> EmaCoefficients:
    """Coefficients from a layer's parameters (arXiv 2209.10655, equations 5 and 6, in the names of HF 4.37.2).

    `p = sigmoid(damping)`, `q = 1 - p sigmoid(decay)`, `gain = p expansion`, `projection / sqrt(N)`: in fp32 (fp64 for
    fp64 parameters) whatever autocast says, from damping, decay and expansion (D, N, 1) and projection (D, N).
    """
    dtype = torch.promote_types(damping.dtype, torch.float32)
    with without_autocast(damping.device):
        p = damping.to(dtype).squeeze(-1).sigmoid()
        # Both sigmoids can round to 1; the bound keeps log(0), and its gradient, out.
        lost = (p * decay.to(dtype).squeeze(-1).sigmoid()).clamp_max(1 - torch.finfo(dtype).eps)
        gain = p * expansion.to(dtype).squeeze(-1)
        return EmaCoefficients(torch.log1p(-lost), gain, projection.to(dtype) * projection.shape[-1] ** -0.5)


def complex_ema_coefficients(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor) -> EmaCoefficients:
    """Coefficients of Megalodon's complex average from a layer's parameters (arXiv 2404.08801, section 3.1).

    As in the authors' code, the input has no phase: `p = sigmoid(alpha)`, `q = (1 - p sigmoid(delta)) exp(i phi)` with
    `phi_k = 2 pi k sigmoid(theta) / N` for k from 1 to N, `gain = p`, `c = gamma / sqrt(N)`.

    Args:
        alpha, delta: (D, N, 1).
        theta: (D, 1, 1).
        gamma: (D, N, 2), real and imaginary part.

    Returns:
        log_decay and angle in fp64, the angle in (-pi, pi]; the others in fp32, or in fp64 for fp64 parameters.
    """
    dtype, averages = torch.promote_types(alpha.dtype, torch.float32), alpha.shape[1]
    with without_autocast(alpha.device):
        p = alpha.double().squeeze(-1).sigmoid()
        lost = (p * delta.double().squeeze(-1).sigmoid()).clamp_max(1 - torch.finfo(torch.float64).eps)
        log_decay = torch.log1p(-lost)
        order = torch.arange(1, averages + 1, device=theta.device, dtype=torch.float64)
        angle = wrap(theta.double().squeeze(-1).sigmoid() * order * (2 * math.pi / averages))
        real, imaginary = (gamma.to(dtype) * averages**-0.5).unbind(-1)
        return EmaCoefficients(log_decay, p.to(dtype), real, angle, imaginary)


def damped_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    bidirectional: bool = False,
    truncation: int | None = None,
    carry: Carry | None = None,
    omega: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Multi-dimensional damped EMA, real (arXiv 2209.10655, equations 5 and 6) or complex (arXiv 2404.08801).

    `h_t = q h_{t-1} + gain x_t`, `y_t = Re sum_n c_n h_{t,n}`, per channel. With `bidirectional`, the second half of
    the coefficients runs from right to left, and both outputs are added (each counts the token itself).

    Args:
        x: (B, L, D), L at least 1, any floating dtype. Padded positions are to be zero.
        coefficients: (D, N) each; (2D, N) when bidirectional. Complex ones, which have an angle, are neither
            bidirectional nor truncated.
        state: h before the first token (second half: after the last), (B, D or 2D, N), or (B, D, N, 2) where
            coefficients are complex; none means zero.
        resets: (B, L) bool, true where a document begins: neither side of that border reaches the other.
        truncation: taps of the kernel, tokens; none means unlimited.
        carry: where x is one part of a longer sequence, brings the state before it, in place of `state`, once for
            each direction.
        omega: (D,), adds omega times x to y; none means zero.
        impl: auto, recurrent (the reference), fft, blocked, triton or native. auto is recurrent for one token; fft for
            a truncated kernel; triton on an NVIDIA GPU of compute capability 8 or newer where triton is installed, for
            64 tokens or more and N up to 32, or 16 complex; native on a CPU in fp32 where a C++ compiler is found (else
            it warns); else blocked. Tracers and exporters take blocked.

    Returns:
        y (B, L, D) in the dtype of x; and the state after the last token (second half: before the first), in the
        shape of `state` and the dtype of gain and projection, at least fp32; none when the kernel is truncated, which
        has no finite state.

    Raises:
        ValueError: a shape does not fit, or the implementation lacks what is asked for.
    """
    y, _, end = damped_ema_and_residual(
        x, coefficients, state, resets, bidirectional=bidirectional, truncation=truncation, carry=carry, omega=omega,
        impl=impl,
    )  # fmt: skip
    return y, end


def damped_ema_and_residual(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    bidirectional: bool = False,
    truncation: int | None = None,
    carry: Carry | None = None,
    omega: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `damped_ema`, and between its results x for what else reads it.

    The Triton form's backward pass then adds the gradient of that as it writes that of x, where a sum would read both
    again; and its products take omega times x, which other forms add.
    """
    given = x
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (batch, length of at least 1, channels)")
    rows = coefficients.gain.shape[0]
    if rows != x.shape[2] * (2 if bidirectional else 1):
        raise ValueError(
            f"coefficients have {rows} rows for {x.shape[2]} channels with bidirectional={bidirectional}: "
            "one row a channel and direction is needed"
        )
    if coefficients.angle is not None or coefficients.projection_imag is not None:
        _check_complex(coefficients, bidirectional, truncation)
    if state is not None and tuple(state.shape) != (expected := coefficients.state_shape(x.shape[0])):
        raise ValueError(f"state has shape {tuple(state.shape)}: expected {expected}")
    if resets is not None and (resets.shape != x.shape[:2] or resets.dtype != torch.bool):
        raise ValueError(f"resets are {resets.dtype} {tuple(resets.shape)}: expected bool {tuple(x.shape[:2])}")
    if omega is not None and omega.shape != x.shape[2:]:
        raise ValueError(f"omega has shape {tuple(omega.shape)}: expected {tuple(x.shape[2:])}, a number a channel")
    if truncation is not None:
        if impl not in ("auto", "fft"):
            raise ValueError(f"impl={impl!r} has no truncated kernel: use impl='fft', or truncation=None")
        if state is not None or resets is not None or carry is not None:
            raise ValueError(f"truncation={truncation} keeps no state: it takes neither state, carry nor resets")
        impl = "fft"
    if carry is not None and state is not None:
        raise ValueError(f"carry brings the state: it excludes a state of shape {tuple(state.shape)}")
    dtype = coefficients.gain.dtype
    with without_autocast(x.device):
        if impl == "auto":
            impl = _best(x, coefficients, resets)
        run = _run
        if tracing() == "compile":
            impl, run = _NODES.get(impl, (impl, _run))
        before = None if state is None else state.to(dtype)
        inside = impl == "triton" and not bidirectional
        x = x if impl == "triton" else x.to(dtype)  # which widens tokens as it reads them
        own = omega.to(dtype) if inside and omega is not None else None
        y, residual, end = run(impl, bidirectional, truncation, carry, own, x, before, resets, *coefficients[:])
        y = y.to(given.dtype)
    if inside:
        return y, residual, end
    return y if omega is None else plus_scaled(y, given, omega), given, end


def _run(
    impl: str,
    bidirectional: bool,
    truncation: int | None,
    carry: Carry | None,
    omega: Tensor | None,
    x: Tensor,
    state: Any,
    resets: Tensor | None,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The average by one form, with omega if that takes it, and x for what else reads it."""
    form: Any
    # Forms whose modules import this one, of which Triton's need a package that may not be installed.
    if impl == "triton":
        from mega_scale.ops.ema.triton import triton_ema, triton_ema_and_residual  # noqa: PLC0415

        form = triton_ema if bidirectional else partial(triton_ema_and_residual, omega=omega)
    elif impl == "native":
        from mega_scale.ops.ema.native import native_ema as form  # noqa: PLC0415
    else:
        form = _FORMS[impl]
    if impl != "triton":  # which takes a carry itself
        form = form if truncation is None else partial(form, truncation=truncation)
        form = form if carry is None else partial(_carried, form)
    if carry is not None:
        both = [lambda end, fade, back=back: carry(end, fade, resets, back) for back in (False, True)]
        state = both if bidirectional else both[0]
    form = partial(_both_ways, form) if bidirectional else form
    y, *residual, end = form(x, EmaCoefficients(*given), state, resets)
    return y, residual[0] if residual else x, end


def _check_complex(coefficients: EmaCoefficients, bidirectional: bool, truncation: int | None) -> None:
    """Raise ValueError where coefficients are complex in part only, or lack what is asked for."""
    parts = coefficients.angle, coefficients.projection_imag
    if (parts[0] is None) != (parts[1] is None):
        raise ValueError(
            f"coefficients have {'no angle' if parts[0] is None else 'no projection_imag'}: a complex average needs "
            "angle and projection_imag, a real one neither"
        )
    if bidirectional:
        raise ValueError("bidirectional=True with complex coefficients: a complex average runs from left to right only")
    if truncation is not None:
        raise ValueError(
            f"truncation={truncation} with complex coefficients: a complex average has no truncated kernel"
        )


def _best(x: Tensor, coefficients: EmaCoefficients, resets: Tensor | None) -> str:
    """The implementation that `auto` takes for a kernel without truncation."""
    from mega_scale.ops.ema.native import has_library  # noqa: PLC0415  # it imports this one

    gain, length = coefficients.gain, x.shape[1]
    if gain.dtype == torch.float32:
        walks = runs_native(x, gain) or tracing() == "compile"
        if walks and device_kind(x) == "cpu" and length > 1 and has_library():
            return "native"
        columns = gain.shape[1] * (1 if coefficients.angle is None else 2)
        narrow = x.dtype in (torch.bfloat16, torch.float16, torch.float32) and columns <= 32
        # The length is compared last: an exporter keeps the comparison as a bound of the program's lengths.
        if narrow and runs_triton(x, compiled=True) and length >= 64:
            return "triton"
    mode = tracing()
    # A decoding step, for which blocks would be idle ceremony; transforms take no branch by documents' lengths.
    if (length == 1 and mode != "trace") or (resets is not None and mode == "trace"):
        return "recurrent"
    return "blocked"


def _both_ways(
    form: Callable[..., tuple[Tensor, Tensor | None]],
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Any,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What a form gives from left to right plus, by the second half of coefficients, from right to left."""
    ahead, back = (EmaCoefficients(*half) for half in zip(*(c.chunk(2) for c in coefficients[:3]), strict=True))
    before, after = state.chunk(2, 1) if isinstance(state, Tensor) else state or (None, None)
    y, end = form(x, ahead, before, resets)
    if resets is not None:
        # Read from the right, a border before token t lies before token t - 1; before token 0 is no other side.
        resets = torch.cat([torch.zeros_like(resets[:, :1]), resets[:, 1:].flip(1)], 1)
    from_right, begin = form(x.flip(1), back, after, resets)
    y = y + from_right.flip(1)
    return y, None if end is None or begin is None else torch.cat([end, begin], 1)


def _carried(form: Any, x: Tensor, coefficients: EmaCoefficients, carry: Any, resets: Tensor | None) -> Any:
    return _Carried.apply(form, carry, resets, x, *(c for c in coefficients[:] if c is not None))


class _Carried(torch.autograd.Function):
    """A part's average by a form without passes of its own: for the state to send, then with the one that arrives."""

    @staticmethod
    def forward(ctx: Any, form: Any, carry: Any, resets: Tensor | None, x: Tensor, *given: Tensor) -> Any:
        coefficients = EmaCoefficients(*given)
        state, turn = carry(form(x, coefficients, None, resets)[1], coefficients.fade(x.shape[1]))
        ctx.given = form, turn, resets
        ctx.save_for_backward(state, x, *given)
        return form(x, coefficients, state, resets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        form, turn, resets = ctx.given
        state, *leaves = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        coefficients = EmaCoefficients(*leaves[1:])
        with torch.enable_grad(), without_autocast(dy.device):
            y, end = form(leaves[0], coefficients, state, resets)
            fade = coefficients.fade(y.shape[1])
            reached = fade.times(state.detach())
            sent = end - (reached if resets is None else forget(reached, resets.any(1)))
        (d_state,) = torch.autograd.grad((y, end), state, (dy, d_end), retain_graph=True)
        d_sent, d_fade = turn(d_state)
        results = y, end, sent, *(t for t in fade if t is not None)
        return None, None, None, *torch.autograd.grad(results, leaves, (dy, d_end, d_sent, *d_fade))


def recurrent_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = q h_{t-1} + gain x_t`, `y_t = Re sum_n c_n h_{t,n}` (arXiv 2209.10655, equation 6; 2404.08801, 2)."""
    fade = coefficients.fade(1)
    decay, imaginary = fade.value(x.dtype), coefficients.projection_imag
    state = x.new_zeros(coefficients.state_shape(x.shape[0])) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        if resets is not None:
            state = forget(state, resets[:, t])
        added = coefficients.gain * x[:, t, :, None]
        if imaginary is None:
            state = decay * state + added
            outputs.append((coefficients.projection * state).sum(-1))
        else:
            state = complex_product(decay, state) + torch.stack([added, torch.zeros_like(added)], -1)
            outputs.append((coefficients.projection * state[..., 0] - imaginary * state[..., 1]).sum(-1))
    return torch.stack(outputs, dim=1), state


def fft_ema(
    x: Tensor,
    coefficients: EmaCoefficients,
    state: Tensor | None,
    resets: Tensor | None = None,
    *,
    truncation: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`y = k * x` with `k[tau] = Re sum_n c gain q^tau`, plus what the state gives.

    The kernel is zero from `truncation` taps on; there is then no finite state, neither before nor after.
    """
    if resets is not None:
        raise ValueError("impl='fft' has one kernel for the whole sequence and takes no resets: use impl='blocked'")
    length = x.shape[1]
    steps = torch.arange(length + 1, device=x.device, dtype=x.dtype)
    powers = coefficients.fade(steps[:, None, None]).value(x.dtype)  # (L + 1, D, N), or pairs
    weights = coefficients.weights(powers)
    kernel = coefficients.kernel(weights[:length]).T
    if truncation is not None:
        kernel = kernel * (steps[:length] < truncation)
    x_BDL = x.transpose(1, 2)
    spectrum = torch.fft.rfft(x_BDL, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)
    if truncation is not None:
        return y, None
    end = torch.einsum("bld,ldn->bdn", x, coefficients.columns(powers[:length].flip(0), weighed=True))
    end = end.view(coefficients.state_shape(x.shape[0]))
    if state is not None:
        y = y + torch.einsum("bdn,ldn->bld", coefficients.columns(state), coefficients.columns(weights[1:]))
        end = end + coefficients.fade(length).times(state)
    return y, end


def _blocked(whole: bool, *given: Any) -> tuple[Tensor, Tensor]:
    # Where native or Triton's kernels cannot be.
    from mega_scale.ops.ema.blocked import blocked_ema, blocked_operator_ema  # noqa: PLC0415

    return (blocked_operator_ema if whole else blocked_ema)(*given)


_FORMS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "recurrent": recurrent_ema, "fft": fft_ema, "blocked": partial(_blocked, False),
    "blocked operator": partial(_blocked, True),
}  # fmt: skip
# Under a compiler: forms that are a few nodes however long rows are.
_whole = opaque(_run)
_NODES = {"triton": ("triton", _whole), "native": ("native", _whole), "blocked": ("blocked operator", _whole)}
