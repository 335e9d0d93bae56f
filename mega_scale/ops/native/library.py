"""The C++ of this folder, compiled at its first use and kept for later ones, as PyTorch keeps its extensions."""

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

_FOLDER = Path(__file__).parent
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast"]
# Floats of a vector register, and what lets a compiler use it, by what PyTorch finds the processor to have.
_WIDTHS: dict[str, tuple[int, list[str]]] = {
    "AVX512": (16, ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]),
    "AVX2": (8, ["-mavx2", "-mfma"]),
}
_OTHER: tuple[int, list[str]] = (4, [])
_COMPILE_SECONDS = 300


@cache
def shipped() -> bool:
    """Whether the sources lie beside this file: in a checkpoint's folder of Python files they do not."""
    return bool(_sources(_FOLDER))


@cache
def library() -> ctypes.CDLL | None:
    """The library; none, with one warning, where it cannot be compiled."""
    try:
        return load(_FOLDER)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the moving average on this CPU takes its blocked form, which is several times slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def load(sources: Path, folder: Path | None = None) -> Any:
    """Compile a folder's C++ unless that was done before, and open the library.

    Args:
        sources: a folder; its *.cpp are compiled, which may include its *.h.
        folder: where libraries are kept; PyTorch's folder for extensions if not given.

    Raises:
        ValueError: it cannot be compiled.
        OSError: the library cannot be kept or opened.
    """
    # Slow to import, and only needed here.
    from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root  # noqa: PLC0415

    width, of_processor = _WIDTHS.get(torch.backends.cpu.get_cpu_capability(), _OTHER)
    command = [get_cxx_compiler(), *_FLAGS, *of_processor, f"-DWIDTH={width}"]
    files = _sources(sources)
    text = b"".join(file.read_bytes() for file in [*sorted(sources.glob("*.h")), *files])
    text += " ".join([platform.machine(), *command]).encode()
    folder = Path(get_default_build_root()) / "mega_scale" if folder is None else folder
    file = folder / f"{sources.name}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may do so at once: each makes its own, and the last one stays.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / file.name
            _compile([*command, *map(str, files), "-o", str(made)])
            os.replace(made, file)
    return ctypes.CDLL(str(file))


def _sources(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.cpp"))


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except FileNotFoundError as error:
        raise ValueError(f"there is no C++ compiler {command[0]!r}: install one, or name it in CXX") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{command[0]} was not done in {_COMPILE_SECONDS} s") from error
    if done.returncode:
        raise ValueError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
