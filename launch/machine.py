"""What becomes of the memory of freed tensors."""

import ctypes
import os
import platform
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE, _LARGEST_OF_HEAP, _NEVER = 2**20, 2**25, 2**31 - 1  # bytes
_STATUS = Path("/proc/self/status")


def return_freed_memory() -> None:
    """Have glibc give every large tensor back to the system when it is freed; does nothing elsewhere.

    Tensors below 32 MiB would otherwise share a heap, which long ones of a row that stay hold open: a step on a long
    sequence in segments then takes twice the memory that it uses. Costs the system's time to map pages anew.
    """
    if _has_glibc():
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def keep_freed_memory() -> None:
    """Have glibc keep freed tensors of up to 32 MiB for the next ones; does nothing elsewhere.

    By default they come from the heap as well once some were freed, but the heap's end is given back again and again,
    and its pages cleared anew: 4 to 7 percent of a training step on a CPU. Does nothing either where the environment
    says what glibc is to do.
    """
    told = any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"))
    if _has_glibc() and not told and "glibc.malloc." not in os.environ.get("GLIBC_TUNABLES", ""):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGEST_OF_HEAP)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, _NEVER)


def _has_glibc() -> bool:
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


def _resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at its peak."""
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
