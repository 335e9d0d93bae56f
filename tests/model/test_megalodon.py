"""What users of transformers expect of the Megalodon classes; configurations; initial values; training."""

import math

import pytest
import torch
import transformers
from builders import make_ids, make_megalodon_config, make_model

import mega_scale
from mega_scale.model import causal_lm_class, configuration_class, initial_tensor
from mega_scale.model.basic_layers import LanguageModelHead, MegaLinear, use_own_linear


def megalodon(**changes):
    return make_model(kind="MegalodonForCausalLM", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep_norm_groups": 5}, "timestep_norm_groups=5 does not suit hidden_size=24: choose a divisor below it"),
        ({"timestep_norm_groups": 24}, "timestep_norm_groups=24 does not suit hidden_size=24"),
        ({"hidden_size": 1, "timestep_norm_groups": 1}, "hidden_size=1 leaves"),
        ({"num_attention_heads": 3}, "shared_representation_size=8 is not a multiple of num_attention_heads=3"),
        ({"intermediate_size": 21}, "intermediate_size=21 is not a multiple of num_attention_heads=2"),
        ({"shared_representation_size": 6}, "gives each of num_attention_heads=2 an odd width.*a multiple of 4"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"nffn_hidden_size": 0}, "nffn_hidden_size=0 must be at least 1"),
        ({"norm_eps": 0.0}, r"norm_eps=0\.0 must be greater than 0"),
        ({"rope_base": -1.0}, r"rope_base=-1\.0 must be greater than 0"),
        ({"init_mode": "kaiming"}, "init_mode='kaiming' is unknown: choose one of he, bert, xavier, gaussian"),
        ({"dropout_prob": 1.0}, r"dropout_prob=1\.0 must lie in"),
        ({"bidirectional": True}, "bidirectional is always False in a Megalodon model: leave it out"),
        ({"use_chunking": False}, "use_chunking is always True"),
        ({"truncation": 8}, "truncation is always None"),
    ],
)
def test_configurations_that_no_model_can_have_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        make_megalodon_config(**changes)


def test_a_padding_token_outside_the_vocabulary_is_refused_by_the_model():
    with pytest.raises(ValueError, match="pad_token_id=61 lies outside the vocabulary"):
        megalodon(pad_token_id=61)


def test_families_are_found_by_their_type():
    assert configuration_class("megalodon") is mega_scale.MegalodonConfig
    assert causal_lm_class(make_megalodon_config()) is mega_scale.MegalodonForCausalLM
    with pytest.raises(ValueError, match="model_type='llama' is unknown: expected one of mega, megalodon"):
        configuration_class("llama")


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_through_the_auto_classes(tmp_path, tied):
    model, ids = megalodon(tie_word_embeddings=tied, norm_affine=not tied, scale_embeddings=tied), make_ids(2, 19)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is mega_scale.MegalodonForCausalLM
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is mega_scale.MegalodonConfig
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert (loaded.lm_head.weight is loaded.megalodon.embed.weight) is tied
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
        base = transformers.AutoModel.from_pretrained(tmp_path).eval()
        assert type(base) is mega_scale.MegalodonModel
        assert torch.equal(base(ids).last_hidden_state, model.megalodon(ids).last_hidden_state)


def test_a_head_that_is_untied_while_it_shares_the_embeddings_is_saved(tmp_path):
    model, ids = megalodon(tie_word_embeddings=True), make_ids(1, 9)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    loaded = mega_scale.MegalodonForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_vocabulary_can_be_resized_but_not_below_the_padding_token():
    model, ids = megalodon(pad_token_id=60), make_ids(1, 9)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(70)
        torch.testing.assert_close(model(ids).logits[..., :61], before)
    assert model.config.vocab_size == 70
    with pytest.raises(ValueError, match="has no pad_token_id=60"):
        model.resize_token_embeddings(50)


