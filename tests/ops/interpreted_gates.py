"""Gradients of gates by their Triton kernel, interpreted on a CPU, against fp64. `test_gates_triton.py` runs this file.

It needs a process of its own: TRITON_INTERPRET has to be set before anything imports triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/ops/test_gates_triton.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
import pytest
import torch
import torch.nn.functional as F
from interpreting import round_bf16

from mega_scale.ops import gates_triton
from mega_scale.ops.gates_triton import gate_gradients, silu_gradient, silu_of_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several of columns in a head, and of tokens in a program."""
    monkeypatch.setattr(gates_triton, "_PROGRAMS", 6)
    monkeypatch.setattr(gates_triton, "_MOST_COLUMNS", 128)
    monkeypatch.setattr(gates_triton, "_ELEMENTS", 512)
    round_bf16(monkeypatch)


def check(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    difference = (got.double() - want).abs().max()
    assert difference <= 3 * torch.finfo(dtype).eps * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 5), (1, 8, 256), (3, 9, 300), (70, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_silu_match_fp64(dtype, shape):
    generator = torch.Generator().manual_seed(len(shape))
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(shape[-1], generator=generator).to(dtype)
    found, exact = [], []
    for function, own, into in ((silu_of_sum, dtype, found), (lambda x, b: F.silu(x + b), torch.float64, exact)):
        leaves = [t.to(own).requires_grad_() for t in (x, bias)]
        y = function(*leaves)
        into += [y, *torch.autograd.grad(y, leaves, dy.to(own))]
    for got, want in zip(found, exact, strict=True):
        check(got, want, dtype)


@pytest.mark.parametrize("tokens, heads, width", [(1, 1, 1), (33, 1, 5), (8, 3, 130), (27, 2, 300), (70, 4, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_gate_match_fp64(dtype, tokens, heads, width):
    generator = torch.Generator().manual_seed(tokens)
    dy, out, x = (torch.randn(tokens, heads * width, generator=generator).to(dtype) for _ in range(3))
    bias = torch.randn(heads * width, generator=generator).to(dtype)
    d_out, dx, delta, sums = gate_gradients(dy, out, x, bias, heads)
    leaves = [t.double().requires_grad_() for t in (out, x, bias)]
    exact = torch.autograd.grad(leaves[0] * F.silu(leaves[1] + leaves[2]), leaves, dy.double())
    check(d_out, exact[0], dtype)
    check(dx, exact[1], dtype)
    check(sums.sum(0).to(dtype), exact[2], dtype)
    # Of what was rounded: products of that are what it is subtracted from.
    of_heads = (d_out.double() * out.double()).unflatten(1, (heads, width)).sum(-1)
    check(delta.sum(-1), of_heads, torch.float32)


def test_sums_over_many_tokens_are_fp32():
    """Of numbers in bf16 that would sum to nothing more in it from 256 on."""
    x, bias = torch.full((1500, 4), 20.0).bfloat16(), torch.zeros(4).bfloat16()
    _, sums = silu_gradient(torch.ones_like(x), x, bias)
    assert sums.shape == (6, 4) and sums.dtype == torch.float32
    torch.testing.assert_close(sums.sum(0), torch.full((4,), 1500.0), rtol=1e-6, atol=0)


def test_operators_say_what_they_do_and_take_strided_gradients():
    x, bias = torch.randn(18, 6), torch.randn(6)
    dy, tests = torch.randn(6, 18).mT, {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(silu_gradient, (dy, x, bias), **tests)
    torch.library.opcheck(gate_gradients, (dy, x, x, bias, 2), **tests)
    for strided, plain in zip(silu_gradient(dy, x, bias), silu_gradient(dy.contiguous(), x, bias), strict=True):
        assert torch.equal(strided, plain)
