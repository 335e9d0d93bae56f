"""What the compiler makes of the Triton kernels, for GPUs that need not be here: registers, shared memory, spills."""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from mega_scale.ops.attention_triton import scores_gradient_kernel, softmax_constants, weights_kernel
from mega_scale.ops.ema.triton_blocks import (
    WARPS,
    adjoints_kernel,
    constants,
    gradients_kernel,
    interpreted,
    outputs_kernel,
    states_kernel,
)
from mega_scale.ops.ema.triton_walk import (
    GRADIENTS,
    MOST_AVERAGES,
    OUTPUTS,
    walk_gradients_kernel,
    walk_outputs_kernel,
)

_TOKENS = ("x", "y", "dx", "dy", "weights", "d_scores")
_INT32 = ("starts", "keep", "last", "since")
_SIZES = ("lanes", "L", "D", "K", "SPLITS", "TILES", "first", "keys", "chunk", "groups")
# Sizes that are multiples of 16 in all configs, which the compiler is told, as at a launch.
_ROUND_SIZES = ("D", "first", "keys", "chunk")
_TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


class Compiled(NamedTuple):
    """One kernel as compiled."""

    kernel: str
    architecture: str  # as sm_90
    dtype: str  # of tokens
    size: str  # N of the moving average, keys of a chunk
    registers: int  # per thread
    shared_bytes: int  # per program
    spill_bytes: int  # per thread, stored and loaded
    warps: int  # per program
    products: int  # instructions for matrix units


def compiler_version() -> str:
    """Of triton, which brings its ptxas."""
    return str(triton.__version__)


def compile_kernels(
    architectures: Sequence[int], dtypes: Sequence[str], averages: Sequence[int], keys: Sequence[int]
) -> list[Compiled]:
    """Compile every kernel in every variant, with Triton's own ptxas; no GPU is needed.

    Args:
        architectures: compute capabilities, as 80 and 90.
        dtypes: of tokens: bf16, fp16, fp32.
        averages: N, for kernels of the moving average.
        keys: of a chunk, for kernels of attention.

    Returns:
        A row a variant.

    Raises:
        ValueError: kernels are interpreted in this process (TRITON_INTERPRET), or a dtype has none.
    """
    if interpreted():
        raise ValueError("kernels are interpreted here, not compiled: unset TRITON_INTERPRET")
    unknown = [dtype for dtype in dtypes if dtype not in _TYPES]
    if unknown:
        raise ValueError(f"no kernel takes {unknown[0]}: choose among {', '.join(_TYPES)}")
    return [
        _compile(kernel, name, size, constants, architecture, dtype)
        for architecture in architectures
        for dtype in dtypes
        for kernel, name, size, constants in _variants(dtype, averages, keys)
    ]


def _variants(
    dtype: str, averages: Sequence[int], keys: Sequence[int]
) -> Iterator[tuple[Any, str, str, dict[str, Any]]]:
    """Kernel, its name, the size it is compiled for, and what it is compiled with."""
    for n in averages:
        own = constants(n) | {"PRECISION": "tf32" if dtype == "bf16" else "tf32x3", "num_warps": WARPS}
        yield states_kernel, "states_kernel, ends", f"N={n}", {**own, "STORE": False}
        yield states_kernel, "states_kernel, every block", f"N={n}", {**own, "STORE": True}
        yield outputs_kernel, "outputs_kernel", f"N={n}", own
        yield adjoints_kernel, "adjoints_kernel", f"N={n}", own
        yield gradients_kernel, "gradients_kernel", f"N={n}", own
        for every in (False, True) if n <= MOST_AVERAGES else ():
            words = ", documents and states" if every else ""
            own = {
                **OUTPUTS.constants(n, every, every),
                "INITIAL": every,
                "num_warps": OUTPUTS.warps,
            }
            yield walk_outputs_kernel, f"walk, outputs_kernel{words}", f"N={n}", own
            own = {
                **GRADIENTS.constants(n, every, every),
                "LAST": every,
                "num_warps": GRADIENTS.warps,
            }
            yield walk_gradients_kernel, f"walk, gradients_kernel{words}", f"N={n}", own
    for count in keys:
        softmax: dict[str, Any] = dict(softmax_constants(count))
        yield weights_kernel, "weights_kernel", f"{count} keys", {**softmax, "DOCUMENTS": True}
        yield scores_gradient_kernel, "scores_gradient_kernel", f"{count} keys", softmax


def _compile(kernel: Any, name: str, size: str, values: dict[str, Any], architecture: int, dtype: str) -> Compiled:
    names = list(inspect.signature(kernel.fn).parameters)
    signature, aligned = {}, {}
    for place, argument in enumerate(names):
        if argument in values:
            signature[argument] = "constexpr"
        elif argument in _SIZES:
            signature[argument] = "i32"
        elif argument == "scale":
            signature[argument] = "fp32"
        else:
            signature[argument] = (
                _TYPES[dtype] if argument in _TOKENS else "*i32" if argument in _INT32 else "*fp32"
            )  # fmt: skip
            # As at a launch: storage that torch allocates is aligned, and D is a multiple of 16 in all configs.
        if signature[argument].startswith("*") or argument in _ROUND_SIZES:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        kernel, signature, {argument: values[argument] for argument in names if argument in values}, aligned
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    binary = triton.compile(source, target=target, options={"num_warps": values["num_warps"]})
    registers, spills = _resources(binary.asm["ptx"])
    products = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", binary.asm["ptx"]))
    return Compiled(
        name, f"sm_{architecture}", dtype, size, registers, binary.metadata.shared, spills, values["num_warps"],
        products,
    )  # fmt: skip


def _resources(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes per thread, as ptxas counts them for the target that the text names."""
    found = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        done = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={found[1]}", str(source), "-o", f"{folder}/kernel"],
            capture_output=True,
            text=True,
            check=True,
        )
    used = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert used is not None
    return int(used[1]), sum(map(int, spilled))
