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

from mega_scale.ops import constant_to_compilers, in_memory, load_or_warn, once_differentiable, operator, threads_for
from mega_scale.ops.ema import EmaCoefficients

_SOURCE = Path(__file__).with_name("native.cpp")


def native_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`recurrent_ema` by compiled C++, differentiable once. Forward keeps half as much as x for backward: states, which
    are as many numbers as x where they are complex.

    Raises:
        ValueError: a device or a dtype has no such form, or it could not be compiled.
    """
    dtype = coefficients.gain.dtype
    known = (torch.float32,) if coefficients.angle is None else (torch.float32, torch.float64)
    if x.device.type != "cpu" or dtype not in known or any(t.dtype != dtype for t in (x, coefficients.projection)):
        raise ValueError(
            f"impl='native' takes fp32 on a CPU, a complex average fp64, too, and x is {x.dtype} on {x.device}, "
            f"coefficients {dtype}: use impl='blocked'"
        )
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        raise ValueError("impl='native' cannot run where a tracer or a transform is active: use impl='auto'")
    if library() is None:
        raise ValueError("impl='native' could not be compiled, as the warning said: use impl='blocked'")
    given = [c for c in coefficients[:] if c is not None]
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, state, *given))
    resets = None if resets is None else resets.contiguous()
    y, end = _Walk.apply(resets, keeps, x.contiguous(), state, *given)
    return y, end


def ema_native(
    x: Tensor, rows: Tensor, resets: Tensor | None, state: Tensor | None, keeps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after rows, and where it `keeps` them, states between blocks of tokens; none of these else."""
    native: Any = library()
    x, tensors = x.contiguous(), _native_like(x, rows, resets, state, keeps)
    y, end, befores = tensors
    end.zero_() if state is None else end.copy_(state)
    given = x, rows, resets, end, y, befores if keeps else None
    native.mega_ema_forward(*(None if t is None else t.data_ptr() for t in given), *_sizes(x, rows))
    return tensors


def _native_like(
    x: Tensor, rows: Tensor, resets: Tensor | None, state: Tensor | None, keeps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    native: Any = library()
    (batch, length, channels), averages, parts = x.shape, rows.shape[2], 1 + (len(rows) == 9)
    blocks = -(-length // native.mega_ema_tokens()) if keeps else 0
    befores = x.new_empty(batch, blocks, native.mega_ema_states(channels, averages, parts))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(batch, channels, averages, *[2] * (parts - 1)), befores


def ema_native_backward(
    x: Tensor, dy: Tensor, rows: Tensor, befores: Tensor, resets: Tensor | None, d_end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by the state before rows, and by rows; finds the states inside a block anew."""
    native: Any = library()
    x, dy, adjoint = x.contiguous(), dy.contiguous(), d_end.clone(memory_format=torch.contiguous_format)
    # Fades have none: 3 of 5 rows, and 5 of the 9 of a complex average.
    dx, gradients = torch.empty_like(x), x.new_empty((len(rows) + 1) // 2, *rows.shape[1:])
    given = x, dy, rows, befores, resets, adjoint, dx, gradients
    native.mega_ema_backward(*(None if t is None else t.data_ptr() for t in given), *_sizes(x, rows))
    return dx, adjoint, gradients


def _native_backward_like(
    x: Tensor, dy: Tensor, rows: Tensor, befores: Tensor, resets: Tensor | None, d_end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(d_end, memory_format=contiguous),
        x.new_empty((len(rows) + 1) // 2, *rows.shape[1:]),
    )


def _sizes(x: Tensor, rows: Tensor) -> tuple[int, ...]:
    return (*x.shape, rows.shape[2], 1 + (len(rows) == 9), int(x.dtype == torch.float64), threads_for(x))


_operators = operator(_native_like)(ema_native), operator(_native_backward_like)(ema_native_backward)


class _Walk(torch.autograd.Function):
    """Calls C++ itself where it can, as an operator costs a short row more than its gates."""

    @staticmethod
    def forward(
        ctx: Any, resets: Tensor | None, keeps: bool, x: Tensor, state: Tensor | None, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """resets (B, L), whether there will be a backward pass, x (B, L, D), state, none for zero, and coefficients."""
        native: Any = library()
        tokens, length = native.mega_ema_tokens(), x.shape[1]
        # Of a block, and of the last one.
        counts = tokens, length - (-(-length // tokens) - 1) * tokens
        log_decay, gain, projection, *turning = (c.double() for c in given)
        if turning:
            rows = _complex_rows(EmaCoefficients(log_decay, gain, projection, *turning), counts)
        else:
            fades = ((log_decay * count).exp() for count in counts)
            rows = torch.stack([torch.expm1(log_decay), gain, projection, *fades])
        ctx.direct = in_memory(x, rows)
        y, end, befores = (ema_native if ctx.direct else _operators[0])(x, rows, resets, state, keeps)
        ctx.save_for_backward(x, rows, befores, resets)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, befores, resets = ctx.saved_tensors
        backward = ema_native_backward if ctx.direct else _operators[1]
        dx, d_before, gradients = backward(x, dy, rows, befores, resets, d_end)
        d_rate, d_gain, d_projection, *more = gradients.unbind()
        d_state, q = d_before if ctx.needs_input_grad[3] else None, rows[0] + 1
        if not more:
            return None, None, dx, d_state, d_rate * q.to(x.dtype), d_gain, d_projection
        # By the real and the imaginary part of q, to those of its logarithm.
        (d_rotation, d_imaginary), rotation = more, rows[3]
        d_log_decay, d_angle = d_rate * q + d_rotation * rotation, d_rotation * q - d_rate * rotation
        return None, None, dx, d_state, d_log_decay, d_gain, d_projection, d_angle, d_imaginary


def _complex_rows(wide: EmaCoefficients, counts: tuple[int, int]) -> Tensor:
    """What native.cpp calls coefficients, (9, D, N) in fp64; (5, D, N) are of a real average."""
    log_decay, gain, projection, angle, imaginary = wide[:5]
    assert angle is not None and imaginary is not None
    fades = [wide.fade(count).value(torch.float64) for count in counts]
    # q - 1 without the rounding of q.
    rate = torch.expm1(log_decay) * angle.cos() - 2 * (angle / 2).sin().square()
    rotation = log_decay.exp() * angle.sin()
    return torch.stack([rate, gain, projection, rotation, imaginary, *(t for f in fades for t in f.unbind(-1))])


@constant_to_compilers  # which do not follow what compiles C++
def has_library() -> bool:
    """Whether native.cpp lies beside this file, which in a checkpoint's folder of Python files it does not, and can be
    compiled; else there is one warning."""
    return _SOURCE.exists() and library() is not None


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
