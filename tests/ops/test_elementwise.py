"""Gates, norms, and results that backward passes compute again instead of saving them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mega_scale import MegaConfig, MegaForCausalLM, MegaForMaskedLM
from mega_scale.ops.elementwise import EAGER, divide_by_rms, recomputed


def normalized(z, gamma, beta, heads=3, eps=1e-3):
    """arXiv 2404.08801, section 3.3, a head at a time."""
    parts = []
    for head in z.unflatten(-1, (heads, -1)).unbind(-2):
        parts.append(head / (head.square().mean(-1, keepdim=True) + eps).sqrt() / head.shape[-1] ** 0.5)
    whole = torch.cat(parts, -1)
    return tuple((whole * (gamma[i] + 1) + beta[i]).unflatten(-1, (heads, -1)) for i in (0, 1))


# The equations of arXiv 2209.10655 and 2404.08801, each with the shapes of what it takes.
EQUATIONS = {
    "queries_and_keys": (
        lambda z, kappa, mu: (kappa[0] * z * z.sigmoid() + mu[0], kappa[1] * z * z.sigmoid() + mu[1]),
        [(2, 33, 15), (2, 15), (2, 15)],
    ),
    "gate": (lambda attended, gate: attended * gate * gate.sigmoid(), [(2, 33, 15)] * 2),
    "normalized_queries_and_keys": (normalized, [(2, 33, 12), (2, 12), (2, 12)]),
    "swiglu": (lambda a, b: a * a.sigmoid() * b, [(2, 33, 15)] * 2),
    "update": (
        lambda x, update, h: update.sigmoid() * h * h.sigmoid() + (1 - update.sigmoid()) * x,
        [(2, 33, 15)] * 3,
    ),
    "average": (
        lambda y, x, omega: (y + omega * x) * (y + omega * x).sigmoid(),
        [(2, 33, 15), (2, 33, 15), (15,)],
    ),
}


def leaves(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


def with_gradients(function, inputs):
    """Results of a function, and the gradients of a sum of them with weights."""
    found = function(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    probes = leaves(*(t.shape for t in found), seed=9)
    return [
        *found,
        *torch.autograd.grad(found, inputs, [p.detach().to(t.dtype) for p, t in zip(probes, found, strict=True)]),
    ]


@pytest.mark.parametrize("name", EQUATIONS)
def test_gates_are_the_equations(name):
    equation, shapes = EQUATIONS[name]
    function = getattr(EAGER, name)
    if name == "normalized_queries_and_keys":
        function = partial(function, heads=3, eps=1e-3)
    found = with_gradients(function, leaves(*shapes, dtype=torch.float32))
    for got, want in zip(found, with_gradients(equation, leaves(*shapes)), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gain", [None, 1, 6])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_division_by_rms_is_its_equation(gain, dtype, tolerance):
    shapes = [(2, 3, 6), *([] if gain is None else [(gain,)])]

    def equation(x, gain=1.0):
        return gain * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    found = with_gradients(lambda x, gain=None: divide_by_rms(x, gain, 1e-3), leaves(*shapes, dtype=dtype))
    inputs = [leaf.detach().double().requires_grad_() for leaf in leaves(*shapes, dtype=dtype)]
    for got, want in zip(found, with_gradients(equation, inputs), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


class Counted:
    """silu that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return F.silu(x)


def product(function, x, weight):
    """A product whose backward pass needs what the function gave; of a view of it, as of tokens without their rows."""
    with recomputed(function, x) as active:
        return F.linear(active.flatten(0, 1), weight)


def test_what_is_computed_again_gives_the_same_gradients():
    x, weight = leaves((2, 3, 4), (5, 4))
    silu = Counted()
    product(silu, x, weight).sum().backward()
    want = torch.autograd.grad(F.linear(F.silu(x), weight).sum(), (x, weight))
    assert silu.calls == 2
    assert torch.equal(x.grad, want[0]) and torch.equal(weight.grad, want[1])


def test_gates_do_not_save_what_they_can_compute_again():
    saved = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            saved.append(str(function))
            return function(*args, **(kwargs or {}))

    attended, gate = leaves((2, 3, 4), (2, 3, 4))
    out = EAGER.gate(attended, gate)
    with Watch():
        out.sum().backward()
    assert "aten.silu.default" in saved


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
def test_a_gate_that_writes_over_its_own_numbers_gives_those_of_pytorch(dtypes):
    inputs = [
        leaf.detach().to(dtype).requires_grad_() for leaf, dtype in zip(leaves(*[(2, 33, 15)] * 2), dtypes, strict=True)
    ]
    before = [leaf.detach().clone() for leaf in inputs]
    found = with_gradients(EAGER.gate, inputs)
    for got, want in zip(found, with_gradients(lambda attended, gate: attended * F.silu(gate), inputs), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert all(torch.equal(leaf, old) for leaf, old in zip(inputs, before, strict=True))


def test_a_gate_keeps_its_inputs_alone():
    kept = []
    inputs = leaves(*[(2, 33, 15)] * 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        EAGER.gate(*inputs)
    assert {tensor.data_ptr() for tensor in kept} == {leaf.data_ptr() for leaf in inputs}


def test_other_tensors_are_saved():
    x, weight = leaves((2, 3, 4), (5, 4))
    silu = Counted()
    with recomputed(silu, x) as active:
        out = F.linear(active * 2, weight) + active[:, :1].sum()
    out.sum().backward()
    with torch.no_grad():
        product(silu, x, weight)
    assert silu.calls == 2  # once in either


def test_where_other_hooks_decide_nothing_is_computed_twice_over():
    x, weight = leaves((2, 3, 4), (5, 4))
    silu = Counted()
    checkpoint(product, silu, x, weight, use_reentrant=False).sum().backward()
    assert silu.calls == 2  # the second one is the checkpoint's
    with torch.autograd.graph.save_on_cpu():
        out = product(silu, x, weight)
    out.sum().backward()
    assert silu.calls == 3


@pytest.mark.parametrize("kind", ["scalenorm", "batchnorm", "layernorm"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_that_saves_everything_has_the_same_gradients(kind, checkpointed):
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

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        expected = gradients()
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(statistics, strict=False)
    if checkpointed:
        model.gradient_checkpointing_enable()
    for name, found in gradients().items():
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    if not checkpointed:  # which counts a batch's statistics twice
        for name, buffer in model.named_buffers():
            assert torch.equal(after[name], buffer), name
