"""What the compiler makes of the Triton kernels, for GPUs that need not be here: registers, shared memory, spills."""

import contextlib
import inspect
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import triton

from mega_scale.ops.attention_triton import (
    BLOCK,
    DISTANCES,
    WIDTH,
    distances_kernel,
    row_products_kernel,
    scores_gradient_kernel,
    tile,
    weights_kernel,
)
from mega_scale.ops.cross_entropy_triton import cross_entropy_kernel, kernel_constants
from mega_scale.ops.dropout_triton import dropout_constants, dropout_kernel
from mega_scale.ops.ema.triton import ADJOINTS, ENDS, MOST_COLUMNS, TILE, gradient_flags, output_flags
from mega_scale.ops.ema.triton_gradients import gradients_kernel
from mega_scale.ops.ema.triton_kernels import AHEAD
from mega_scale.ops.ema.triton_outputs import outputs_kernel
from mega_scale.ops.gates_triton import gate_constants, gate_slopes_kernel
from mega_scale.ops.layer_norm_triton import layer_norm_constants, layer_norm_slopes_kernel
from mega_scale.ops.queries_triton import queries_constants, queries_kernel, queries_slopes_kernel
from mega_scale.ops.timestep_norm_triton import (
    before_kernel,
    behind_kernel,
    block_constants,
    normalise_kernel,
    slopes_kernel,
    token_constants,
    tokens_gradient_kernel,
    totals_kernel,
)
from mega_scale.ops.triton_loops import Average, disassemble, tile_instructions

_TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "fp64": "*fp64"}
# Of arguments; all others are pointers to fp32, or fp64 where tokens are. As at a launch, the compiler is told which
# are multiples of 16 in all configs: pointers, and some sizes.
_TOKENS = ("x", "residual", "other", "more", "y", "dx", "dy", "q", "k", "v", "d_out",
           "weights", "dropped", "d_scores", "a", "b", "logits", "z", "dz", "dq", "dk", "out")  # fmt: skip
_OTHERS = {
    **dict.fromkeys(("document", "starts", "since"), "*i32"),
    **dict.fromkeys(("count", "counts", "angle", "targets", "place"), "*i64"),
    **dict.fromkeys(("totals", "before", "behind", "first_mean", "first_var", "end_mean", "end_var"), "*fp64"),
    "valid": "*u8",
    **dict.fromkeys(("scale", "eps", "factor"), "fp32"),
    **dict.fromkeys(("key", "first_row", "first_position", "first_column", "threshold", "first", "words"), "i32"),
}
_WORDS = 32000
DOCUMENT = 1000
"""Tokens of a document, on average, for which instructions and shares of kernels with documents are counted."""
_NORM_CHANNELS = 64  # of a group, as in the largest models
_DROPOUT_WIDTH = 4096
_VALUES, _KEYS = 2048, 256  # channels of a head
# What an average may have: documents, and states before and gradients of those after rows.
_NEEDS = {
    (False, False): "",
    (True, False): ", documents",
    (False, True): ", states",
    (True, True): ", documents and states",
}
_ROUND_SIZES = ("D", "chunk", "width")
_SIZES = ("L", "HEAD", "STEPS", "TILES", "G", "M", "lines", "queries", "chunks", "heads", "pairs", "tokens", "rows",
          *_ROUND_SIZES)  # fmt: skip


