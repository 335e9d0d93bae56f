"""What a GPU can do at most, measured: matrix products and copies."""

import statistics
from collections.abc import Callable

import torch

_MATRIX = 8192
_COPY_BYTES = 2**31


def require_gpu(command: str) -> None:
    """Raises ValueError where PyTorch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError(f"benchmark.py {command} measures a GPU, and PyTorch sees none: run it where there is one")


def gpu_name() -> str:
    """The GPU and its driver's CUDA."""
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def milliseconds(function: Callable[[], object], repeats: int, warmup: int) -> list[float]:
    """Time on the GPU of every call, by events."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def matmul_flops() -> float:
    """Operations per second of large bf16 matrix products of random numbers, the median of ten."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * _MATRIX**3 / (statistics.median(milliseconds(lambda: a @ b, 10, 3)) / 1e3)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy on the device, the median of ten."""
    source = torch.empty(_COPY_BYTES, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / (statistics.median(milliseconds(lambda: target.copy_(source), 10, 3)) / 1e3)
