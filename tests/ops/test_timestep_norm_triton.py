"""The timestep norm's Triton kernels: interpreted against the recurrence. `test_ema_triton.py` compiles them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mega_scale.ops.timestep_norm import timestep_norm

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_match_the_recurrence():
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", HERE / "interpreted_timestep_norm.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=HERE.parents[1],
        env={**environment, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@needs_triton
def test_a_cpu_is_refused():
    weight = torch.zeros(4)
    with pytest.raises(ValueError, match="impl='triton' needs a GPU and x is on cpu"):
        timestep_norm(torch.zeros(1, 4, 4), weight, weight, 2, impl="triton")


def test_without_triton_all_else_works_and_the_name_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "mega_scale.ops.timestep_norm_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    weight = torch.zeros(4)
    assert torch.isfinite(timestep_norm(torch.randn(1, 4, 4), weight, weight, 2)[0]).all()
    with pytest.raises(ImportError, match=r"pip install 'mega_scale\[triton\]'"):
        timestep_norm(torch.zeros(1, 4, 4), weight, weight, 2, impl="triton")
