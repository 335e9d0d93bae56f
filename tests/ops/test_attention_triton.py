"""Attention's Triton kernels: interpreted against the reference, and refused on CPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mega_scale.ops import as_if
from mega_scale.ops.attention import chunk_attention
from mega_scale.ops.elementwise import PositionalDropout
from mega_scale.parallel.meter import Meter

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
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("p,squares", [(0.0, 6), (0.1, 8)], ids=["", "dropout"])
def test_bytes_of_a_token_have_a_bound_and_no_fp32_number_is_a_score(p, squares):
    """As on a GPU: forward and backward of a chunk of 2,048 tokens, 256 keys and 2,048 values wide, in bf16."""
    chunk, width, values = 2048, 256, 2048
    with FakeTensorMode(), as_if("cuda"):
        leaves = [
            torch.empty(1, 1, 1, chunk, w, dtype=torch.bfloat16, requires_grad=True) for w in (width, width, values)
        ]
        with Meter() as meter:
            drop = PositionalDropout(p, 1) if p else 0.0
            out, _ = chunk_attention(*leaves, causal=True, scale=1.0, dropout=drop)
            kept = sum(meter.kept().values())
            out.backward(torch.empty_like(out))
    own = [event for event in meter.events if event.name.startswith("mega_scale::")]
    # In bf16, weights are written, and read by two products and for gradients, which are written and read by products;
    # dropout writes weights twice more. An fp32 copy would be two more of them. Of the square 0.56.
    scores = 0.5625 * 2 * chunk * squares
    assert sum(event.read + event.written for event in own) / chunk <= scores + 2 * (8 * values + 6 * width) + 16
    assert kept / chunk <= 2 * chunk + 2 * values + 4, "weights and outputs"
