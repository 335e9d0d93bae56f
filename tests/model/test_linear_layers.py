"""Whatever quantises, adapts, watches or replaces linear layers finds all of them, and is what computes."""

import warnings

import pytest
import torch
from builders import make_ids, make_model
from every_class import CLASSES, answers, inputs_of, labels_of, make
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
from transformers.utils.quantization_config import FineGrainedFP8Config

from mega_scale.model.basic_layers import LanguageModelHead, MegaLinear, use_own_linear

every_class = pytest.mark.parametrize("kind", CLASSES)


class Adapted(nn.Module):
    """As adapters wrap a layer: parameters of the layer within, another result."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.more = nn.Linear(layer.in_features, layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.more(x)


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@every_class
def test_every_linear_layer_is_exactly_that(kind):
    layers = linear_layers(make(kind, add_lm_hidden_dense_layer=True))
    assert len(layers) >= 10
    assert {type(layer) for layer in layers.values()} == {nn.Linear}


@every_class
def test_dynamic_quantisation_converts_them_and_stays_close(kind):
    model, inputs = make(kind, spread=0.05), inputs_of(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not linear_layers(small)
    found, expected = answers(small(**inputs)), answers(model(**inputs))
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_fp8_replaces_them_all():
    with torch.device("meta"):
        model = make_model(add_cross_attention=True)
    names = set(linear_layers(model)) - {"lm_head"}
    config = FineGrainedFP8Config(weight_block_size=(8, 8))
    model = replace_with_fp8_linear(model, modules_to_not_convert=["lm_head"], quantization_config=config)
    assert {name for name, module in model.named_modules() if isinstance(module, FP8Linear)} == names


@pytest.mark.parametrize("how", ["wrapped", "hooked", "own forward", "watched"])
def test_what_stands_for_a_layer_computes(how):
    model, ids = make_model(add_lm_hidden_dense_layer=True), make_ids(2, 40)
    plain = model(ids).logits
    seen = set()
    names = list(linear_layers(model))
    for name in names:
        layer = model.get_submodule(name)
        if how == "wrapped":
            model.set_submodule(name, Adapted(layer))
            model.get_submodule(name).more.register_forward_hook(lambda *_, name=name: seen.add(name))
        elif how == "hooked":
            layer.register_forward_pre_hook(lambda *_, name=name: seen.add(name))
        elif how == "own forward":
            layer.forward = lambda x, layer=layer, name=name: (seen.add(name), nn.functional.linear(x, layer.weight))[1]
        else:
            layer.register_full_backward_hook(lambda *_, name=name: seen.add(name))
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert seen == set(names)
    assert torch.allclose(outputs.logits, plain) == (how in ("hooked", "watched"))


@pytest.mark.parametrize("how", ["wrapped", "hooked", "quantised", "copied", "plain"])
def test_a_loss_without_logits_is_that_of_the_head_there_is(how):
    model, ids = make_model(), make_ids(2, 13)
    if how == "wrapped":
        model.lm_head = Adapted(model.lm_head)
    elif how == "hooked":
        model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    elif how == "quantised":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    elif how == "copied":  # as PEFT's modules_to_save
        model.lm_head = nn.Sequential(nn.Linear(24, 61))
    whole = model(ids, labels=ids).loss
    sliced = model(ids, labels=ids, skip_logits=True)
    assert sliced.loss.shape == () and sliced.logits is None
    torch.testing.assert_close(sliced.loss, whole)
    if how != "quantised":
        parameters = list(model.parameters())
        gradients = [torch.autograd.grad(loss, parameters) for loss in (sliced.loss, whole)]
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@every_class
def test_gradients_reach_what_was_put_in_place_of_layers(kind):
    model, inputs = make(kind), inputs_of(kind)
    inputs.update({} if kind == "MegaModel" else labels_of(kind, inputs))
    names = [name for name in linear_layers(model) if "pooler" not in name or kind != "MegaModel"]
    for name in names:
        model.set_submodule(name, Adapted(model.get_submodule(name)))
    outputs = model(**inputs)
    (answers(outputs).sum() if kind == "MegaModel" else outputs.loss).backward()
    assert all(model.get_submodule(name).more.weight.grad.abs().sum() > 0 for name in names)


@pytest.mark.parametrize("tied", [True, False])
def test_own_layers_take_the_place_of_plain_ones_with_the_same_parameters(tied):
    model = make_model(tie_word_embeddings=tied)
    ids, before = make_ids(2, 9), dict(model.named_parameters(remove_duplicate=False))
    want = model(ids, labels=ids).loss
    use_own_linear(model)
    layers = [type(module) for module in model.modules() if isinstance(module, nn.Linear)]
    assert set(layers) == {MegaLinear, LanguageModelHead} and layers.count(LanguageModelHead) == 1
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    torch.testing.assert_close(model(ids, labels=ids).loss, want)
