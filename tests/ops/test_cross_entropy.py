"""The sliced linear layer and cross-entropy against the plain one, gradients included."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_ema_triton import start
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mega_scale.ops import as_if
from mega_scale.ops.linear import linear_cross_entropy
from mega_scale.parallel.meter import Meter


def made(tokens, channels, words, dtype=torch.float64, bias=True, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, offset = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((tokens, channels), (words, channels), (words,))
    )
    targets = torch.randint(0, words, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, weight, offset if bias else None, targets


def plain(hidden, weight, bias, targets):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def gradients(loss, leaves):
    return torch.autograd.grad(loss * 0.7, [leaf for leaf in leaves if leaf is not None and leaf.requires_grad])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slice_tokens", [1, 5, 7, 64, None])
@pytest.mark.parametrize("tokens,channels,words", [(1, 3, 2), (21, 5, 13), (7, 16, 259)])
def test_equals_the_plain_loss(tokens, channels, words, slice_tokens, bias):
    inputs = made(tokens, channels, words, bias=bias)
    loss, expected = linear_cross_entropy(*inputs, slice_tokens=slice_tokens), plain(*inputs)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients(loss, inputs[:3]), gradients(expected, inputs[:3]), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs = made(9, 4, 11)
    for number in frozen:
        inputs[number].requires_grad_(False)
    loss, expected = linear_cross_entropy(*inputs, slice_tokens=4), plain(*inputs)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        for found, wanted in zip(gradients(loss, inputs[:3]), gradients(expected, inputs[:3]), strict=True):
            torch.testing.assert_close(found, wanted)


def test_rows_of_sequences():
    hidden, weight, bias, targets = made(12, 4, 6)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    found = linear_cross_entropy(hidden.view(3, 4, 4), weight, bias, targets.view(3, 4), slice_tokens=5)
    torch.testing.assert_close(found, expected)


def test_without_targets_the_loss_is_zero_and_has_gradients():
    hidden, weight, bias, targets = made(6, 4, 5, ignored=2)
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert loss == 0 and not any(gradient.any() for gradient in gradients(loss, (hidden, weight, bias)))


def test_large_logits_do_not_overflow():
    hidden, weight, bias, targets = made(8, 4, 9)
    loss = linear_cross_entropy(hidden * 1e5, weight, bias, targets, slice_tokens=3)
    torch.testing.assert_close(loss, plain(hidden * 1e5, weight, bias, targets))


def test_bf16_is_as_exact_as_the_plain_loss_in_bf16():
    inputs = made(400, 32, 50, torch.bfloat16)
    exact = [value.detach().double().requires_grad_() for value in inputs[:3]]
    loss, rounded, expected = linear_cross_entropy(*inputs, slice_tokens=7), plain(*inputs), plain(*exact, inputs[3])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)
    leaves = gradients(loss, inputs[:3]), gradients(rounded, inputs[:3]), gradients(expected, exact)
    for found, other, wanted in zip(*leaves, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() < 1.1 * (other.double() - wanted).norm()


def test_autocast_is_that_of_a_linear_layer():
    inputs = made(40, 32, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = linear_cross_entropy(*inputs), plain(*inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(loss, inputs[:3]))


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest result of any operation has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return found


def test_logits_are_never_whole():
    inputs = made(200, 4, 30)
    with Largest() as seen:
        gradients(linear_cross_entropy(*inputs, slice_tokens=10), inputs[:3])
    assert seen.numbers == 200 * 4, "neither logits nor their gradient, 6,000 numbers, but that of the hidden states"


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, bias, targets = made(6, 4, 5)
    with pytest.raises(ValueError, match=r"targets \(5,\) do not fit"):
        linear_cross_entropy(hidden, weight, bias, targets[:5])


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="impl='fused' is unknown: choose one of auto, plain, triton"):
        linear_cross_entropy(*made(6, 4, 5), impl="fused")


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
def test_bytes_of_a_logit_have_a_bound_on_a_gpu():
    """In bf16 written by the product, read and written by the kernel, read by two products: ten bytes."""
    tokens, channels, words = 4096, 64, 32000
    with FakeTensorMode(), as_if("cuda"):
        hidden, weight = (
            torch.empty(size, channels, dtype=torch.bfloat16, requires_grad=True) for size in (tokens, words)
        )
        with Meter() as meter:
            linear_cross_entropy(hidden, weight, None, torch.empty(tokens, dtype=torch.int64))
    weights = 32 * words * channels  # what sums gradients of the weight, in fp32
    assert sum(event.read + event.written for event in meter.events) <= 10.5 * tokens * words + weights
    # Once, in bf16.
    assert meter.peak <= 2.1 * tokens * words + weights


@pytest.mark.slow
@needs_triton
def test_the_interpreted_kernel_equals_the_plain_form():
    file = Path(__file__).with_name("interpreted_cross_entropy.py")
    done = start("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, TRITON_INTERPRET="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
