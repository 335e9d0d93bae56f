"""Attention in chunks: definitions checked by loops, the fused form against the reference, gradients included."""

import math

import pytest
import torch

from mega_scale.ops.attention import (
    causal_attention,
    chunk_attention,
    toeplitz,
)


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
    ):
        with pytest.raises(ValueError, match=words):
            chunk_attention(q, k, v, bias, **arguments)
    with pytest.raises(ValueError, match="bias has shape"):
        chunk_attention(q, k, v, bias[1:])


@pytest.mark.parametrize("chunk,block", [(1, 4), (7, 3), (8, 4), (9, 4), (5, 8)])
def test_causal_blocks_are_the_reference(chunk, block):
    case = [t.detach().double().requires_grad_() for t in make_case(queries=chunk, keys=chunk)]
    probe = torch.randn(2, 3, chunk, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    want, _ = chunk_attention(*case, causal=True, impl="eager")
    got = causal_attention(*case, block=block)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    pairs = zip(*(torch.autograd.grad(out, case, probe) for out in (got, want)), strict=True)
    for name, (found, expected) in zip(("dq", "dk", "dv", "dbias"), pairs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12, msg=name)


def test_causal_blocks_refuse_what_they_lack():
    q, k, v, bias = make_case()
    torch.testing.assert_close(
        chunk_attention(q, k, v, bias, causal=True, impl="causal"), chunk_attention(q, k, v, bias, causal=True)
    )
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    for options in ({}, {"causal": True, "key_mask": mask}, {"causal": True, "activation": "laplace"}):
        with pytest.raises(ValueError, match="impl='causal' is softmax"):
            chunk_attention(q, k, v, bias, impl="causal", **options)
