"""The EMA's Triton kernels: interpreted against the recurrence, compiled for absent GPUs, refused on CPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_kernels import bounded, faults

from mega_scale.ops import as_if, multiprocessors
from mega_scale.ops.ema import EmaCoefficients, damped_ema

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def start(*command, **variables):
    """Run Python from the project's root, without the variables that change what triton does, but for those given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=HERE.parents[1],
        env={**environment, **variables},
    )


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_match_the_recurrence():
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", HERE / "interpreted_ema.py")
    done = start(*command, TRITON_INTERPRET="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@needs_triton
def test_compiled_kernels_use_matrix_units_and_do_not_spill(tmp_path):
    """All kernels of bf16 tokens on sm_90; of the average with their bounds, documents and end states included."""
    done = start("launch/benchmark", "kernels", "--architectures", 90, "--dtypes", "bf16", "--json", tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 36 and "| sm_90 | bf16 | " in done.stdout
    assert {row["architecture"] for row in rows} == {"sm_90"}
    assert not {row["kernel"]: wrong for row in rows if (wrong := faults(row))}
    whole = [row for row in rows if bounded(row)]
    assert len(whole) == 8 and all(row["instructions"] and row["h100_share"] for row in whole)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "gpu, dtype, numbers, names, count",
    [
        (80, "fp32", "real", ["gradients_kernel, documents and states"], 1),
        (100, "bf16", "complex", ["gradients_kernel, documents, adj", "outputs_kernel, documents and states"], 2),
    ],
)
def test_heavy_kernels_do_not_spill_on_other_gpus(gpu, dtype, numbers, names, count):
    """A sample of what tests/campaigns/compiled_kernels.py compiles."""
    from mega_scale.ops.triton_report import compile_kernels  # noqa: PLC0415  needs triton

    rows = compile_kernels([gpu], [dtype], [16], [numbers], names)
    assert len(rows) == count and not [wrong for row in rows if (wrong := faults(row))]


@needs_triton
@pytest.mark.parametrize("gpu", [((8, 0), 108), ((9, 0), 132), ((10, 0), 148)])
def test_few_channels_are_split_along_the_row(gpu):
    """As many programs as multiprocessors at least, where not almost all have one without it."""
    own = pytest.importorskip("mega_scale.ops.ema.triton")
    for width in (16, 64, 256, 520, 1024, 2048, 4096):
        x = torch.empty(1, 32768, width, dtype=torch.bfloat16, device="meta")
        given = EmaCoefficients(*(torch.empty(width, 16, device="meta") for _ in range(3)))
        with as_if("cuda", *gpu):
            rows, most = own._Rows(x, given, None, own.TILE), multiprocessors(x)
        channels, splits = -(-width // 16), rows.cut.splits
        tiles = rows.cut.tiles
        assert tiles == 1 or (splits > 1 and channels * splits >= most) or channels * splits >= 0.75 * most
        assert splits == 1 or channels < 0.75 * most


@needs_triton
def test_interpreted_kernels_are_not_reported_as_compiled():
    done = start("launch/benchmark", "kernels", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr


def coefficients():
    return EmaCoefficients(-torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3))


@needs_triton
def test_a_cpu_is_refused():
    with pytest.raises(ValueError, match="impl='triton' needs a GPU and x is on cpu"):
        damped_ema(torch.zeros(1, 4, 2), coefficients(), impl="triton")


def test_without_triton_all_else_works_and_the_name_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if "ops.ema.triton" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    y, _ = damped_ema(torch.ones(1, 100, 2), coefficients())
    assert torch.isfinite(y).all()
    with pytest.raises(ImportError, match=r"pip install 'mega_scale\[triton\]'"):
        damped_ema(torch.zeros(1, 4, 2), coefficients(), impl="triton")


def test_triton_excludes_truncation_and_a_carried_state_another():
    x = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match="truncated"):
        damped_ema(x, coefficients(), truncation=2, impl="triton")
    with pytest.raises(ValueError, match="carry brings"):
        damped_ema(x, coefficients(), torch.zeros(1, 2, 3), carry=lambda *_: None, impl="triton")
