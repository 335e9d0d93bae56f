"""Gradients of a layer norm by their Triton kernel, interpreted on a CPU, against fp64.

`test_gates_triton.py` runs this file, in a process of its own: TRITON_INTERPRET has to be set before anything imports
triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/ops/test_gates_triton.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
import pytest
import torch
import torch.nn.functional as F
from interpreting import round_bf16

from mega_scale.ops import layer_norm_triton
from mega_scale.ops.layer_norm_triton import layer_norm_gradient, layer_norm_of_sum


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(layer_norm_triton, "_PROGRAMS", 3)
    monkeypatch.setattr(layer_norm_triton, "_ELEMENTS", 32)
    round_bf16(monkeypatch)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 17, 5), (1, 8, 256), (3, 9, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_match_fp64(dtype, shape, affine):
    generator = torch.Generator().manual_seed(shape[1])
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    shift, gain, bias = (torch.randn(shape[-1], generator=generator) for _ in range(3))
    given, found = [x + 2, shift.to(dtype), *([gain, bias] if affine else [])], []

    def plainly(x, shift, gain, bias, eps):
        return F.layer_norm(x + shift, shape[-1:], gain, bias, eps)

    for function, kind in ((layer_norm_of_sum, None), (plainly, torch.float64)):
        leaves = [t.to(kind or t.dtype).clone().requires_grad_() for t in given]
        y = function(*leaves, *(() if affine else (None, None)), 1e-2)
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for got, want, own in zip(*found, [dtype, dtype, dtype, torch.float32, torch.float32], strict=False):
        assert got.dtype == own and got.shape == want.shape
        difference = (got.double() - want).abs().max()
        assert difference <= 4 * torch.finfo(own).eps * want.abs().max().clamp(min=1)


def test_the_operator_says_what_it_does():
    x, shift, mean = torch.randn(9, 6), torch.randn(6), torch.randn(9)
    given = (x, x, shift, shift, mean, mean.exp())
    torch.library.opcheck(layer_norm_gradient, given, test_utils=("test_schema", "test_faketensor"))
