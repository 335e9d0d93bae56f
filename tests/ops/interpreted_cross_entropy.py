"""The loss's Triton kernel, interpreted on a CPU, against the plain form. `test_cross_entropy.py` runs this file.

It needs a process of its own: TRITON_INTERPRET has to be set before anything imports triton.
"""

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_cross_entropy.py, which sets TRITON_INTERPRET"

# ruff: noqa: E402
import pytest
import torch
from interpreting import round_bf16
from test_cross_entropy import gradients, made, plain

from mega_scale.ops import cross_entropy_triton
from mega_scale.ops.linear import VocabularyPart, linear_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens,words,step,slice_tokens", [(1, 2, 4096, None), (9, 37, 16, 4), (12, 259, 4096, None)])
def test_equals_the_plain_form(tokens, words, step, slice_tokens, dtype, monkeypatch):
    """In bf16 it rounds logits and their gradients where the plain form does."""
    round_bf16(monkeypatch)
    monkeypatch.setattr(cross_entropy_triton, "_MOST_WORDS", step)
    inputs = made(tokens, 8, words, dtype, bias=tokens > 1)
    loss, expected = (linear_cross_entropy(*inputs, slice_tokens=slice_tokens, impl=i) for i in ("triton", "plain"))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    exact = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    for found, wanted in zip(gradients(loss, inputs[:3]), gradients(expected, inputs[:3]), strict=True):
        torch.testing.assert_close(found, wanted, **exact)


@pytest.mark.parametrize("first,words", [(0, 8), (8, 5), (16, 0)])
def test_a_part_of_the_vocabulary_has_its_share_of_the_gradient(first, words):
    """Of 13 words, 8 on each rank; the other ranks' numbers are known beforehand."""
    hidden, weight, bias, targets = made(6, 4, 13, torch.float32)
    targets[0] = -100
    scores = (hidden @ weight.t() + bias).detach()
    largest, there = scores.amax(1), targets >= 0
    hit = (scores.gather(1, targets.clamp(min=0)[:, None])[:, 0] - largest).where(there, 0)
    totals = {"max": largest, "sum": torch.stack([hit, (scores - largest[:, None]).exp().sum(1)])}

    def reduce(tensor, kind):
        tensor.copy_(totals[kind])

    own = [torch.zeros(8, *t.shape[1:]) for t in (weight, bias)]
    for mine, whole in zip(own, (weight, bias), strict=True):
        mine[:words] = whole.detach()[first : first + words]
    leaves = [hidden, *(t.requires_grad_() for t in own)]
    part = VocabularyPart(first, words, reduce)
    found = linear_cross_entropy(*leaves, targets, part=part, impl="triton")
    expected = plain(hidden, weight, bias, targets)
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(expected, (weight, bias))
    _, *got = torch.autograd.grad(found, leaves)
    for mine, whole in zip(got, slopes, strict=True):
        torch.testing.assert_close(mine[:words], whole[first : first + words])
        assert not mine[words:].any()


def test_large_logits_do_not_overflow():
    hidden, weight, bias, targets = made(8, 4, 9, torch.float32)
    loss = linear_cross_entropy(hidden * 1e5, weight, bias, targets, impl="triton")
    torch.testing.assert_close(loss, plain(hidden * 1e5, weight, bias, targets))


def test_operators_say_what_they_do():
    """Their schemas, the logits that they change among them, and what fake tensors get."""
    logits, targets, statistics = torch.randn(3, 10), torch.tensor([1, -100, 9]), torch.ones(3)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(cross_entropy_triton.cross_entropy, (logits, targets, 0, 10, True), **tests)
    given = (logits, targets, statistics, statistics, 0, 10)
    torch.library.opcheck(cross_entropy_triton.cross_entropy_gradient, given, **tests)
