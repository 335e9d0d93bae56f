"""The damped EMA by compiled C++, for a CPU: its recurrence with states in registers, and the autograd function.

Legend: B batch, L length, D channels, N moving averages per channel; G groups of W channels, as in native/ema.cpp.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.ema.coefficients import EmaCoefficients
from mega_scale.ops.modes import in_memory, once_differentiable
from mega_scale.ops.native.library import library

# Numbers of x that are worth a thread.
_OF_A_THREAD = 2**16


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
        native = _native()
        batch, length, channels = x.shape
        tokens = native.mega_ema_tokens()
        blocks = -(-length // tokens)
        fades = (log_decay * count for count in (tokens, length - (blocks - 1) * tokens))
        ready = [torch.expm1(log_decay), gain, projection, *(fade.exp() for fade in fades)]
        coefficients, running = _grouped(torch.stack(ready), native), _grouped(state, native)
        befores = x.new_empty(batch, blocks, *coefficients.shape[1:]) if keeps else None
        y = torch.empty_like(x)
        sizes = _integers(batch, length, channels, coefficients.shape[2], _threads(x))
        native.mega_ema_forward(*_pointers(x, coefficients, resets, running, y, befores), *sizes)
        ctx.save_for_backward(x, log_decay, coefficients, befores, resets)
        return y, _ungrouped(running, log_decay)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        """Finds the states inside a block anew, from the one before it."""
        native = _native()
        x, log_decay, coefficients, befores, resets = ctx.saved_tensors
        dy, adjoint = dy.contiguous(), _grouped(d_end, native)
        dx, gradients = torch.empty_like(x), torch.zeros_like(coefficients[:3])
        sizes = _integers(*x.shape, coefficients.shape[2], _threads(x))
        native.mega_ema_backward(*_pointers(x, dy, coefficients, befores, resets, adjoint, dx, gradients), *sizes)
        d_rate, d_gain, d_projection = _ungrouped(gradients, log_decay)
        return dx, d_rate * log_decay.exp(), d_gain, d_projection, _ungrouped(adjoint, log_decay), None, None


def native_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence of `recurrent_ema` by compiled C++. Backward needs half as much as x for states, kept by forward.

    Args:
        x: (B, L, D) fp32, on a CPU.
        coefficients: (D, N) fp32 each.
        state: h before the first token, (B, D, N) fp32; none means zero.
        resets: (B, L) bool, true where a document begins.

    Returns:
        y (B, L, D), and h after the last token (B, D, N). Differentiable once.

    Raises:
        ValueError: a device or a dtype has no such form, or it could not be compiled.
    """
    log_decay = coefficients.log_decay
    if x.device.type != "cpu" or x.dtype != torch.float32 or log_decay.dtype != torch.float32:
        raise ValueError(
            f"impl='native' takes fp32 on a CPU, and x is {x.dtype} on {x.device}, coefficients {log_decay.dtype}: use "
            "impl='blocked'"
        )
    if not in_memory(x, log_decay):
        raise ValueError("impl='native' cannot run where a tracer or a transform reads along: use impl='auto'")
    if library() is None:
        raise ValueError("impl='native' could not be compiled, as the warning said: use impl='blocked'")
    if state is None:
        state = log_decay.new_zeros(len(x), *log_decay.shape)
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *coefficients, state))
    resets = None if resets is None else resets.contiguous()
    y, end = _Walk.apply(x.contiguous(), *coefficients, state, resets, keeps)
    return y, end


def _native() -> ctypes.CDLL:
    found = library()
    assert found is not None, "native_ema has asked for it"
    return found


def _grouped(tensor: Tensor, native: ctypes.CDLL) -> Tensor:
    """(..., D, N) to (..., G, N, W), both filled up with zeros; a copy."""
    channels, averages = tensor.shape[-2:]
    width = native.mega_ema_width()
    padded = F.pad(tensor, (0, -averages % native.mega_ema_padding(), 0, -channels % width))
    return padded.unflatten(-2, (-1, width)).mT.clone(memory_format=torch.contiguous_format)


def _ungrouped(tensor: Tensor, like: Tensor) -> Tensor:
    """(..., G, N, W) to (..., D, N) of `like`."""
    channels, averages = like.shape
    return tensor.mT.flatten(-3, -2)[..., :channels, :averages].contiguous()


def _threads(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // _OF_A_THREAD))


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p | None]:
    return [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _integers(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]
