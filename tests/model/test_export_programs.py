"""torch.export: programs made at one batch and length give the model's values at others, caches included."""

import pytest
import torch
from builders import make_ids, make_model
from every_class import answers, inputs_of, make
from torch.export import Dim, export
from torch.utils import _pytree as pytree

SIZES = ((1, 4), (3, 8), (1, 9), (2, 45), (3, 1100))
LONGEST = 2**40


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Called(torch.nn.Module):
    """A model as exporters take one: named inputs, and a tuple of tensors and caches."""

    def __init__(self, model, use_cache):
        super().__init__()
        self.model, self.use_cache = model, use_cache

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        cache = {"past_key_values": past_key_values, "use_cache": True} if self.use_cache else {}
        outputs = self.model(input_ids, attention_mask=attention_mask, **cache)
        return (answers(outputs), outputs.past_key_values) if self.use_cache else answers(outputs)


def exported(model, inputs, use_cache=False, dim=Dim.AUTO):
    shapes = {key: [dict.fromkeys(range(t.dim()), dim) for t in pytree.tree_leaves(v)] for key, v in inputs.items()}
    shapes = {key: v if key == "past_key_values" else v[0] for key, v in shapes.items()}
    program = export(Called(model, use_cache), (), inputs, dynamic_shapes=shapes if dim else None)
    assert all(bounds.upper > LONGEST for bounds in program.range_constraints.values()), program.range_constraints
    return program.module()


def batch_of(batch, length, masked):
    """Ids and, with `masked`, a mask with two columns of padding on the left of the first row."""
    ids = make_ids(batch, length, seed=length)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masked", "changes"),
    [
        (False, {}),
        pytest.param(True, {"use_chunking": False}, marks=pytest.mark.slow),
        pytest.param(
            True, {"attention_activation": "laplace", "relative_positional_bias": "simple"}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_forward(masked, changes):
    model = make_model(num_hidden_layers=1, use_cache=False, **changes)
    program = exported(model, batch_of(2, 6, masked))
    for size in SIZES:
        inputs = batch_of(*size, masked)
        assert_close(program(**inputs)[:, 2:], model(**inputs).logits[:, 2:])


@pytest.mark.slow
def test_lengths_have_no_bounds():
    model, (batch, length) = make_model(num_hidden_layers=1, use_cache=False), (Dim("batch"), Dim("length"))
    program = export(Called(model, False), (make_ids(2, 21),), dynamic_shapes=({0: batch, 1: length},))
    assert_close(program.module()(make_ids(3, 200)), model(make_ids(3, 200)).logits)


@pytest.mark.slow
def test_an_encoder():
    kind = "MegaForSequenceClassification"
    model = make(kind, num_hidden_layers=1)
    program = exported(model, inputs_of(kind))
    for size in SIZES[:4]:
        inputs = batch_of(*size, True)
        assert_close(program(**inputs), model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masked", "new", "changes"),
    [
        (True, 1, {}),
        pytest.param(False, 1, {"use_chunking": False}, marks=pytest.mark.slow),
        pytest.param(False, 3, {"attention_activation": "relu2"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_prefill_and_decoding(masked, new, changes):
    model = make_model(num_hidden_layers=1, **changes)
    # How many tokens a step takes does not matter to the program of a prefill.
    prefill = exported(model, batch_of(2, 21, masked), use_cache=True) if new == 1 else Called(model, True)
    sample = batch_of(2, 10 + new, masked)
    past = model(**batch_of(2, 10, masked), use_cache=True).past_key_values
    step = exported(
        model, {**sample, "input_ids": sample["input_ids"][:, :new].clone(), "past_key_values": past}, use_cache=True
    )
    for batch, length in SIZES[:4]:
        inputs = batch_of(batch, length + 5 * new, masked)
        begun = {key: value[:, :length].contiguous() for key, value in inputs.items()}
        expected = model(**begun, use_cache=True)
        logits, cache = prefill(**begun)
        assert_close(logits[:, 2:], expected.logits[:, 2:])
        for end in range(length + new, length + 5 * new + 1, new):
            now = {key: value[:, :end].contiguous() for key, value in inputs.items()}
            now["input_ids"] = now["input_ids"][:, -new:].contiguous()
            logits, cache = step(**now, past_key_values=cache)
            expected = model(**now, past_key_values=expected.past_key_values)
            assert_close(logits, expected.logits)
        assert cache.get_seq_length() == end


def test_a_step_of_fixed_sizes_holds_at_other_positions():
    model, ids = make_model(num_hidden_layers=1), make_ids(2, 30)
    cache = model(ids[:, :10], use_cache=True).past_key_values
    step = exported(model, {"input_ids": ids[:, :1].clone(), "past_key_values": cache}, use_cache=True, dim=None)
    expected = model(ids).logits
    for place in range(10, 30):
        logits, cache = step(input_ids=ids[:, place : place + 1].contiguous(), past_key_values=cache)
        assert_close(logits[:, 0], expected[:, place])
