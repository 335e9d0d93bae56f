"""The damped EMA on a CPU in fp32: its recurrence as C++, with states in registers, compiled at its first use.

The library is kept where PyTorch keeps its extensions, named by a hash of the source and the compiler's command.

Legend: B batch, L length, D channels, N moving averages per channel.
"""

import ctypes
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops import in_memory, once_differentiable
from mega_scale.ops.ema.coefficients import EmaCoefficients
from mega_scale.ops.native import load, threads_for

_SOURCE = Path(__file__).with_name("native.cpp")


def native_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`recurrent_ema` by compiled C++, differentiable once. Forward keeps half as much as x for backward: states.

    Raises:
        ValueError: a device or a dtype has no such form, or it could not be compiled.
    """
    log_decay = coefficients[0]
    if x.device.type != "cpu" or x.dtype != torch.float32 or log_decay.dtype != torch.float32:
        raise ValueError(
            f"impl='native' takes fp32 on a CPU, and x is {x.dtype} on {x.device}, coefficients {log_decay.dtype}: use "
            "impl='blocked'"
        )
    if not in_memory(x, log_decay):
        raise ValueError("impl='native' cannot run where a tracer or a transform is active: use impl='auto'")
    if library() is None:
        raise ValueError("impl='native' could not be compiled, as the warning said: use impl='blocked'")
    if state is None:
        state = log_decay.new_zeros(len(x), *log_decay.shape)
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *coefficients[:3], state))
    resets = None if resets is None else resets.contiguous()
    y, end = _Walk.apply(x.contiguous(), *coefficients[:3], state, resets, keeps)
    return y, end


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_decay: Tensor,
        gain: Tensor,
        projection: Tensor,
        state: Tensor,
        resets: Tensor | None,
        keeps: bool,
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, D), coefficients (D, N), state (B, D, N), resets (B, L), whether there will be a backward pass."""
        native: Any = library()
        batch, length, channels = x.shape
        averages, tokens = log_decay.shape[1], native.mega_ema_tokens()
        blocks = -(-length // tokens)
        fades = (log_decay * count for count in (tokens, length - (blocks - 1) * tokens))
        coefficients = torch.stack([torch.expm1(log_decay), gain, projection, *(fade.exp() for fade in fades)])
        befores = x.new_empty(batch, blocks, native.mega_ema_states(channels, averages)) if keeps else None
        y, end = torch.empty_like(x), state.clone(memory_format=torch.contiguous_format)
        ctx.sizes = batch, length, channels, averages, threads_for(x)
        tensors = x, coefficients, resets, end, y, befores
        native.mega_ema_forward(*(None if t is None else t.data_ptr() for t in tensors), *ctx.sizes)
        ctx.save_for_backward(x, log_decay, coefficients, befores, resets)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        """Finds the states inside a block anew, from the one before it."""
        native: Any = library()
        x, log_decay, coefficients, befores, resets = ctx.saved_tensors
        dy, adjoint = dy.contiguous(), d_end.clone(memory_format=torch.contiguous_format)
        dx, gradients = torch.empty_like(x), torch.empty_like(coefficients[:3])
        tensors = x, dy, coefficients, befores, resets, adjoint, dx, gradients
        native.mega_ema_backward(*(None if t is None else t.data_ptr() for t in tensors), *ctx.sizes)
        d_rate, d_gain, d_projection = gradients
        return dx, d_rate * log_decay.exp(), d_gain, d_projection, adjoint, None, None


@cache
def shipped() -> bool:
    """Whether native.cpp lies beside this file: in a checkpoint's folder of Python files it does not."""
    return _SOURCE.exists()


@cache
def library() -> ctypes.CDLL | None:
    """The library; none, with one warning, where it cannot be compiled."""
    try:
        found = load(_SOURCE)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the moving average on this CPU takes its blocked form, which is several times slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for function, tensors in ((found.mega_ema_forward, 6), (found.mega_ema_backward, 8)):
        function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_int64] * 5
        function.restype = None
    found.mega_ema_states.argtypes, found.mega_ema_states.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return found