def test_calls_that_contradict_themselves_are_refused():
    model, ids = megalodon(), make_ids(2, 9)
    other = make_model()
    for arguments, message in (
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(2, 9, 24)}, "exactly one"),
        ({"input_ids": ids[0]}, r"expected int64 \(batch, length\)"),
        ({"inputs_embeds": torch.zeros(2, 9, 23)}, r"expected \(batch, length, 24\)"),
        ({"input_ids": ids + 60}, "expected 0 to 60"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 8)}, "attention_mask has shape"),
        ({"input_ids": ids, "document_starts": torch.zeros(2, 9)}, "expected bool"),
        ({"input_ids": ids, "past_key_values": transformers.DynamicCache()}, r"mega_scale\.MegaCache"),
        ({"input_ids": ids, "past_key_values": mega_scale.MegaCache(3)}, "has 3 layers, the model 2"),
        ({"input_ids": ids, "past_key_values": other(ids, use_cache=True).past_key_values}, "another family"),
        ({"input_ids": ids, "output_attentions": True}, "no attention weights"),
        ({"input_ids": ids, "labels": ids[:, :4]}, "labels are"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(ValueError, match="another family"):
        other(ids, past_key_values=model(ids, use_cache=True).past_key_values)


def gradients(model, **arguments):
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"swiglu": False, "norm_affine": False, "rescale_nffn": False}], ids=str)
def test_losses_and_gradients_are_the_same_by_every_way_to_them(changes):
    model, ids = megalodon(**changes).train(), make_ids(2, 21)
    loss, expected = gradients(model, input_ids=ids, labels=ids)
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    ways = {
        "shift_labels": {"shift_labels": following},
        "skip_logits": {"labels": ids, "skip_logits": True},
        "items": {"labels": ids, "num_items_in_batch": 40},
        "mask": {"labels": ids, "attention_mask": torch.ones_like(ids)},
    }
    for arguments in ways.values():
        got, found = gradients(model, input_ids=ids, **arguments)
        torch.testing.assert_close(got, loss)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)
    model.gradient_checkpointing_enable()
    got, found = gradients(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    model.gradient_checkpointing_disable()
    head = model.lm_head
    use_own_linear(model)
    assert model.lm_head is head and type(head) is LanguageModelHead
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert type(model.megalodon.layers[0].mega.wv) is MegaLinear
    got, found = gradients(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


def test_logits_to_keep():
    model, ids = megalodon(), make_ids(2, 21)
    with torch.no_grad():
        every = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, every[:, -3:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([4, 0])).logits, every[:, [4, 0]])


def test_each_dropout_is_drawn_while_training_only():
    ids = make_ids(2, 21)
    for name in ("dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        model = megalodon(**{name: 0.5})
        with torch.no_grad():
            assert torch.equal(model(ids).logits, megalodon()(ids).logits)
            model.train()
            first, second = (model(ids).logits for _ in range(2))
            assert not torch.equal(first, second) and torch.isfinite(first).all()


def test_bf16_leaves_the_average_in_fp32_and_stays_close(tmp_path):
    model, ids = megalodon(spread=0.05), make_ids(2, 40)
    model.save_pretrained(tmp_path)
    rounded = mega_scale.MegalodonForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for name, parameter in rounded.named_parameters():
        assert parameter.dtype == (torch.float32 if ".cema." in name else torch.bfloat16), name
    with torch.no_grad():
        exact = model(ids).logits
        for logits in (rounded(ids).logits, autocast_logits(model, ids)):
            assert (logits - exact).abs().max() < 0.05 * exact.abs().max()


def autocast_logits(model, ids):
    with torch.autocast("cpu", torch.bfloat16):
        return model(ids).logits


def test_initial_values():
    config = make_megalodon_config(hidden_size=512, timestep_norm_groups=8, vocab_size=999, nffn_hidden_size=640)
    with torch.device("meta"):
        model = mega_scale.MegalodonForCausalLM(config)
    drawn = {}
    for prefix, module in model.named_modules():
        for name in module._parameters:
            if module._parameters[name] is not None:
                generator = torch.Generator().manual_seed(3)
                drawn[f"{prefix}.{name}"] = initial_tensor(module, name, config, generator)
    assert drawn.keys() == dict(model.named_parameters()).keys()
    first = {name.rpartition("layers.0.")[2]: value for name, value in drawn.items() if ".layers.1." not in name}
    stds = {
        "mega.cema.alpha": 0.2, "mega.cema.delta": 0.2, "mega.wv.weight": (3 * 512) ** -0.5,
        "mega.wh2.weight": (3 * 20) ** -0.5, "nffn.fc2.weight": (3 * 640) ** -0.5, "lm_head.weight": 0.9866 * 512**-0.5,
        "megalodon.embed.weight": 0.9866 * 512**-0.5, "mega.cema.omega": 0.2499,
    }  # fmt: skip
    for name, std in stds.items():
        assert abs(first[name].std() / std - 1) < 0.08, name
    assert first["megalodon.embed.weight"].abs().max() <= 3 * 512**-0.5 and first["mega.cema.omega"].abs().max() <= 1
    gamma = first["mega.cema.gamma"]
    assert abs(gamma[..., 0].std() - 1) < 0.05 and not gamma[..., 1].any()
    # One base angle a channel, in a random order; the same for all ranks, which draw it from the same generator.
    theta = first["mega.cema.theta"].flatten().double().sigmoid()
    expected = 512 ** (-torch.arange(1, 513, dtype=torch.float64) / 512)
    torch.testing.assert_close(theta.sort().values, expected.sort().values, atol=1e-6, rtol=1e-5)
    assert not torch.equal(theta, theta.sort().values)
    for layer in (0, 1):
        alpha = drawn[f"megalodon.layers.{layer}.nffn.alpha"]
        assert torch.equal(alpha, torch.full((512,), 0.1 * 0.5**layer))
    zero = [name for name, value in first.items() if not value.any()]
    assert {"mega.gamma", "mega.beta", "mega.timenorm.weight", "mega.rmsnorm.weight", "mega.wv.bias"} < set(zero)
    assert not [name for name in first if name.endswith("bias") and name not in zero]


@pytest.mark.parametrize(("mode", "std"), [("bert", 0.02), ("xavier", math.sqrt(2 / 56)), ("gaussian", 1.0)])
def test_modes_of_initial_weights(mode, std):
    torch.manual_seed(0)
    model = mega_scale.MegalodonForCausalLM(make_megalodon_config(init_mode=mode, intermediate_size=32))
    weights = [block.mega.get_submodule(name).weight for block in model.megalodon.layers for name in ("wv", "wr")]
    assert abs(torch.cat(weights).std() / std - 1) < 0.05
    assert abs(model.lm_head.weight.std() * 24**0.5 - 1) < 0.08
