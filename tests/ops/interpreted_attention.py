"""Attention's Triton kernels, interpreted on a CPU, against the reference. `test_attention_triton.py` runs this file.

It needs a process of its own: TRITON_INTERPRET has to be set before anything imports triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_attention_triton.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
import pytest
import torch

from mega_scale.ops import attention_triton
from mega_scale.ops.attention import ChunkDocuments, chunk_attention

NAMES = ("out", "dq", "dk", "dv", "dbias")


def results(impl, leaves, gradient, documents, scale):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out, _ = chunk_attention(*leaves, causal=True, impl=impl, documents=documents, scale=scale)
    found = torch.autograd.grad(out, leaves, gradient.to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *found), strict=False))


# batch, chunks, heads (none: no axis of them, but a positional bias), tokens of a chunk, Z, E, share of tokens that
# begin a document (none: no documents)
CASES = [
    (1, 1, None, 1, 2, 3, None),
    (2, 3, None, 7, 6, 5, None),
    (1, 2, None, 16, 4, 8, 0.2),
    (2, 1, None, 33, 3, 2, 1.0),
    (3, 2, None, 65, 8, 16, 0.05),
    (1, 1, None, 130, 8, 4, None),
    (2, 2, None, 130, 4, 4, 0.02),
    (2, 1, 1, 7, 2, 3, None),
    (1, 2, 2, 33, 4, 8, 0.1),
    (1, 1, 2, 130, 4, 4, None),
]


@pytest.mark.parametrize("block", [128, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_reference(case, dtype, block, monkeypatch):
    """Interpreted, they take fp32 as well, in which nothing is rounded."""
    monkeypatch.setattr(attention_triton, "_LEAST_BLOCK", block)
    batch, chunks, heads, length, z, e, share = case
    generator = torch.Generator().manual_seed(length)
    before = (batch, chunks) if heads is None else (batch, chunks, heads)
    leaves = [torch.randn(*before, length, w, generator=generator).bfloat16().to(dtype) for w in (z, z, e)]
    leaves += [torch.randn(2 * length - 1, generator=generator)] if heads is None else []
    scale = None if heads is None else 1.0
    gradient = torch.randn(*before, length, e, generator=generator).bfloat16()
    documents = None
    if share is not None:
        begins = torch.rand(batch, chunks * length, generator=generator) < share
        documents = ChunkDocuments.of(begins.cumsum(1).unflatten(1, (chunks, length)))
    got = results("triton", leaves, gradient, documents, scale)
    want = results("eager", [leaf.double() for leaf in leaves], gradient, documents, scale)
    assert got.keys() == want.keys()
    for name in got:
        error = (got[name].double() - want[name]).abs().max() / want[name].abs().max().clamp(min=1)
        # not <=, so that NaN fails
        assert error <= (1e-5 if dtype == torch.float32 else 2e-2), f"{name} differs by {error:.1e}"


def test_every_query_of_a_whole_chunk_is_counted_in_the_bias_of_several_programs(monkeypatch):
    monkeypatch.setattr(attention_triton, "_PROGRAMS", 50)
    test_kernels_match_the_reference((5, 1, None, 20, 4, 4, None), torch.float32, 7, monkeypatch)


def test_what_they_lack_is_refused():
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="impl='triton' is softmax over the keys up to each query alone"):
        chunk_attention(q, q, q, torch.zeros(7), causal=False, impl="triton")
