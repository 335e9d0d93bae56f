"""Behaviour of the models beyond the reference values: registration, initial values, refusals, caches, precision."""

import copy
import json

import pytest
import torch
from accelerate.big_modeling import _refuse_recurrent_layers_under_sequence_parallelism
from builders import make_config, make_ids, make_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import mega_scale
from mega_scale.model.modeling_mega import initial_tensor


def test_defaults_are_those_of_4_37_2():
    config = mega_scale.MegaConfig()
    assert (config.vocab_size, config.hidden_size, config.normalization_type) == (30522, 128, "scalenorm")
    assert (config.bidirectional, config.use_chunking, config.chunk_size, config.truncation) == (True, False, -1, None)
    assert (config.scale_embeddings, config.final_norm, config.embedding_dropout_prob) == (False, False, 0.0)
    assert config.lm_head_bias and config.num_attention_heads == 1


def test_auto_classes_know_the_models(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is mega_scale.MegaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is mega_scale.MegaModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is mega_scale.MegaConfig
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    ids = make_ids(2, 21)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_meta_model_gets_the_initial_values_of_the_reference():
    config = make_config(hidden_size=512, ema_projection_size=16, num_hidden_layers=1, vocab_size=500)
    with torch.device("meta"):
        model = mega_scale.MegaForCausalLM(config)
    assert all(p.is_meta for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    values = {}
    for prefix, module in model.named_modules():
        for name in [*module._parameters, *module._buffers]:
            value = initial_tensor(module, name, config, generator)
            if value is not None:
                values[f"{prefix}.{name}"] = value
    assert values.keys() == model.state_dict().keys()
    layer = "mega.layers.0.mega_layer."
    for name, mean, std in (
        ("ema_gate.damping_factor", 0, 0.2), ("ema_gate.decay_factor", 0, 0.2), ("ema_gate.residual_weight", 0, 1.0),
        ("ema_gate.kernel_projection_matrix", 0, 1.0), ("mx_proj.weight", 0, 0.02), ("mx_proj.bias", 0, 0.0),
        ("norm.norm.scalar", 1, 0.0), ("qk_bias", 0, 0.0),
    ):  # fmt: skip
        value = values[layer + name].double()
        error = 5 * std / value.numel() ** 0.5  # five standard errors of the mean
        assert abs(value.mean() - mean) <= error and abs(value.std(correction=0) - std) <= error, name
    expansion = values[layer + "ema_gate.ema_expansion_matrix"][..., 0]
    signs = torch.ones(16).index_fill(0, torch.arange(1, 16, 2), -1.0)
    assert (expansion - signs).abs().max() < 0.2 and abs((expansion - signs).std() - 0.02) < 0.002
    assert (values["mega.embedding_layer.word_embeddings.weight"][config.pad_token_id] == 0).all()


def test_initial_values_follow_the_seed():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(mega_scale.MegaForCausalLM(make_config()).mega.layers[1].nffn.fc1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"bidirectional": True}, ["is_decoder=True", "bidirectional=False"]),
        ({"normalization_type": "groupnorm"}, ["groupnorm", "scalenorm"]),
        ({"attention_activation": "sigmoid"}, ["sigmoid", "laplace"]),
        ({"chunk_size": -1}, ["chunk_size=-1", "use_chunking"]),
        ({"shared_representation_size": 7}, ["shared_representation_size=7", "rotary"]),
        ({"dropout_prob": 1.5}, ["dropout_prob=1.5"]),
        ({"hidden_size": 0}, ["hidden_size=0"]),
        ({"truncation": 0}, ["truncation=0"]),
    ],
)
def test_impossible_models_are_refused(changes, words):
    with pytest.raises(Exception) as caught:
        mega_scale.MegaForCausalLM(make_config(**changes))
    message = f"{caught.value} {caught.value.__cause__}"
    assert all(word in message for word in words), message


