"""Attention in chunks: definitions checked by loops, the fused form against the reference, gradients included."""

import math
from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from mega_scale.ops.attention import ChunkDocuments, causal_attention, chunk_attention, rotate, toeplitz


def make_case(batch=2, chunks=3, queries=7, keys=7, z=6, e=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, chunks, queries, z), (batch, chunks, keys, z), (batch, chunks, keys, e), (queries + keys - 1,))
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("queries,keys,offset", [(1, 1, 0), (5, 5, 0), (1, 9, 8), (4, 9, 5)])
def test_toeplitz_holds_each_distance_once(queries, keys, offset):
    matrix = toeplitz(torch.arange(1 - queries, keys) - offset, queries)
    want = torch.arange(keys)[None, :] - (torch.arange(queries)[:, None] + offset)
    assert torch.equal(matrix, want)


@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries,offset", [(7, 0), (1, 6), (3, 4)])
def test_reference_is_the_definition(activation, causal, queries, offset):
    q, k, v, bias = make_case(queries=queries)
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[0, 2, 5:] = False
    got, weights = chunk_attention(
        q, k, v, bias, activation=activation, causal=causal, offset=offset, key_mask=mask, return_weights=True
    )
    for b in range(2):
        for c in range(3):
            for i in range(queries):
                seen = [j for j in range(7) if mask[b, c, j] and (not causal or j <= i + offset)]
                count = i + offset + 1 if causal else int(mask[b, c].sum())
                row = torch.zeros(7)
                for j in seen:
                    dot = q[b, c, i] @ k[b, c, j]
                    at = bias[queries - 1 + j - i]
                    score = dot / math.sqrt(6) + at if activation == "softmax" else dot / count + at
                    row[j] = {
                        "softmax": score.exp(),
                        "laplace": 0.5 * (1 + math.erf((float(score.detach()) - 0.707107) / (0.282095 * math.sqrt(2)))),
                        "relu2": max(float(score.detach()), 0.0) ** 2,
                    }[activation]
                if activation == "softmax":
                    row = row / row.sum()
                torch.testing.assert_close(weights[b, c, i], row, atol=2e-6, rtol=1e-5)
                torch.testing.assert_close(got[b, c, i], row @ v[b, c], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries,keys,offset", [(1, 1, 0), (7, 7, 0), (63, 63, 0), (1, 9, 8), (3, 9, 6)])
def test_fused_softmax_matches_the_reference(queries, keys, offset, masked, causal):
    mask = None
    if masked:
        mask = torch.ones(2, 3, keys, dtype=torch.bool)
        mask[0, 2, (keys + 1) // 2 :] = False
        mask[1, 1] = False
    results = []
    for impl in ("eager", "sdpa"):
        leaves = make_case(queries=queries, keys=keys)
        out, _ = chunk_attention(*leaves, causal=causal, offset=offset, key_mask=mask, impl=impl)
        out.mul(torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for name, got, want in zip(("out", "dq", "dk", "dv", "dbias"), results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
def test_nothing_becomes_nan_where_no_key_is_valid(activation):
    q, k, v, bias = make_case()
    mask = torch.zeros(2, 3, 7, dtype=torch.bool)
    mask[0, 0, 4:] = True
    for causal in (False, True):
        out, weights = chunk_attention(
            q, k, v, bias, activation=activation, causal=causal, key_mask=mask, return_weights=True
        )
        out.sum().backward()
        assert torch.isfinite(out).all() and torch.isfinite(q.grad).all() and torch.isfinite(bias.grad).all()
        assert (weights[0, 0, :, :4] == 0).all()
        empty = weights[1].sum(-1)
        torch.testing.assert_close(empty, torch.ones_like(empty) if activation == "softmax" else empty * 0)


def test_refusals_name_what_is_wrong():
    q, k, v, bias = make_case()
    for arguments, words in (
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"impl": "flash"}, "impl='flash'"),
        ({"impl": "sdpa", "activation": "relu2"}, "eager"),
        ({"impl": "sdpa", "return_weights": True}, "eager"),
        ({"key_mask": torch.ones(2, 3, 7)}, "key_mask is"),
        ({"scale": 1.0, "activation": "laplace"}, "scale=1.0 is of softmax alone"),
    ):
        with pytest.raises(ValueError, match=words):
            chunk_attention(q, k, v, bias, **arguments)
    with pytest.raises(ValueError, match="bias has shape"):
        chunk_attention(q, k, v, bias[1:])
    with pytest.raises(ValueError, match="q, k and v are"):
        chunk_attention(q.unsqueeze(2), k, v, bias)


@pytest.mark.parametrize("chunk,block", [(1, 4), (7, 3), (8, 4), (9, 4), (5, 8), (65, 64)])
@pytest.mark.parametrize("heads,biased,scale", [(None, True, None), (3, False, 1.0), (2, True, 0.7), (None, False, 1)])
def test_causal_blocks_are_the_reference(chunk, block, heads, biased, scale):
    case = [t.detach().double() for t in make_case(queries=chunk, keys=chunk)]
    if heads is not None:
        case[:3] = [torch.randn(2, 3, heads, *t.shape[2:], dtype=torch.float64) for t in case[:3]]
    case = [t.requires_grad_() for t in case[: 4 if biased else 3]]
    want, _ = chunk_attention(*case, causal=True, scale=scale, impl="eager")
    got = causal_attention(*case[:3], case[3] if biased else None, scale, block)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    probe = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pairs = zip(*(torch.autograd.grad(out, case, probe) for out in (got, want)), strict=True)
    for name, (found, expected) in zip(("dq", "dk", "dv", "dbias"), pairs, strict=False):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("impl", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("extra", ["nothing", "mask", "documents", "rows", "one query", "laplace"])
def test_heads_attend_as_each_does_alone(impl, extra):
    """A head axis is a loop over heads, with the same bias, mask, documents and offsets for each."""
    if extra == "laplace" and impl == "sdpa":
        pytest.skip("sdpa is softmax only")
    heads, queries, settings = 3, 7, {"causal": True, "impl": impl}
    if extra == "mask":
        settings["key_mask"] = torch.ones(2, 2, 7, dtype=torch.bool)
        settings["key_mask"][0, 1, 5:] = settings["key_mask"][1, 0, :2] = False
    elif extra == "documents":
        numbers = torch.tensor([[[0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 2, 2, 2, 3]], [[0, 1, 1, 1, 1, 1, 1], [2] * 7]])
        settings["documents"] = ChunkDocuments.of(numbers)
    elif extra == "rows":
        queries, settings["offset"] = 3, torch.tensor([4, 2])
    elif extra == "one query":
        queries, settings["offset"] = 1, 6
    else:
        settings |= {"activation": "laplace"} if extra == "laplace" else {"scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, heads, queries, 4), (2, 2, heads, 7, 4), (2, 2, heads, 7, 5))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    bias = torch.randn(2, queries + 6, generator=generator, dtype=torch.float64)[: None if extra == "rows" else 1]
    bias = (bias if extra == "rows" else bias[0]).requires_grad_()
    for own in (bias, None):
        out, _ = chunk_attention(q, k, v, own, **settings)
        alone = [chunk_attention(q[:, :, h], k[:, :, h], v[:, :, h], own, **settings)[0] for h in range(heads)]
        results = [
            [t.detach(), *torch.autograd.grad(t.square().sum(), [q, k, v, *([] if own is None else [own])])]
            for t in (out, torch.stack(alone, 2))
        ]
        assert torch.isfinite(results[0][0]).all()
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    if impl != "sdpa":
        _, weights = chunk_attention(q, k, v, **{**settings, "impl": "eager", "return_weights": True})
        dropped, _ = chunk_attention(q, k, v, **{**settings, "impl": "eager", "dropout": lambda w: w.mul(2)})
        torch.testing.assert_close(dropped, 2 * weights @ v, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rotation_turns_neighbours_and_its_gradient_turns_back(dtype, tolerance, by_row):
    x = torch.randn(2, 5, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    positions = torch.tensor([[4000, 4001, 0, 1, 2], [-2, -1, 0, 1, 2]])
    positions = positions if by_row else positions[0]
    found = rotate(x.requires_grad_(), positions, 1e4)
    assert found.dtype == dtype
    leaf = x.detach().double().requires_grad_()
    angles = positions.double()[..., None] * 1e4 ** (-torch.arange(0, 6, 2).double() / 6)
    turned = (
        torch.view_as_complex(leaf.unflatten(-1, (3, 2))) * torch.polar(torch.ones(()).double(), angles)[..., None, :]
    )
    want = torch.view_as_real(turned).flatten(-2)
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = [
        (found, want),
        (torch.autograd.grad(found, x, probe.to(dtype))[0], torch.autograd.grad(want, leaf, probe)[0]),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got.double(), expected, atol=4 * tolerance, rtol=tolerance)


def test_rotation_is_the_same_compiled_traced_and_twice_differentiable():
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(5)
    want = rotate(x, positions, 1e4)
    for form in (torch.compile(rotate, backend="aot_eager", fullgraph=True), rotate):
        torch.testing.assert_close(form(x, positions, 1e4), want)
    jacobian = torch.func.jvp(lambda x: rotate(x, positions, 1e4), (x,), (x,))[1]
    torch.testing.assert_close(jacobian, want)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, positions, 1e4), x)
    shifted = torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view_as(x)  # from an odd place of memory
    torch.testing.assert_close(rotate(shifted, positions, 1e4), want)
    with pytest.raises(ValueError, match="width=5 is odd"):
        rotate(x[..., :5], positions, 1e4)


def test_causal_blocks_refuse_what_they_lack():
    q, k, v, bias = make_case()
    torch.testing.assert_close(
        chunk_attention(q, k, v, bias, causal=True, impl="causal"), chunk_attention(q, k, v, bias, causal=True)
    )
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    for options in ({}, {"causal": True, "key_mask": mask}, {"causal": True, "activation": "laplace"}):
        with pytest.raises(ValueError, match="impl='causal' is softmax"):
            chunk_attention(q, k, v, bias, impl="causal", **options)


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_graph_is_as_long_for_every_chunk(bias):
    """However many blocks of queries a chunk has."""

    def nodes(chunks, length):
        torch.compiler.reset()
        counts = []

        def counting(graph, inputs):
            counts.append(len(graph.graph.nodes))
            return graph.forward

        leaves = [torch.randn(1, chunks, length, width, requires_grad=True) for width in (4, 4, 6)]
        leaves += [torch.randn(2 * length - 1, requires_grad=True)] if bias else []
        # The backward pass is traced as well.
        compiled = torch.compile(
            partial(chunk_attention, causal=True), fullgraph=True, dynamic=False,
            backend=aot_autograd(fw_compiler=counting, bw_compiler=counting),
        )  # fmt: skip
        found = torch.autograd.grad(compiled(*leaves)[0].square().sum(), leaves)
        expected = torch.autograd.grad(chunk_attention(*leaves, causal=True)[0].square().sum(), leaves)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want)
        return counts

    assert nodes(2, 128) == nodes(3, 300) == nodes(1, 130)
