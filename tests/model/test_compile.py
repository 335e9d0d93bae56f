"""torch.compile without graph breaks: forward, training and the decoding step, in a handful of graphs."""

import pytest
import torch
import torch._dynamo
from builders import make_ids, make_model

OPTIONS = [{}, {"use_chunking": False}, {"attention_activation": "laplace", "relative_positional_bias": "simple"}]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_backward(options):
    model, ids = make_model(**options), make_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for arguments in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            got, want = (f(ids, use_cache=False, **arguments).logits for f in (compiled, model))
        torch.testing.assert_close(got[:, 5:], want[:, 5:], atol=1e-5, rtol=1e-5)
    gradients = []
    for f in (compiled, model):
        model.zero_grad()
        f(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decoding_step(options):
    model, ids = make_model(**options), make_ids(2, 41)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        cache = model(ids[:, :10], use_cache=True).past_key_values
        for i in range(10, 41):
            logits = compiled(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], want[:, i], atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize("batch", [1, 2])
def test_lengths_share_a_few_graphs(batch):
    """One for the first length; then one each for a chunk at most, for whole chunks and for any other length."""
    model = make_model(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for length in (13, 21, 30, 11, 45):
            ids = make_ids(batch, length)
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
