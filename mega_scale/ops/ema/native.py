"""The damped EMA on a CPU: its recurrence as C++, with states in registers, compiled at its first use.

In fp32, and a complex average in fp64, too.
The library is kept where PyTorch keeps its extensions, named by a hash of the source and the compiler's command.

Legend: B batch, L length, D channels, N moving averages per channel.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops import call_native, load_or_warn, once_differentiable, runs_native, threads_for
from mega_scale.ops.ema.coefficients import EmaCoefficients

_SOURCE = Path(__file__).with_name("native.cpp")


def native_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`recurrent_ema` by compiled C++, differentiable once. Forward keeps half as much as x for backward: states, which
    are as many numbers as x where they are complex.

    Raises:
        ValueError: a device or a dtype has no such form, or it could not be compiled.
    """
    log_decay, dtype = coefficients.log_decay, coefficients.gain.dtype
    known = (torch.float32,) if coefficients.angle is None else (torch.float32, torch.float64)
    if x.device.type != "cpu" or dtype not in known or any(t.dtype != dtype for t in (x, coefficients.projection)):
        raise ValueError(
            f"impl='native' takes fp32 on a CPU, a complex average fp64, too, and x is {x.dtype} on {x.device}, "
            f"coefficients {dtype}: use impl='blocked'"
        )
    if not runs_native(x, log_decay):
        raise ValueError("impl='native' cannot run where a tracer or a transform is active: use impl='auto'")
    if library() is None:
        raise ValueError("impl='native' could not be compiled, as the warning said: use impl='blocked'")
    given = [c for c in coefficients[:] if c is not None]
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, state, *given))
    resets = None if resets is None else resets.contiguous()
    y, end = _Walk.apply(resets, keeps, x.contiguous(), state, *given)
    return y, end


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, resets: Tensor | None, keeps: bool, x: Tensor, state: Tensor | None, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """resets (B, L), whether there will be a backward pass, x (B, L, D), state, none for zero, and coefficients."""
        native: Any = library()
        batch, length, channels = x.shape
        coefficients = EmaCoefficients(*given)
        averages, tokens, parts = coefficients.gain.shape[1], native.mega_ema_tokens(), 1 + (len(given) == 5)
        blocks = -(-length // tokens)
        counts = tokens, length - (blocks - 1) * tokens  # of a block, and of the last one
        rows = _rows(coefficients, counts)
        kept = (batch, blocks, native.mega_ema_states(channels, averages, parts))
        befores = x.new_empty(kept) if keeps else None
        y, end = torch.empty_like(x), x.new_zeros(batch, channels, averages, *[2] * (parts - 1))
        if state is not None:
            end.copy_(state)
        ctx.sizes = batch, length, channels, averages, parts, int(x.dtype == torch.float64), threads_for(x)
        tensors = x, rows, resets, end, y, befores
        call_native(native.mega_ema_forward, tensors, *ctx.sizes)
        ctx.save_for_backward(x, rows, befores, resets)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        """Finds the states inside a block anew, from the one before it."""
        native: Any = library()
        x, rows, befores, resets = ctx.saved_tensors
        dy, adjoint = dy.contiguous(), d_end.clone(memory_format=torch.contiguous_format)
        complex_numbers = adjoint.dim() == 4
        dx, gradients = torch.empty_like(x), x.new_empty(5 if complex_numbers else 3, *rows.shape[1:])
        tensors = x, dy, rows, befores, resets, adjoint, dx, gradients
        call_native(native.mega_ema_backward, tensors, *ctx.sizes)
        d_rate, d_gain, d_projection, *more = gradients
        d_state, q = adjoint if ctx.needs_input_grad[3] else None, rows[0] + 1
        if not complex_numbers:
            return None, None, dx, d_state, d_rate * q.to(x.dtype), d_gain, d_projection
        # By the real and the imaginary part of q, to those of its logarithm.
        (d_rotation, d_imaginary), rotation = more, rows[3]
        d_log_decay, d_angle = d_rate * q + d_rotation * rotation, d_rotation * q - d_rate * rotation
        return None, None, dx, d_state, d_log_decay, d_gain, d_projection, d_angle, d_imaginary


def _rows(coefficients: EmaCoefficients, counts: tuple[int, int]) -> Tensor:
    """Rows (5, D, N), or (9, D, N) of a complex average, in fp64: what native.cpp calls coefficients."""
    log_decay, gain, projection, *more = (c.double() for c in coefficients[:] if c is not None)
    if not more:
        return torch.stack([torch.expm1(log_decay), gain, projection, *((log_decay * count).exp() for count in counts)])
    angle, imaginary = more
    wide = EmaCoefficients(log_decay, gain, projection, angle, imaginary)
    fades = [wide.fade(count).value(torch.float64) for count in counts]
    # q - 1 without the rounding of q.
    rate = torch.expm1(log_decay) * angle.cos() - 2 * (angle / 2).sin().square()
    rotation = log_decay.exp() * angle.sin()
    return torch.stack([rate, gain, projection, rotation, imaginary, *(t for f in fades for t in f.unbind(-1))])


@cache
def shipped() -> bool:
    """Whether native.cpp lies beside this file: in a checkpoint's folder of Python files it does not."""
    return _SOURCE.exists()


@cache
def library() -> ctypes.CDLL | None:
    """The library; none, with one warning, where it cannot be compiled."""
    if (found := load_or_warn(_SOURCE, "the moving average")) is None:
        return None
    for function, tensors in ((found.mega_ema_forward, 6), (found.mega_ema_backward, 8)):
        function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_int64] * 7
        function.restype = None
    found.mega_ema_states.argtypes, found.mega_ema_states.restype = [ctypes.c_int64] * 3, ctypes.c_int64
    return found
