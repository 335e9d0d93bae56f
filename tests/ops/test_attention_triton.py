"""Attention's Triton kernels: interpreted against the reference, and refused on CPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mega_scale.ops.attention import chunk_attention

HERE = Path(__file__).parent


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
def test_a_cpu_is_refused():
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="needs a GPU and v is on cpu"):
        chunk_attention(q, q, q, torch.zeros(7), causal=True, impl="triton")


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_match_the_reference():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         str(HERE / "interpreted_attention.py")],
        capture_output=True, text=True, check=False, timeout=600, cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
