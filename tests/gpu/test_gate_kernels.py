"""Kernels of a compiled Megalodon's gates, queries and keys on a GPU, against fp64."""

import pytest
import torch
import torch.nn.functional as F

from mega_scale.ops.attention import turn, turns
from mega_scale.ops.elementwise import normalized_queries_and_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def normal(*shape, seed, dtype):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def check(found, exact):
    for got, want in zip(found, exact, strict=True):
        rounding = 2**-7 if got.dtype == torch.bfloat16 else 1e-5
        assert (got.double() - want).abs().max() <= rounding * want.abs().max().clamp(min=1)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 300), (1, 32768, 4096)])
def test_silu_of_a_sum_and_its_gradients(shape, dtype):
    from mega_scale.ops.gates_triton import silu_of_sum  # noqa: PLC0415  needs triton

    given = [normal(*shape, seed=1, dtype=dtype), normal(shape[-1], seed=2, dtype=dtype)]
    dy, found = normal(*shape, seed=3, dtype=dtype), []
    for function, kind in ((silu_of_sum, dtype), (lambda x, bias: F.silu(x + bias), torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in given]
        y = function(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(kind))])
    check(*found)


@DTYPES
@pytest.mark.parametrize("tokens, heads, width", [(1, 1, 1), (999, 3, 300), (32768, 2, 2048)])
def test_gradients_of_a_gate(tokens, heads, width, dtype):
    from mega_scale.ops.gates_triton import gate_gradients  # noqa: PLC0415  needs triton

    dy, out, x = (normal(tokens, heads * width, seed=seed, dtype=dtype) for seed in range(3))
    bias = normal(heads * width, seed=4, dtype=dtype)
    d_out, dx, delta, sums = gate_gradients(dy, out, x, bias, heads)
    leaves = [t.double().requires_grad_() for t in (out, x, bias)]
    exact = torch.autograd.grad(leaves[0] * F.silu(leaves[1] + leaves[2]), leaves, dy.double())
    means = (d_out.double() * out.double()).unflatten(1, (heads, width)).sum(-1)
    check([d_out, dx, sums.sum(0), delta.sum(-1)], [*exact, means])


@DTYPES
@pytest.mark.parametrize("batch, length, heads, width", [(1, 1, 1, 2), (2, 999, 3, 36), (1, 32768, 2, 256)])
def test_queries_and_keys_and_their_gradients(batch, length, heads, width, dtype):
    from mega_scale.ops.queries_triton import turned_queries_and_keys  # noqa: PLC0415  needs triton

    def plainly(z, bias, gamma, beta, rotary, heads, eps):
        q, k = normalized_queries_and_keys(z + bias, gamma, beta, heads, eps)
        return turn(q, rotary).flatten(2), turn(k, rotary).flatten(2)

    channels = heads * width
    shapes = (batch, length, channels), (channels,), (2, channels), (2, channels)
    given = [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    dy, found = [normal(batch, length, channels, seed=seed, dtype=dtype) for seed in (5, 6)], []
    for function, kind in ((turned_queries_and_keys, dtype), (plainly, torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in given]
        wide = torch.promote_types(kind, torch.float32)
        rotary = turns(torch.arange(length, device="cuda"), width, 1e4, wide)
        both = function(*leaves, rotary, heads, 1e-5)
        found.append([*both, *torch.autograd.grad(both, leaves, [t.to(kind) for t in dy])])
    check(*found)
