"""The EMA's Triton kernels: interpreted against the recurrence, compiled for absent GPUs, refused on CPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
@pytest.mark.parametrize("dtype, variants", [("bf16", 4), pytest.param("fp32", 5, marks=pytest.mark.slow)])
def test_compiled_kernels_use_matrix_units_and_do_not_spill(dtype, variants, tmp_path):
    options = ("--architectures", "90", "--dtypes", dtype, "--json", tmp_path / "rows.json")
    # A cache of its own: what is cached was compiled by whoever was here before.
    done = start("launch/benchmark", "kernels", *options, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"| outputs_kernel | sm_90 | {dtype} | N=16 |" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == variants + 10
    for row in rows:
        assert row["architecture"] == "sm_90" and row["spill_bytes"] == 0, row
        # Kernels of attention are the softmax between the vendor's products; those of the timestep norm have none.
        assert row["products"] >= (9 if row["size"] == "N=16" else 0), row
        assert row["shared_bytes"] <= 100 * 1024, row


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
