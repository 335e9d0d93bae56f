"""Models without numbers: the meta device, fake tensors, and devices that have no autocast."""

import pytest
import torch
from every_class import CLASSES, answers, inputs_of, labels_of, make
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import mega_scale
from mega_scale.ops import autocast_dtype, without_autocast


def run(model, kind, inputs):
    outputs = model(**inputs)
    (answers(outputs).sum() if kind == "MegaModel" else outputs.loss).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)
    return answers(outputs)


OPTIONS = [{}, {"use_chunking": False}, {"attention_activation": "laplace"}]
# Heads share their backbone: it is tried with every option once, in training and not, and each head with one.
CASES = [("MegaForCausalLM", changes, training) for changes in OPTIONS for training in (False, True)]
CASES += [(kind, OPTIONS[number % 3], number % 2 == 0) for number, kind in enumerate(CLASSES) if kind != CASES[0][0]]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes", "training"), CASES, ids=str)
def test_forward_and_backward(kind, changes, training):
    changes = {**changes, "dropout_prob": 0.1, "normalization_type": "scalenorm"}
    inputs = inputs_of(kind)
    inputs.update({} if kind == "MegaModel" else labels_of(kind, inputs))
    model = make(kind, **changes).train(training)
    expected = answers(model(**inputs)).shape
    on_meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
    found = run(model.to("meta"), kind, on_meta)
    assert found.is_meta and found.shape == expected
    with FakeTensorMode():
        fake = getattr(mega_scale, kind)(model.config).train(training)
        found = run(fake, kind, {name: torch.empty(t.shape, dtype=t.dtype) for name, t in inputs.items()})
    assert isinstance(found, FakeTensor) and found.shape == expected


@pytest.mark.parametrize("changes", [{}, {"use_chunking": False}], ids=str)
def test_decoding(changes):
    model, ids = make("MegaForCausalLM", **changes).to("meta"), torch.empty(2, 13, dtype=torch.long, device="meta")
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for length in (1, 4, 1):
            outputs = model(ids[:, :length], past_key_values=cache)
        assert outputs.logits.shape == (2, 1, 61) and cache.get_seq_length() == 19
        loss = model(ids, labels=ids, skip_logits=True).loss
    assert loss.is_meta and loss.shape == ()


@pytest.mark.parametrize("kind", ["meta", "mps", "xpu", "privateuseone", "cpu", "cuda"])
def test_devices_without_autocast_go_on_without(kind):
    device = torch.device(kind)
    assert autocast_dtype(device) is None
    with without_autocast(device):
        pass
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(torch.device("cpu")) is torch.bfloat16
        with without_autocast(torch.device("cpu")):
            assert autocast_dtype(torch.device("cpu")) is None


def test_defaults_for_new_tensors_do_not_change_numbers():
    """C++ writes into tensors like those it reads."""
    model, inputs = make("MegaForCausalLM", hidden_size=256, intermediate_size=512), inputs_of("MegaForCausalLM", 12)
    expected = model(**inputs).logits
    torch.set_default_dtype(torch.float64)
    try:
        found = model(**inputs).logits
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
