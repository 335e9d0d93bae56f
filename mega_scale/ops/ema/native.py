"""The damped EMA on a CPU in fp32: its recurrence as C++, with states in registers, compiled at its first use.

The library is kept where PyTorch keeps its extensions, named by a hash of the source and the compiler's command.

Legend: B batch, L length, D channels, N moving averages per channel.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops import in_memory, once_differentiable
from mega_scale.ops.ema.coefficients import EmaCoefficients

# Numbers of x that are worth a thread.
_OF_A_THREAD = 2**16
_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast"]
# Floats of a vector register, and what lets a compiler use it, by what PyTorch finds the processor to have.
_WIDTHS: dict[str, tuple[int, list[str]]] = {
    "AVX512": (16, ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]),
    "AVX2": (8, ["-mavx2", "-mfma"]),
}
_OTHER: tuple[int, list[str]] = (4, [])
_COMPILE_SECONDS = 300


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
        threads = max(1, min(torch.get_num_threads(), x.numel() // _OF_A_THREAD))
        ctx.sizes = batch, length, channels, averages, threads
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


def load(source: Path, folder: Path | None = None) -> ctypes.CDLL:
    """Compile a C++ file unless that was done before, and open the library.

    It is kept in `folder`, by default PyTorch's for extensions.

    Raises:
        ValueError: it cannot be compiled.
        OSError: the library cannot be kept or opened.
    """
    # Slow to import, and only needed here.
    from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root  # noqa: PLC0415

    width, of_processor = _WIDTHS.get(torch.backends.cpu.get_cpu_capability(), _OTHER)
    command = [get_cxx_compiler(), *_FLAGS, *of_processor, f"-DWIDTH={width}"]
    text = source.read_bytes() + " ".join([platform.machine(), *command]).encode()
    folder = Path(get_default_build_root()) / "mega_scale" if folder is None else folder
    file = folder / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if file.exists():
        return ctypes.CDLL(str(file))
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may do so at once: each makes its own, and the last one stays.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / file.name
        command += [str(source), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        except FileNotFoundError as error:
            raise ValueError(f"there is no C++ compiler {command[0]!r}: install one, or name it in CXX") from error
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"{command[0]} was not done in {_COMPILE_SECONDS} s") from error
        if done.returncode:
            raise ValueError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
        os.replace(made, file)
    return ctypes.CDLL(str(file))