def test_impossible_calls_are_refused():
    model, ids = make_model(), make_ids(2, 9)
    encoder = mega_scale.MegaModel(make_config(is_decoder=False))
    simple = make_model(relative_positional_bias="simple", use_chunking=False, max_positions=8)
    truncated = make_model(truncation=4)
    for call, words in (
        (model, "exactly one"),
        (lambda: encoder(ids, use_cache=True), "decoder"),
        (lambda: truncated(ids, use_cache=True), "truncation=4"),
        (lambda: simple(ids), "max_positions=8"),
        (lambda: model(ids, past_key_values=((),)), "MegaCache"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("chunked", [True, False])
def test_cached_calls_of_any_length_equal_the_full_forward(activation, chunked):
    model = make_model(attention_activation=activation, use_chunking=chunked)
    ids = make_ids(2, 45)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        cache, got = None, []
        for piece in ids.split([3, 5, 1, 7, 8, 1, 20], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-5, rtol=1e-4)
    assert cache.get_seq_length() == 45


def test_masked_keys_stay_masked_in_cached_steps():
    model = make_model(use_chunking=False)
    ids = make_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 10:14] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        first = model(ids[:, :16], attention_mask=mask[:, :16], use_cache=True)
        rest = model(ids[:, 16:], attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, want[:, 16:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "chunk"), [(300, 16), pytest.param(1000, 64, marks=pytest.mark.slow, id="a-thousand")]
)
def test_many_tokens_equal_uncached_greedy_decoding_in_a_constant_cache(tokens, chunk):
    model = make_model(seed=3, chunk_size=chunk)
    prompt = make_ids(1, 5, seed=4)
    sizes = []

    def watch(module, arguments, keywords, output):
        sizes.append(output.past_key_values.nbytes)

    handle = model.register_forward_hook(watch, with_kwargs=True)
    with torch.no_grad():
        got = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                             eos_token_id=None)  # fmt: skip
    handle.remove()
    assert got.shape == (1, 5 + tokens) and len(sizes) == tokens
    assert len(set(sizes)) == 1
    uncached = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                              eos_token_id=None, use_cache=False)  # fmt: skip
    assert torch.equal(got, uncached)


@pytest.mark.parametrize("chunked", [True, False])
def test_generate_samples_and_searches_alike_with_and_without_cache(chunked):
    model = make_model(use_chunking=chunked, seed=5)
    prompt = make_ids(2, 5)
    mask = torch.ones_like(prompt)
    for options in ({"do_sample": True}, {"num_beams": 3}, {"do_sample": False}):
        rows = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            rows.append(model.generate(prompt, attention_mask=mask, max_new_tokens=20, use_cache=use_cache, **options))
        assert torch.equal(*rows), options


