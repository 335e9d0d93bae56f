"""What a measurement was made on."""

import os
import platform
from pathlib import Path


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
