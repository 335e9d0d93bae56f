"""Megalodon under tracers, transforms, compilers and exporters: the numbers at other sizes, too."""

import pytest
import torch
from builders import make_ids, make_model
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx


def megalodon(**changes):
    return make_model(kind="MegalodonForCausalLM", **changes)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Called(torch.nn.Module):
    """Logits of ids and a mask, and with a cache the one to go on with."""

    def __init__(self, model, use_cache):
        super().__init__()
        self.model, self.use_cache = model.requires_grad_(False), use_cache

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        outputs = self.model(input_ids, attention_mask, past_key_values=past_key_values, use_cache=self.use_cache)
        return (outputs.logits, outputs.past_key_values) if self.use_cache else outputs.logits


def padded(batch, length):
    ids, mask = make_ids(batch, length, seed=length), torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    return ids, mask


def test_traces_hold_at_other_inputs_and_lengths():
    called = Called(megalodon(), False)
    traced = torch.jit.trace(called, (make_ids(2, 21),), check_trace=False)
    for size in ((3, 45), (1, 7)):
        assert_close(traced(make_ids(*size)), called(make_ids(*size)))
    (ids, mask), (other, left) = (make_ids(3, 21), torch.ones(3, 21, dtype=torch.long)), padded(3, 21)
    assert_close(make_fx(called)(ids, mask)(other, left)[:, 2:], called(other, left)[:, 2:])


def test_derivatives_by_transforms_are_those_of_backward_which_has_no_second_ones():
    model, ids = megalodon(), make_ids(2, 21)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))

    def loss(values):
        return torch.func.functional_call(model, values, (ids,), {"labels": ids}).loss

    for found, wanted in zip(torch.func.grad(loss)(values).values(), expected, strict=True):
        assert_close(found, wanted)
    along = {name: torch.randn_like(value) for name, value in values.items()}
    slope = torch.func.jvp(loss, (values,), (along,))[1]
    assert_close(slope, sum((a * b).sum() for a, b in zip(along.values(), expected, strict=True)))
    with pytest.raises(RuntimeError, match=r"create_graph=True.*torch\.func"):
        torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()), create_graph=True)


@pytest.mark.slow
def test_one_compiled_graph_trains_at_every_length():
    model = megalodon(num_hidden_layers=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (21, 30):
        ids, found = make_ids(2, length), []
        torch._dynamo.mark_dynamic(ids, 1)
        for call in (compiled, model):
            model.zero_grad()
            loss = call(ids, labels=ids).loss
            loss.backward()
            found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        assert_close(*found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_an_exported_step_goes_on_with_the_cache_of_any_prompt():
    model = megalodon(num_hidden_layers=1)
    step = Called(model, True)
    ids, mask = padded(2, 11)
    cache = step(ids[:, :10], mask[:, :10])[1]
    inputs = {"input_ids": ids[:, 10:].clone(), "attention_mask": mask, "past_key_values": cache}
    shapes = {
        name: [dict.fromkeys(range(t.dim()), Dim.AUTO) for t in torch.utils._pytree.tree_leaves(value)]
        for name, value in inputs.items()
    }
    shapes = {name: value if name == "past_key_values" else value[0] for name, value in shapes.items()}
    program = export(step, (), inputs, dynamic_shapes=shapes).module()
    for batch, length in ((3, 8), (1, 5)):
        ids, mask = padded(batch, length + 12)
        expected = Called(model, False)(ids, mask)
        cache = step(ids[:, :length], mask[:, :length])[1]
        for end in range(length + 1, length + 13):
            now = ids[:, end - 1 : end].contiguous(), mask[:, :end].contiguous()
            logits, cache = program(input_ids=now[0], attention_mask=now[1], past_key_values=cache)
            assert_close(logits[:, 0], expected[:, end - 1])
