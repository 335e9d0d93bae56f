"""Traces and transforms of torch.func: the numbers at other inputs and sizes, and every derivative, or a refusal."""

import pytest
import torch
from builders import make_ids, make_model
from torch.fx.experimental.proxy_tensor import make_fx

OPTIONS = [{}, {"use_chunking": False}, {"attention_activation": "relu2", "relative_positional_bias": "simple"}]
# Native kernels take tensors of this size.
WIDE = {"hidden_size": 96, "intermediate_size": 128, "nffn_hidden_size": 128}
options = pytest.mark.parametrize("changes", OPTIONS, ids=str)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@options
def test_make_fx_sees_everything(changes):
    model = make_model(**changes, **WIDE)
    ids, other = make_ids(4, 45), make_ids(4, 45, seed=5)
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[0, :5] = 0
    traced = make_fx(lambda ids, mask: model(ids, attention_mask=mask, use_cache=False).logits)(ids, mask)
    assert_close(traced(other, padded)[:, 5:], model(other, attention_mask=padded, use_cache=False).logits[:, 5:])
    traced = make_fx(lambda ids: model(ids, labels=ids, skip_logits=True).loss)(ids)
    assert_close(traced(other), model(other, labels=other).loss)


@options
@pytest.mark.parametrize("length", [6, 45])
def test_jit_traces_hold_at_other_lengths(changes, length):
    model = Logits(make_model(**changes, **WIDE)).requires_grad_(False)
    traced = torch.jit.trace(model, (make_ids(2, length),), check_trace=False)
    for size in ((2, length), (3, 45), (1, 7)):
        other = make_ids(*size, seed=3)
        assert_close(traced(other), model(other))


@options
def test_derivatives_by_transforms_are_those_of_backward(changes):
    model, ids = make_model(**changes), make_ids(2, 21)
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values, ids):
        return torch.func.functional_call(model, values, (ids,), {"labels": ids}).loss

    for found, wanted in zip(torch.func.grad(loss)(values, ids).values(), expected, strict=True):
        assert_close(found, wanted)
    each = torch.func.vmap(torch.func.grad(lambda values, row: loss(values, row[None])), (None, 0))(values, ids)
    for found, wanted in zip(each.values(), expected, strict=True):
        assert_close(found.mean(0), wanted)
    along = {name: torch.randn_like(value) for name, value in values.items()}
    slope = torch.func.jvp(lambda values: loss(values, ids), (values,), (along,))[1]
    assert_close(slope, sum((a * b).sum() for a, b in zip(along.values(), expected, strict=True)))


@pytest.mark.parametrize(
    "changes", [{}, {"attention_activation": "laplace"}, {"normalization_type": "rmsnorm"}], ids=str
)
def test_a_graph_of_gradients_is_refused(changes):
    """`torch.autograd.grad` of chosen inputs would leave out what has no second derivative."""
    model, ids = make_model(**changes), make_ids(2, 21)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*torch\.func"):
        torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()), create_graph=True)


def test_second_derivatives_by_transforms():
    model, ids = make_model().double(), make_ids(1, 13)
    values = {name: value.detach() for name, value in model.named_parameters()}
    name = "mega.layers.0.mega_layer.qk_bias"

    def loss(value):
        return torch.func.functional_call(model, {**values, name: value}, (ids,), {"labels": ids}).loss

    slope = torch.func.grad(loss)
    along = torch.randn_like(values[name])
    found = torch.func.jvp(slope, (values[name],), (along,))[1]
    step = 1e-5
    wanted = (slope(values[name] + step * along) - slope(values[name] - step * along)) / (2 * step)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)
