"""C++ for CPUs: compiled at its first use, and kept where PyTorch keeps its extensions.

A library is named by a hash of its source, the header that all share, and the compiler's command.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

_HEADER = Path(__file__).with_name("native.h")
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast", "-fno-math-errno"]
# Floats of a vector register, and what lets a compiler use it, by what PyTorch finds the processor to have.
_WIDTHS: dict[str, tuple[int, list[str]]] = {
    "AVX512": (16, ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]),
    "AVX2": (8, ["-mavx2", "-mfma"]),
}
_OTHER: tuple[int, list[str]] = (4, [])
_COMPILE_SECONDS = 300


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
    command = [get_cxx_compiler(), *_FLAGS, *of_processor, f"-DWIDTH={width}", f"-I{_HEADER.parent}"]
    text = source.read_bytes() + _HEADER.read_bytes() + " ".join([platform.machine(), *command]).encode()
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
