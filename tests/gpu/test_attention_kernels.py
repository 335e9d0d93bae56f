"""Attention and norms on a GPU, in bf16 and fp32, against the reference in fp64."""

import pytest
import torch

from mega_scale.ops.attention import ChunkDocuments, chunk_attention
from mega_scale.ops.elementwise import divide_by_rms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# batch, chunks, heads (none: no axis of them, but a positional bias), tokens of a chunk, Z, E, share of tokens that
# begin a document (none: no documents)
CASES = [
    (1, 1, None, 1, 16, 32, None),
    (2, 3, None, 65, 16, 24, 0.1),
    (1, 2, None, 1000, 128, 1024, None),
    (1, 2, None, 1000, 128, 1024, 0.01),
    (2, 1, None, 4096, 512, 640, None),
    (2, 1, 2, 1000, 256, 2048, None),
    (1, 2, 4, 1000, 256, 512, 0.01),
]


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_matches_the_reference_in_fp64(case, dtype, bound):
    batch, chunks, heads, length, z, e, share = case
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    before = (batch, chunks) if heads is None else (batch, chunks, heads)
    leaves = [normal(*before, length, width).bfloat16() for width in (z, z, e)]
    leaves += [normal(2 * length - 1)] if heads is None else []
    gradient = normal(*before, length, e).bfloat16()
    documents = None
    if share is not None:
        begins = torch.rand(batch, chunks * length, device="cuda", generator=generator) < share
        documents = ChunkDocuments.of(begins.cumsum(1).unflatten(1, (chunks, length)))
    found = []
    for impl, kind in (("eager", torch.float64), ("auto", dtype)):
        given = [t.to(kind if t.dim() > 1 or kind == torch.float64 else torch.float32) for t in leaves]
        given = [t.requires_grad_() for t in given]
        scale = None if heads is None else 1.0
        out, _ = chunk_attention(*given, causal=True, documents=documents, impl=impl, scale=scale)
        found.append([out, *torch.autograd.grad(out, given, gradient.to(kind))])
    for name, want, got in zip(("out", "dq", "dk", "dv", "dbias"), *found, strict=False):
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
        # not <=, so that NaN fails
        assert error <= bound, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("gains", [0, 1, 333])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_norms_match_their_equation_in_fp64(dtype, bound, gains):
    def equation(x, gain, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1.0 if gain is None else gain)

    generator = torch.Generator("cuda").manual_seed(gains)
    x = torch.randn(2, 57, 333, device="cuda", generator=generator).to(dtype)
    gain = torch.randn(gains, device="cuda", generator=generator).to(dtype) if gains else None
    dy = torch.randn(2, 57, 333, device="cuda", generator=generator).to(dtype)
    found = []
    for function, kind in ((equation, torch.float64), (divide_by_rms, dtype)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, gain) if t is not None]
        y = function(leaves[0], leaves[1] if gains else None, 1e-5)
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(kind))])
    for want, got in zip(*found, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= bound * want.abs().max()
