"""Attention's Triton kernels: interpreted against the reference, and refused on CPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mega_scale.ops import as_if
from mega_scale.ops.attention import chunk_attention
from mega_scale.ops.elementwise import PositionalDropout

HERE = Path(__file__).parent


class Written(TorchDispatchMode):
    """Bytes that operations write, and the most fp32 numbers that one of them does; views write none."""

    def __init__(self):
        super().__init__()
        self.bytes = self.wide = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and function.namespace == "mega_scale":
                self.bytes += tensor.nbytes
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.wide = max(self.wide, tensor.numel())
        return found


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that are kept for the backward pass, each tensor once."""

    def __init__(self):
        self._seen = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        self._seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self._seen.values())


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
@pytest.mark.parametrize("p,passes", [(0.0, 2), (0.1, 3)], ids=["", "dropout"])
def test_bytes_of_a_token_have_a_bound_and_no_fp32_number_is_a_score(p, passes):
    """As on a GPU: forward and backward of a chunk of 2,048 tokens, 256 keys and 2,048 values wide, in bf16."""
    chunk, width, values = 2048, 256, 2048
    with FakeTensorMode(), as_if("cuda"):
        leaves = [
            torch.empty(1, 1, 1, chunk, w, dtype=torch.bfloat16, requires_grad=True) for w in (width, width, values)
        ]
        kept = Kept()
        with Written() as seen, kept:
            drop = PositionalDropout(p, 1) if p else 0.0
            out, _ = chunk_attention(*leaves, causal=True, scale=1.0, dropout=drop)
        with seen:
            out.backward(torch.empty_like(out))
    scores = 2 * chunk
    # Weights and gradients of scores once, with dropout weights twice more; outputs, four gradients, a sum a token.
    assert seen.bytes / chunk <= scores * (passes if p == 0 else passes + 1) + 2 * (2 * values + 2 * width) + 16
    assert seen.wide <= chunk, "what is in fp32 is a number a token"
    # Queries, keys, values, weights and outputs.
    assert kept.bytes / chunk <= 2 * (2 * width + 2 * values) + scores
