"""What spares memory in a block: hand-written backward passes, and results that are made again."""

import pytest
import torch
import torch.nn.functional as F

from mega_scale import MegaConfig, MegaForCausalLM, MegaForMaskedLM
from mega_scale.ops.gates import LEAN, PLAIN
from mega_scale.ops.remake import remade
from mega_scale.ops.rms import divide_by_rms, plain_divide_by_rms


def kept_by(function):
    """Numbers that the backward pass of a function keeps, and its result."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(storages.values()), result


def leaves(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def compare(lean, plain, inputs, tolerance):
    results = [function(*inputs) for function in (lean, plain)]
    probe = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(9), dtype=results[0].dtype)
    assert torch.equal(*results)
    for found, want in zip(*(torch.autograd.grad(out, inputs, probe) for out in results), strict=True):
        assert found.dtype == want.dtype and found.shape == want.shape
        torch.testing.assert_close(found, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name,count", [("gate", 2), ("update", 3)])
def test_lean_gates_equal_plain_ones(name, count, dtype, tolerance):
    # As in a block, they are slices of a wider product.
    (wide,) = leaves((2, 3, 5 * count), dtype=dtype)
    functions = [lambda t, gates=gates: getattr(gates, name)(*t.split(5, -1)) for gates in (LEAN, PLAIN)]
    compare(*functions, [wide], tolerance)


def test_lean_gates_keep_their_inputs_alone():
    for name, count in (("gate", 2), ("update", 3)):
        inputs = leaves(*[(2, 3, 4)] * count)
        assert kept_by(lambda name=name, inputs=inputs: getattr(LEAN, name)(*inputs))[0] == count * 24


@pytest.mark.parametrize("gain", [None, 1, 6])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_division_by_rms_equals_its_reference(gain, dtype, tolerance):
    inputs = leaves((2, 3, 6), *([] if gain is None else [(gain,)]), dtype=dtype)
    functions = [
        lambda x, gain=None, function=function: function(x, gain, 1e-3)
        for function in (divide_by_rms, plain_divide_by_rms)
    ]
    compare(*functions, inputs, tolerance)
    assert kept_by(lambda: functions[0](*inputs))[0] == 36 + 6 + (gain or 0)


def test_a_remade_result_is_not_kept_and_gradients_are_the_same():
    x, weight = leaves((2, 3, 4), (5, 4))
    active = F.silu(x)
    calls = []

    def again():
        calls.append(1)
        return F.silu(x)

    with remade(active, again):
        kept, out = kept_by(lambda: F.linear(active, weight))
    assert out.shape == (2, 3, 5) and kept  # the inner hooks are not ours here
    with remade(active, again):
        out = F.linear(active, weight)
    out.sum().backward()
    want = torch.autograd.grad(F.linear(F.silu(x), weight).sum(), (x, weight))
    assert calls and torch.equal(x.grad, want[0]) and torch.equal(weight.grad, want[1])


def test_other_tensors_are_kept_as_they_are():
    x, weight = leaves((2, 3, 4), (5, 4))
    active = F.silu(x)
    with remade(active, lambda: pytest.fail("made again")), torch.no_grad():
        F.linear(active, weight)
    with remade(active, lambda: pytest.fail("made again")):
        out = F.linear(active * 2, weight) + active[:, :1].sum()
    out.sum().backward()


@pytest.mark.parametrize("kind", ["scalenorm", "batchnorm", "layernorm"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_without_lean_parts_has_the_same_gradients(kind, recompute, monkeypatch):
    config = MegaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, intermediate_size=24, nffn_hidden_size=20,
        shared_representation_size=8, ema_projection_size=4, use_chunking=True, chunk_size=8,
        is_decoder=kind != "batchnorm", bidirectional=kind == "batchnorm", normalization_type=kind,
        dropout_prob=0.0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, nffn_activation_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    family = MegaForMaskedLM if kind == "batchnorm" else MegaForCausalLM
    model, tokens = family(config).train(), torch.arange(36).view(2, 18)
    if recompute:
        model.gradient_checkpointing_enable()

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = gradients()
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(statistics, strict=False)
    for module in model.modules():
        if hasattr(module, "gates"):
            module.gates = PLAIN
    monkeypatch.setattr("mega_scale.model.layers.divide_by_rms", plain_divide_by_rms)
    for place in ("attention", "layers"):
        monkeypatch.setattr(f"mega_scale.model.{place}.remade", lambda *_: torch.enable_grad())
    for name, want in gradients().items():
        torch.testing.assert_close(found[name], want, atol=1e-6, rtol=1e-5, msg=name)
    for name, buffer in model.named_buffers():
        assert torch.equal(after[name], buffer), name
