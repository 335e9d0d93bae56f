"""Queries and keys by their Triton kernels, interpreted on a CPU, against the plain form in fp64.

`test_queries_triton.py` runs this file, in a process of its own: TRITON_INTERPRET has to be set before anything imports
triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/ops/test_queries_triton.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
import pytest
import torch
from interpreting import round_bf16

from mega_scale.ops import queries_triton
from mega_scale.ops.attention import turn, turns
from mega_scale.ops.elementwise import normalized_queries_and_keys
from mega_scale.ops.queries_triton import queries_gradients, turned_queries, turned_queries_and_keys

EPS = 1e-5


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Of which each has several tiles of tokens."""
    monkeypatch.setattr(queries_triton, "_PROGRAMS", 4)
    monkeypatch.setattr(queries_triton, "_ELEMENTS", 64)
    round_bf16(monkeypatch)


def plainly(z, bias, gamma, beta, rotary, heads, eps):
    q, k = normalized_queries_and_keys(z if bias is None else z + bias, gamma, beta, heads, eps)
    return turn(q, rotary).flatten(2), turn(k, rotary).flatten(2)


@pytest.mark.parametrize("biased, by_row", [(False, True), (True, False)])
@pytest.mark.parametrize("batch, length, heads, width", [(1, 1, 1, 2), (2, 17, 3, 6), (1, 33, 2, 32), (2, 5, 1, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_match_fp64(dtype, batch, length, heads, width, biased, by_row):
    generator = torch.Generator().manual_seed(length)
    z, bias, gamma, beta, *dy = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((batch, length, heads * width), (heads * width,), *((2, heads * width),) * 2,
                      *((batch, length, heads * width),) * 2)
    )  # fmt: skip
    z[0, 0] = 0  # of which only eps is left
    positions = torch.arange(batch * length).view(batch, length) if by_row else torch.arange(length)
    given = [z, bias, gamma / 4, beta] if biased else [z, gamma / 4, beta]
    found, exact = [], []
    for function, own, into in ((turned_queries_and_keys, dtype, found), (plainly, torch.float64, exact)):
        leaves = [t.to(own).requires_grad_() for t in given]
        rotary = turns(positions, width, 1e4, torch.promote_types(own, torch.float32))
        z_, *bias_, gamma_, beta_ = leaves
        both = function(z_, bias_[0] if biased else None, gamma_, beta_, rotary, heads, EPS)
        into += [*both, *torch.autograd.grad(both, leaves, [t.to(own) for t in dy])]
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        difference = (got.double() - want).abs().max()
        assert difference <= 3 * torch.finfo(dtype).eps * want.abs().max().clamp(min=1)


def test_sums_over_many_tokens_are_fp32():
    """Of ones in bf16 that would sum to nothing more in it from 256 on."""
    z, gamma, one = torch.ones(1200, 2).bfloat16(), torch.zeros(2, 2), torch.ones(1200, 2).bfloat16()
    still = torch.tensor([[[1.0, 0.0]]])
    _, sums = queries_gradients(one, one, z, None, gamma, still, 1, EPS)
    assert sums.shape == (4, 5, 2) and sums.dtype == torch.float32
    torch.testing.assert_close(sums.sum(0)[2:4], torch.full((2, 2), 1200.0), rtol=1e-6, atol=0)


def test_operators_say_what_they_do():
    z, bias, gamma, beta = torch.randn(9, 12), torch.randn(12), torch.randn(2, 12), torch.randn(2, 12)
    rotary, tests = torch.randn(9, 3, 2), {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(turned_queries, (z, bias, gamma, beta, rotary, 2, EPS), **tests)
    torch.library.opcheck(queries_gradients, (z, z, z, None, gamma, rotary, 2, EPS), **tests)