@pytest.mark.parametrize("length", [1, 7, 8, 9, 21])
def test_gradient_checkpointing_changes_nothing(length):
    ids = make_ids(2, length)
    gradients = []
    for checkpointing in (None, False, True):
        model = make_model(dropout_prob=0.2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        torch.manual_seed(1)
        model(ids, shift_labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)


def test_shifted_labels_and_a_global_count_add_up():
    model, ids = make_model(), make_ids(4, 17)
    labels = ids.clone()
    labels[1, 5:] = -100
    whole = model(ids, labels=labels).loss
    shifted = torch.cat([labels[:, 1:], labels.new_full((4, 1), -100)], 1)
    count = int((shifted != -100).sum())
    parts = [
        model(i, shift_labels=s, num_items_in_batch=count).loss
        for i, s in zip(ids.split(2), shifted.split(2), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert model(ids, shift_labels=torch.full_like(ids, -100), num_items_in_batch=count).loss == 0
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


def test_keys_beyond_4_37_2():
    plain, ids = make_model(), make_ids(1, 9)
    scaled = make_model(scale_embeddings=True)
    assert (
        scaled.mega(ids, output_hidden_states=True).hidden_states[0].std()
        > 3 * plain.mega(ids, output_hidden_states=True).hidden_states[0].std()
    )
    normed = make_model(final_norm=True, normalization_type="layernorm").mega(ids).last_hidden_state
    torch.testing.assert_close(normed.mean(-1), torch.zeros(1, 9), atol=1e-5, rtol=0)
    affine = make_model(final_norm=True, final_norm_affine=True, normalization_type="layernorm")
    assert affine.mega.final_norm.norm.weight.shape == (24,)
    with pytest.raises(ValueError, match="final_norm_affine=True without"):
        make_model(final_norm_affine=True)
    assert make_model(lm_head_bias=False).lm_head.bias is None
    dropped = make_model(embedding_dropout_prob=0.5).train()
    assert (dropped.mega(ids, output_hidden_states=True).hidden_states[0] == 0).float().mean() > 0.3


def test_precision_of_the_moving_average_is_kept(tmp_path):
    model, ids = make_model(), make_ids(2, 30)
    model.save_pretrained(tmp_path)
    half = mega_scale.MegaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.mega.layers[0].mega_layer.ema_gate.decay_factor.dtype == torch.float32
    assert half.mega.layers[0].mega_layer.v_proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        want = model(ids).logits
        out = half(ids, use_cache=True)
        assert out.past_key_values.layers[0].state.ema.dtype == torch.float32
        torch.testing.assert_close(out.logits.float(), want, atol=0.05 * float(want.abs().max()), rtol=0.05)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(ids).logits.float()
    torch.testing.assert_close(mixed, want, atol=0.05 * float(want.abs().max()), rtol=0.05)


def test_no_hidden_state_survives_a_forward():
    model, ids = make_model(), make_ids(1, 12)
    with torch.no_grad():
        before = model(ids).logits
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert not torch.equal(model(ids).logits, before)
        torch.testing.assert_close(copied(ids).logits, before)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    assert model.mega.layers[0].mega_layer.ema_gate.damping_factor.grad.abs().sum() > 0


def test_layers_are_declared_recurrent():
    assert make_config().layer_types == ["linear_attention"] * 2
    with pytest.raises(ValueError, match="linear_attention"):
        _refuse_recurrent_layers_under_sequence_parallelism(make_model())


def test_tuples_and_kept_logits():
    model, ids = make_model(), make_ids(2, 11)
    out = model(ids, use_cache=False)
    assert torch.equal(model(ids, use_cache=False, return_dict=False)[0], out.logits)
    torch.testing.assert_close(model(ids, use_cache=False, logits_to_keep=3).logits, out.logits[:, -3:])


def test_config_tells_other_libraries_what_they_ask_for(tmp_path):
    """PEFT reads the number of heads from the values, and TRL a map of remote code that may be empty."""
    config = make_config()
    assert config.to_dict()["num_attention_heads"] == 1 and config.auto_map == {}
    assert "auto_map" not in config.to_dict()
    config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    loaded = mega_scale.MegaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and loaded.auto_map == {}
    assert mega_scale.MegaConfig(**config.to_dict()).to_dict() == config.to_dict()
    mapped = mega_scale.MegaConfig(auto_map={"AutoConfig": "configuration_mega.MegaConfig"})
    assert mapped.to_dict()["auto_map"] == mapped.auto_map and mega_scale.MegaConfig().auto_map == {}


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_causal_head_on_an_encoder_warns_that_it_sees_the_future(bidirectional, caplog, tmp_path):
    config = make_config(is_decoder=False, bidirectional=bidirectional)
    builds = [lambda: mega_scale.MegaForCausalLM(config), lambda: AutoModelForCausalLM.from_config(config)]
    builds.append(lambda: mega_scale.MegaForCausalLM.from_pretrained(tmp_path))
    builds[0]().save_pretrained(tmp_path)
    for build in builds:
        caplog.clear()
        build()
        assert [record.levelname for record in caplog.records if "is_decoder=False" in record.message] == ["WARNING"]
    caplog.clear()
    make_model()
    mega_scale.MegaModel(config)
    assert not [record for record in caplog.records if "is_decoder=False" in record.message]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["MegaForCausalLM", "MegaForMaskedLM"])
@pytest.mark.parametrize("sizes", [[70], [40], [61, 72, 50]], ids=str)
def test_a_resized_vocabulary_keeps_its_values(kind, tied, sizes, tmp_path):
    encoder = {} if kind == "MegaForCausalLM" else {"is_decoder": False, "bidirectional": True}
    make_model(kind=kind, tie_word_embeddings=tied, **encoder).save_pretrained(tmp_path / "old")
    model = getattr(mega_scale, kind).from_pretrained(tmp_path / "old")
    ids, old = make_ids(2, 9, 30), model(make_ids(2, 9, 30)).logits
    for size in sizes:
        model.resize_token_embeddings(size, mean_resizing=False)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.post_init()
    model.init_weights()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    fewest = min(61, *sizes)
    torch.testing.assert_close(model(ids).logits[..., :fewest], old[..., :fewest], rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "new")
    loaded, report = getattr(mega_scale, kind).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values()) and torch.equal(loaded(ids).logits, model(ids).logits)
    same = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert same == tied and loaded.config.vocab_size == sizes[-1] == loaded.get_output_embeddings().out_features
