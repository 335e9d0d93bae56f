"""bf16 weights and autocast against fp32 on the models of the reference values; what must never be rounded."""

import importlib.util
import json
import pathlib

import pytest
import torch
import torch.nn.functional as F
from builders import make_ids, make_model
from torch import nn

import mega_scale

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES = {entry["name"]: entry for entry in MANIFEST["cases"]}
LIMIT = 2e-2  # largest difference, relative to the largest logit
# Models whose weights, drawn far from initial values, amplify rounding: see the test of that claim below.
AMPLIFYING = {
    "enc_scalenorm_gelu_softmax_simple_pad", "enc_scalenorm_relu2_simple_pad", "enc_chunk8_relu2_rotary",
    "lm_laplace_rotary_pad", "lm_relu2_simple_layernorm_untied", "lm_chunk16_relu2_rotary_nodense",
    "step_chunk16_laplace_simple", "cross_lm_laplace_simple_longsrc", "cross_lm_chunk8_softmax_rotary",
    "gen_chunk8_softmax_rotary",
}  # fmt: skip
LIMIT_AMPLIFYING = 8e-2
LIMIT_OF_NORM = 3.5e-2  # of the difference's Euclidean norm, relative to the logits'


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("golden_check_for_precision", GOLDEN / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors(check, name, change=lambda model, folder: model, dtype=torch.float32, autocast=False, folder=None):
    """Error of a changed model against the reference's values: of the largest entry, and of the norm."""
    case = check.Case(str(GOLDEN), CASES[name], mega_scale, MANIFEST["tolerances"])
    call = next(c for c in case.entry["checks"] if c["kind"] == "forward")
    model = change(case.model(), folder).eval()
    arguments = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.args(call["inputs"]).items()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(**arguments, **call["kwargs"])
    pairs = [
        (check.pick(out, key).float(), case.outputs[stored])
        for key, stored in call["expect"].items()
        if key.endswith("logits") or key == "last_hidden_state"
    ]
    largest = max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)
    return largest, max(float((got - want).norm() / want.norm()) for got, want in pairs)


def reload_as(dtype):
    def change(model, folder):
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=dtype)

    return change


def rounded(tensor):
    return tensor.bfloat16().float()


def round_weights(model, folder):
    """All weights but the moving average's as bf16 has them; arithmetic stays fp32."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ema_gate" not in name:
                parameter.copy_(rounded(parameter))
    return model


def round_linears(model, folder):
    """Linear layers as autocast computes them, rounded operands and results; all else stays fp32."""

    def forward(layer):
        bias = None if layer.bias is None else rounded(layer.bias)
        return lambda x: rounded(F.linear(rounded(x), rounded(layer.weight), bias))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = forward(module)
    return model


@pytest.mark.parametrize("name", CASES)
def test_bf16_and_autocast_on_the_golden_models(check, name, tmp_path):
    limit = LIMIT_AMPLIFYING if name in AMPLIFYING else LIMIT
    for largest, norm in (
        errors(check, name, reload_as(torch.bfloat16), torch.bfloat16, folder=tmp_path),
        errors(check, name, autocast=True),
    ):
        assert largest <= limit and norm <= LIMIT_OF_NORM, (largest, norm)


@pytest.mark.parametrize("name", CASES)
def test_fp16_on_the_golden_models(check, name, tmp_path):
    largest, norm = errors(check, name, reload_as(torch.float16), torch.float16, folder=tmp_path)
    assert largest <= LIMIT / 2 and norm <= LIMIT / 2, (largest, norm)


@pytest.mark.parametrize("name", sorted(AMPLIFYING))
def test_exceptions_amplify_rounding(check, name):
    """Rounding the weights, or the linear layers' operands and results, gives a large error in fp32 arithmetic too."""
    floor = max(errors(check, name, change)[0] for change in (round_weights, round_linears))
    assert floor > 6e-3, floor


@pytest.mark.parametrize("how", ["bf16", "fp16", "autocast"])
def test_coefficients_of_the_moving_average_are_never_rounded(how, tmp_path):
    """With p a = 3e-4, a decay rounded to bf16 is exactly one, and one rounded to fp16 is off by a fifth of p a."""
    model = make_model()
    slow = torch.logit(torch.tensor(3e-4**0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("damping_factor", "decay_factor")):
                parameter.fill_(slow)
    model.save_pretrained(tmp_path)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}[how]
    low = mega_scale.MegaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = make_ids(1, 6).repeat(1, 500)
    calls = []
    gate = low.mega.layers[0].mega_layer.ema_gate
    gate.register_forward_hook(lambda module, arguments, out: calls.append((arguments[0], out[1])))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        low(ids, use_cache=True)
    (inputs, state), decay = calls[0], 1 - 3e-4
    x = inputs[0].double()
    weights = decay ** torch.arange(x.shape[0] - 1, -1, -1, dtype=torch.float64)
    gain = 3e-4**0.5 * model.mega.layers[0].mega_layer.ema_gate.ema_expansion_matrix[..., 0].detach().double()
    want = (weights @ x)[:, None] * gain
    assert state.dtype == torch.float32
    torch.testing.assert_close(state[0].double(), want, atol=2e-4 * float(want.abs().max()), rtol=1e-3)
    undecayed = x.sum(0)[:, None] * gain
    assert (undecayed - want).abs().max() > 0.2 * want.abs().max()  # what a decay of one would give