def compile_kernels(
    architectures: Sequence[int],
    dtypes: Sequence[str],
    averages: Sequence[int],
    numbers: Sequence[str] = ("real",),
    names: Sequence[str] = ("",),
) -> list[dict[str, Any]]:
    """Compile kernels with any of `names` in theirs, with Triton's own ptxas, a row a variant; no GPU is needed.

    `architectures` are compute capabilities, as 90; `dtypes` of tokens bf16, fp16, fp32, or fp64, which attention
    lacks; `averages` N of the moving average, and `numbers` real or complex, but for too many columns. A row has
    registers and spilled bytes (stored and loaded) of a thread, warps and bytes of shared memory of a program, and
    instructions for matrix units; of the average also thread instructions an element, those of tiles that no document
    begins in and, `with_borders`, where one begins every `DOCUMENT` tokens, and the share of an H100's copy speed that
    `triton_loops.py` predicts of the latter at 1 x 32,768 x 4,096. Raises ValueError if kernels are interpreted here,
    or a dtype has none.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("kernels are interpreted here, not compiled: unset TRITON_INTERPRET")
    unknown = [dtype for dtype in dtypes if dtype not in _TYPES]
    if unknown:
        raise ValueError(f"no kernel takes {unknown[0]}: choose among {', '.join(_TYPES)}")
    return [
        _compile(kernel, name, size, constants, architecture, dtype)
        for architecture in architectures
        for dtype in dtypes
        for kernel, name, size, constants in _variants(architecture, dtype, averages, numbers)
        if any(part in name for part in names)
    ]


def _variants(
    architecture: int, dtype: str, averages: Sequence[int], numbers: Sequence[str]
) -> Iterator[tuple[Any, str, str, dict[str, Any]]]:
    """Kernel, its name, the size it is compiled for, and what it is compiled with."""
    wide, double = dtype != "bf16", dtype == "fp64"
    for n, kind in itertools.product(averages, numbers):
        pairs = kind == "complex"
        columns, size = n * (1 + pairs), f"N={n}, complex" if pairs else f"N={n}"
        if columns > MOST_COLUMNS:
            continue
        # A row is one part in most launches; a Megalodon's outputs have omega times the input, which more reads.
        always = {"SPLITS": 1, "COMPLEX": pairs, "OMEGA": pairs}
        for (documents, states), words in _NEEDS.items():
            always["DOCUMENTS"] = documents
            own = TILE.constants(columns, wide, double) | always
            flags = output_flags(wide, double, columns, pairs, divmod(architecture, 10))
            yield outputs_kernel, f"outputs_kernel{words}", size, {**own, "INITIAL": states, **flags}
            if not states:
                # What is read once more, before, where a row is several parts.
                yield outputs_kernel, f"outputs_kernel{words}, ends", size, {**own, **ENDS}
                yield gradients_kernel, f"gradients_kernel{words}, adjoints", size, {**own, **ADJOINTS}
            for flags in gradient_flags(wide, states, columns, pairs):
                part = "" if flags["DX"] and flags["SUMS"] else ", dx" if flags["DX"] else ", sums"
                yield gradients_kernel, f"gradients_kernel{words}{part}", size, {**own, "MORE": pairs, **flags}
    own = {**token_constants(_NORM_CHANNELS, documents=True, padding=True), "num_warps": 4}
    for kernel in (totals_kernel, normalise_kernel, slopes_kernel):
        yield kernel, kernel.fn.__name__, f"S={_NORM_CHANNELS}", own
    for residuals, words in enumerate(("", ", residual", ", residuals")):
        name = f"{tokens_gradient_kernel.fn.__name__}{words}"
        yield tokens_gradient_kernel, name, f"S={_NORM_CHANNELS}", {**own, "R": residuals}
    for kernel in (before_kernel, behind_kernel):
        own = {**block_constants(_NORM_CHANNELS, documents=True), "num_warps": 4}
        yield kernel, kernel.fn.__name__, f"G={_NORM_CHANNELS}", own
    if not double:
        yield from _other_variants()


def _other_variants() -> Iterator[tuple[Any, str, str, dict[str, Any]]]:
    own = {**dropout_constants(_DROPOUT_WIDTH), "FEATUREWISE": False}
    for added, heads, words in ((True, False, ", residual"), (False, True, ", heads")):
        yield dropout_kernel, f"dropout_kernel{words}", "", {**own, "RESIDUAL": added, "HEADS": heads}
    for drops, placed, words in ((False, False, ""), (True, False, ", dropout"), (True, True, ", dropout, compiled")):
        own = {"BLOCK": BLOCK, "DROPOUT": drops, "PLACED": placed}
        yield weights_kernel, f"weights_kernel{words}", "", {**tile(True), **own, "BIAS": True, "DOCUMENTS": drops}
        yield scores_gradient_kernel, f"scores_gradient_kernel{words}", "", {**tile(drops), **own}
    yield distances_kernel, "distances_kernel", "", {**DISTANCES}
    own = {**kernel_constants(_WORDS), "STATISTICS": True, "GRADIENT": True}
    yield cross_entropy_kernel, "cross_entropy_kernel", f"{_WORDS} words", own
    yield row_products_kernel, "row_products_kernel", "", {**WIDTH}
    for gates, words in ((False, ""), (True, ", attention")):
        own = {**gate_constants(_VALUES), "GATES": gates}
        yield gate_slopes_kernel, f"gate_slopes_kernel{words}", f"{_VALUES} channels", own
    own = layer_norm_constants(_VALUES)
    yield layer_norm_slopes_kernel, "layer_norm_slopes_kernel", f"{_VALUES} channels", own
    for kernel in (queries_kernel, queries_slopes_kernel):
        yield kernel, kernel.fn.__name__, f"{_KEYS} channels", {**queries_constants(_KEYS), "BIAS": True}


def _compile(kernel: Any, name: str, size: str, values: dict[str, Any], architecture: int, dtype: str) -> Any:
    names = list(inspect.signature(kernel.fn).parameters)
    types = dict.fromkeys(names, "*fp64" if dtype == "fp64" else "*fp32") | dict.fromkeys(_TOKENS, _TYPES[dtype])
    types |= _OTHERS | dict.fromkeys(_SIZES, "i32") | dict.fromkeys(values, "constexpr")
    round_places = [i for i, name in enumerate(names) if types[name].startswith("*") or name in _ROUND_SIZES]
    source = triton.compiler.ASTSource(
        kernel,
        {argument: types[argument] for argument in names},
        {argument: values[argument] for argument in names if argument in values},
        {(place,): [["tt.divisibility", 16]] for place in round_places},
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    options = {name: values[name] for name in ("num_warps", "num_stages", "maxnreg") if name in values}
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile, triton.knobs.nvidia.dump_ptxas_log = True, True
        binary = triton.compile(source, target=target, options=options)
    ptx, counted = binary.asm["ptx"], log.getvalue()
    registers = re.findall(r"Used (\d+) registers", counted)[0]
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", counted)))
    products = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx))
    return {
        "kernel": name, "architecture": f"sm_{architecture}", "dtype": dtype, "size": size,
        "registers": int(registers), "shared_bytes": binary.metadata.shared, "spill_bytes": spills,
        "warps": values["num_warps"], "products": products, **_tile_figures(binary, int(registers), values, dtype),
    }  # fmt: skip


def _tile_figures(binary: Any, registers: int, values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Thread instructions an element, and the share of an H100's copy speed that a model predicts, of a kernel that
    computes outputs or all gradients of the average in fp32; none of others."""
    found: dict[str, Any] = {"instructions": None, "with_borders": None, "h100_share": None}
    both = values.get("OUTPUTS") or (values.get("DX") and values.get("SUMS"))
    if both and dtype != "fp64":
        sass, cell = disassemble(binary.asm["cubin"]), TILE.steps * values["T"]
        count = tile_instructions(sass, TILE.steps)
        ahead = AHEAD.value if "CCTL.E.PF2" in sass else values["num_stages"] - 1
        average = Average(
            count, registers, binary.metadata.shared, values["num_warps"], ahead, values["CH"],
            TILE.steps, cell * values["SEG"], cell / DOCUMENT if values["DOCUMENTS"] else 0.0,
        )  # fmt: skip
        found["instructions"] = round(average.per_element, 1)
        found["with_borders"] = round(average.per_element * (1 + average.more), 1)
        passed = (2 if values.get("OUTPUTS") else 3) * (4 if dtype == "fp32" else 2)
        found["h100_share"] = round(average.copy_share(passed)["share"], 2)
    return found
