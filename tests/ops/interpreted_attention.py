"""Attention's Triton kernels, interpreted on a CPU, against the reference. `test_attention_triton.py` runs this file.

It needs a process of its own: TRITON_INTERPRET has to be set before anything imports triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_attention_triton.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
from functools import partial

import pytest
import torch
from interpreting import round_bf16
from torch._dynamo.backends.common import aot_autograd

from mega_scale.ops import attention_triton
from mega_scale.ops.attention import ChunkDocuments, chunk_attention
from mega_scale.ops.elementwise import PositionalDropout

NAMES = ("out", "dq", "dk", "dv", "dbias")
GATED = ("out", "dq", "dk", "dv", "dgate", "dshift")
PLACE = (123456789, 5, 1000, 3 * 2**20)  # of dropout: key, first row, position and column


def results(impl, leaves, gradient, documents, scale, dropout):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out, _ = chunk_attention(*leaves, causal=True, impl=impl, documents=documents, scale=scale, dropout=dropout)
    found = torch.autograd.grad(out, leaves, gradient.to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *found), strict=False))


def narrow_tiles(monkeypatch):
    """Several tiles and blocks in few tokens."""
    sizes = {"ROWS": 16, "KEYS": 16, "DEPTH": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(attention_triton, "ROWS", 16)
    monkeypatch.setattr(attention_triton, "BLOCK", 32)
    monkeypatch.setattr(attention_triton, "tile", lambda narrow: sizes)


# batch, chunks, heads (none: no axis of them, but a positional bias), tokens of a chunk, Z, E, share of tokens that
# begin a document (none: no documents), share of weights that are dropped, and whether tiles are narrow
CASES = [
    (1, 1, None, 1, 2, 3, None, 0.0, False),
    (2, 3, None, 5, 6, 5, None, 0.3, False),
    (1, 2, None, 16, 4, 20, 0.2, 0.0, True),
    (2, 1, None, 18, 3, 2, 1.0, 0.0, True),
    (2, 1, None, 40, 20, 8, 0.05, 0.5, True),
    (1, 1, None, 100, 8, 4, None, 0.0, False),
    (1, 2, 2, 37, 4, 4, 0.05, 0.1, True),
    (1, 1, None, 129, 4, 4, 0.02, 0.0, False),
    (2, 1, 1, 7, 2, 3, None, 0.0, True),
    (1, 1, 3, 33, 4, 4, None, 0.0, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_reference(case, dtype, monkeypatch):
    """Interpreted, they take fp32 as well, in which nothing is rounded."""
    round_bf16(monkeypatch)
    batch, chunks, heads, length, z, e, share, p, narrow = case
    if narrow:
        narrow_tiles(monkeypatch)
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
    dropout = PositionalDropout(p, *PLACE) if p else 0.0
    got = results("triton", leaves, gradient, documents, scale, dropout)
    want = results("eager", [leaf.double() for leaf in leaves], gradient, documents, scale, dropout)
    assert got.keys() == want.keys()
    for name in got:
        error = (got[name].double() - want[name]).abs().max() / want[name].abs().max().clamp(min=1)
        # Of few tokens, dropped weights leave a bias's gradient that is small beside what cancels in it.
        bound = 1e-5 if dtype == torch.float32 else 3e-2 if p else 2e-2
        # not <=, so that NaN fails
        assert error <= bound, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads, share, p", [(None, None, 0.0), (2, 0.05, 0.1), (3, None, 0.0)])
def test_a_gate_has_its_gradients_with_those_of_attention(heads, share, p, dtype, monkeypatch):
    round_bf16(monkeypatch)
    narrow_tiles(monkeypatch)
    before, generator = (2, 1) if heads is None else (2, 1, heads), torch.Generator().manual_seed(5)
    leaves = [torch.randn(*before, 37, w, generator=generator).bfloat16().to(dtype) for w in (4, 4, 6, 6)]
    leaves += [torch.randn((heads or 1) * 6, generator=generator)]
    gradient = torch.randn(*before, 37, 6, generator=generator).bfloat16()
    begins = torch.rand(2, 37, generator=generator) < (share or 0)
    rules = {"documents": ChunkDocuments.of(begins.cumsum(1)[:, None]) if share else None, "scale": 1.0, "causal": True}
    rules["dropout"] = PositionalDropout(p, *PLACE) if p else 0.0
    found = []
    for impl, kind in (("triton", None), ("eager", torch.float64)):
        given = [leaf.to(kind or leaf.dtype).clone().requires_grad_() for leaf in leaves]
        out, _ = chunk_attention(*given[:3], gate=(given[3], given[4]), impl=impl, **rules)
        found.append([out, *torch.autograd.grad(out, given, gradient.to(out.dtype))])
    for name, got, want in zip(GATED, *found, strict=True):
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
        assert error <= (1e-5 if dtype == torch.float32 else 3e-2), f"{name} differs by {error:.1e}"


def test_a_long_chunk_in_bf16_with_documents(monkeypatch):
    test_kernels_match_the_reference((1, 1, None, 512, 8, 4, 0.005, 0.0, False), torch.bfloat16, monkeypatch)


def test_every_query_is_counted_in_the_bias_of_several_programs(monkeypatch):
    monkeypatch.setattr(attention_triton, "_PROGRAMS", 3)
    test_kernels_match_the_reference((5, 1, None, 20, 4, 4, None, 0.0, True), torch.float32, monkeypatch)


@pytest.mark.parametrize("placed", [False, True], ids=["", "placed"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_operators_say_what_they_return(p, placed):
    """Their schemas, what fake tensors get, and that compilers can take them."""
    q, k, v = (torch.randn(2, 20, 3, width).bfloat16() for width in (4, 4, 6))
    bias, since = torch.randn(39), torch.zeros(6, 20, dtype=torch.int32)
    place, drop = torch.tensor(PLACE[:3]) if placed else None, (2, p, *PLACE)
    weights, dropped = attention_triton.softmax_weights(q, k, bias, since, place, 0.5, *drop)
    delta = torch.randn(2, 20, 3)
    for operator, given in (
        ("softmax_weights", (q, k, bias, since, place, 0.5, *drop)),
        ("weighted_values", (weights, v)),
        ("row_products", (v, v)),
        ("scores_gradient", (v, v, weights, delta, place, *drop)),
        ("score_products", (weights, q, k, 0.5)),
        ("values_gradient", (weights, v)),
        ("distance_sums", (weights,)),
    ):
        torch.library.opcheck(getattr(attention_triton, operator), given, test_utils=("test_schema", "test_faketensor"))
    assert dropped.numel() == (weights.numel() if p else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("first", [PLACE[:3], (2**32 - 1, 2**31, 2**32 - 2)], ids=["", "large"])
def test_weights_are_dropped_as_by_the_plain_form(first, dtype, monkeypatch):
    """To the bit, by a place that the kernels read from a tensor as by numbers; and so again in the backward pass."""
    round_bf16(monkeypatch)
    narrow_tiles(monkeypatch)
    rows, chunks, heads, chunk = 2, 3, 2, 20
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows * chunks, chunk, heads, w, generator=generator).to(dtype) for w in (4, 4, 6))
    delta = torch.randn(rows * chunks, chunk, heads, generator=generator)
    drop = PositionalDropout(0.3, *first, PLACE[3])
    for place, numbers in ((None, drop[:5]), (torch.tensor(first), (0.3, 0, 0, 0, PLACE[3]))):
        weights, dropped = attention_triton.softmax_weights(q, k, None, None, place, 0.5, chunks, *numbers)
        plain = drop(weights.view(rows, chunks, heads, chunk, chunk)).reshape(weights.shape)
        seen = torch.ones(chunk, chunk, dtype=torch.bool).tril()
        assert torch.equal(dropped * seen, plain * seen) and (dropped == 0).sum() > (weights == 0).sum()
        _, again = attention_triton.scores_gradient(v, v, weights, delta, place, chunks, *numbers)
        assert torch.equal(again * seen, plain * seen)


@pytest.mark.parametrize("placed", [False, True], ids=["", "placed"])
def test_compilers_take_them_whole_and_compute_delta_themselves(placed):
    """One graph each way, in which the sum that the backward pass needs can join the kernel before it.

    Where the place of dropout is a tensor, as in compiled blocks, the same weights are dropped.
    """
    graphs = []

    def counting(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    leaves = [torch.randn(1, 2, 20, width, requires_grad=True) for width in (4, 4, 6)]
    numbers = (torch.rand(1, 40, generator=torch.Generator().manual_seed(0)) < 0.2).cumsum(1).unflatten(1, (2, 20))
    attend = partial(chunk_attention, causal=True, impl="triton", documents=ChunkDocuments.all_several(numbers))
    drop = PositionalDropout(0.2, *PLACE)
    own = PositionalDropout(0.2, 0, 0, 0, PLACE[3], place=torch.tensor(PLACE[:3])) if placed else drop
    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=counting, bw_compiler=counting))
    outs = [compiled(*leaves, dropout=own)[0], attend(*leaves, dropout=drop)[0]]
    assert torch.equal(*outs)
    for got, want in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in outs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    forward, backward = graphs
    assert "mega_scale.softmax_weights.default" in forward and "mega_scale.scores_gradient.default" in backward
    assert not any("row_products" in name for name in backward)


def test_what_they_lack_is_refused():
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="impl='triton' is softmax over the keys up to each query alone"):
        chunk_attention(q, q, q, torch.zeros(7), causal=False, impl="triton")
    with pytest.raises(ValueError, match="dropout but by place"):
        chunk_attention(q, q, q, torch.zeros(7), causal=True, dropout=0.1, impl="triton")
