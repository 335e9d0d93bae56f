"""Every form of the average's kernels, compiled for GPUs that need not be here: none may spill, nor pass its bounds.

Forms are real and complex averages of bf16 and fp32 tokens, with and without states before rows, gradients of those
after them, and documents, forward and backward, and what parts of rows are read for once more.
"""

import argparse
import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

AVERAGE = ("outputs_kernel", "gradients_kernel")
SHARED_BYTES = 100 * 1024
# Of bf16 tokens and N = 16, with documents and end states as without: instructions an element at most, those of
# documents included; and on sm_90 shares of copy bandwidth at least, by the model of mega_scale/ops/triton_loops.py.
INSTRUCTIONS = {"outputs_kernel": 25, "gradients_kernel": 50}
SHARES = {"outputs_kernel": 0.70, "gradients_kernel": 0.55}
_FORMS = ("", ", documents", ", states", ", documents and states")


def bounded(row: dict[str, Any]) -> str | None:
    """The kernel whose bounds hold for a row of `compile_kernels`; none for parts of rows, and halves of gradients."""
    name, comma, form = row["kernel"].partition(",")
    return name if name in INSTRUCTIONS and comma + form in _FORMS else None


def compile_form(architecture: int, dtype: str, averages: int, numbers: str) -> list[dict[str, Any]]:
    """Rows of `compile_kernels`, of the average's kernels of one kind."""
    from mega_scale.ops.triton_report import compile_kernels  # noqa: PLC0415  in the process that compiles

    return compile_kernels([architecture], [dtype], [averages], [numbers], AVERAGE)


def faults(row: dict[str, Any]) -> list[str]:
    """What a row of `compile_kernels` should not be."""
    found = [f"spills {row['spill_bytes']} bytes"] if row["spill_bytes"] else []
    # Ends and adjoints of parts alone take the fewest; other kernels work between the vendor's products.
    least = 8 if row["kernel"].endswith((", ends", ", adjoints")) else 9
    if row["size"].startswith("N=") and row["products"] < least:
        found.append(f"{row['products']} products of matrix units, not {least}")
    if row["shared_bytes"] > SHARED_BYTES:
        found.append(f"{row['shared_bytes']} bytes of shared memory, over {SHARED_BYTES}")
    name = bounded(row)
    if name and (row["dtype"], row["size"]) == ("bf16", "N=16"):
        count = row["with_borders"]
        if not 10 < count <= INSTRUCTIONS[name]:
            found.append(f"{count} instructions an element, over {INSTRUCTIONS[name]}")
        if row["architecture"] == "sm_90" and not SHARES[name] <= row["h100_share"] <= 1:
            found.append(f"a share of {row['h100_share']}, under {SHARES[name]}")
    return found


def compile_all(forms: Sequence[tuple[int, str, int, str]], processes: int) -> bool:
    """Compile and print forms; whether all are as they should be."""
    rows = bad = 0
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for found in pool.map(compile_form, *zip(*forms, strict=True)):
            for row in found:
                wrong = faults(row)
                rows, bad = rows + 1, bad + bool(wrong)
                print(
                    f"{row['architecture']:<6} {row['dtype']} {row['size']:<13} {row['kernel']:<47} "
                    f"{row['registers']:3d} registers {row['shared_bytes'] / 1024:5.1f} KiB, instructions an element "
                    f"{row['instructions']}, {row['with_borders']}, share {row['h100_share']}"
                    f"{' BAD: ' + ', '.join(wrong) if wrong else ''}",
                    flush=True,
                )
    print(f"{rows} kernels, {bad} not as they should be")
    return not bad


def main() -> None:
    """Compile; exit code 1 where a kernel is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=[90, 80, 100], help="compute capabilities")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], help="of tokens")
    parser.add_argument("--states", type=int, nargs="+", default=[16, 32, 8, 1], help="averages a channel")
    parser.add_argument("--processes", type=int, default=2, help="at once")
    args = parser.parse_args()
    kinds = [(n, kind) for n in args.states for kind in ("real", "complex") if kind == "real" or n <= 16]
    forms = [(gpu, dtype, *kind) for kind, gpu, dtype in itertools.product(kinds, args.architectures, args.dtypes)]
    raise SystemExit(not compile_all(forms, args.processes))


if __name__ == "__main__":
    main()
