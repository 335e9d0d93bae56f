"""What a measurement was made on."""

import ctypes
import os
import platform
from pathlib import Path

_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 2**20  # bytes


def hardware() -> str:
    """One line on the machine: processor, logical cores, operating system."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # Not Linux: the platform's own name has to do.
    return f"{processor}, {os.cpu_count()} logical cores, {platform.system()} {platform.machine()}"


def return_freed_memory() -> None:
    """Have glibc give every large tensor back to the system when it is freed; does nothing elsewhere.

    Tensors below 32 MiB would otherwise share a heap, which long ones of a row that stay hold open: a step on a long
    sequence in segments then takes twice the memory that it uses. Costs the system's time to map pages anew.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
