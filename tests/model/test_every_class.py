"""Conventions of transformers that all seven classes keep: loading, saving, precision, attention, checkpointing."""

import pytest
import torch
import transformers
from accelerate import infer_auto_device_map
from every_class import CLASSES, HEADS, LANGUAGE_MODELS, answers, inputs_of, labels_of, make

import mega_scale
from mega_scale.model.modeling_mega import initial_tensor

every_class = pytest.mark.parametrize("kind", CLASSES)
every_head = pytest.mark.parametrize("kind", HEADS)


def load(kind, folder, **settings):
    model, report = getattr(mega_scale, kind).from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(report.values())
    return model.eval()


@every_class
def test_round_trip_through_safetensors_and_auto_classes(tmp_path, kind):
    model, inputs = make(kind), inputs_of(kind)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    loaded = load(kind, tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(answers(loaded(**inputs)), answers(model(**inputs)))
    auto = getattr(transformers, CLASSES[kind][1])
    assert type(auto.from_pretrained(tmp_path)) is type(model)
    assert type(auto.from_config(model.config)) is type(model)


def test_pretraining_auto_class_is_that_of_4_37_2():
    model = transformers.AutoModelForPreTraining.from_config(make("MegaForMaskedLM").config)
    assert type(model) is mega_scale.MegaForMaskedLM


@every_head
def test_heads_start_from_a_backbone_and_a_backbone_from_heads(tmp_path, kind):
    pooled = kind == "MegaForMultipleChoice"
    model = make(kind)
    model.mega.save_pretrained(tmp_path / "backbone")
    loaded, report = type(model).from_pretrained(tmp_path / "backbone", output_loading_info=True)
    head = {name for name in model.state_dict() if not name.startswith("mega.")}
    head -= {f"{name}.weight" for name in ("lm_head", "mlm_head")}  # tied to the embeddings
    assert report["missing_keys"] == head and not report["unexpected_keys"]
    model.save_pretrained(tmp_path / "head")
    backbone = mega_scale.MegaModel.from_pretrained(tmp_path / "head", add_pooling_layer=pooled)
    for name, tensor in model.mega.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], tensor), name
        assert torch.equal(loaded.mega.state_dict()[name], tensor), name


@every_class
def test_meta_models_get_a_value_for_every_tensor(kind):
    config = make(kind).config
    with torch.device("meta"):
        model = getattr(mega_scale, kind)(config)
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and name not in module._non_persistent_buffers_set:
                assert initial_tensor(module, name, config, torch.Generator()).shape == tensor.shape


@every_class
def test_initial_values_follow_the_seed(kind):
    config = make(kind).config
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(getattr(mega_scale, kind)(config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    drawn = [name for name in states[0] if len(states[0][name].unique()) > 1]
    assert len(drawn) > 10 and not any(torch.equal(states[0][name], states[2][name]) for name in drawn)


@every_class
def test_eager_and_sdpa_agree(tmp_path, kind):
    make(kind).save_pretrained(tmp_path)
    inputs = inputs_of(kind)
    found = {}
    for implementation in ("eager", "sdpa"):
        model = load(kind, tmp_path, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        found[implementation] = answers(model(**inputs))
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=1e-5, atol=1e-5)


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_loads_and_stays_close(tmp_path, kind, dtype):
    model, inputs = make(kind, spread=0.05), inputs_of(kind)
    model.save_pretrained(tmp_path)
    half = load(kind, tmp_path, dtype=dtype)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in half.named_parameters() if "ema_gate" in name}
    outputs = half(**inputs, **({} if kind == "MegaModel" else labels_of(kind, inputs)))
    assert answers(outputs).dtype == dtype
    torch.testing.assert_close(answers(outputs).float(), answers(model(**inputs)), rtol=3e-2, atol=3e-2)
    if kind != "MegaModel":
        assert outputs.loss.dtype == torch.float32 and outputs.loss.isfinite()


@every_class
@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_maps(tmp_path, kind, device_map):
    model, inputs = make(kind), inputs_of(kind)
    model.save_pretrained(tmp_path)
    loaded = load(kind, tmp_path, device_map=device_map)
    device = next(loaded.parameters()).device
    found = answers(loaded(**{name: tensor.to(device) for name, tensor in inputs.items()})).cpu()
    torch.testing.assert_close(found, answers(model(**inputs)), rtol=1e-5, atol=1e-5)


@every_class
def test_a_block_offloaded_to_disk(tmp_path, kind):
    model, inputs = make(kind), inputs_of(kind)
    model.save_pretrained(tmp_path)
    backbone = getattr(model, "mega", model)
    prefix = "" if backbone is model else "mega."
    places = {f"{prefix}{name}": "cpu" for name, _ in backbone.named_children() if name != "layers"}
    places |= {f"{prefix}layers.0": "cpu", f"{prefix}layers.1": "disk"}
    places |= {name: "cpu" for name, _ in model.named_children() if backbone is not model and name != "mega"}
    loaded = load(kind, tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert loaded.hf_device_map[f"{prefix}layers.1"] == "disk"
    assert getattr(loaded, "mega", loaded).layers[1].mega_layer.mx_proj.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(answers(loaded(**inputs)), answers(model(**inputs)))
        if kind == "MegaForCausalLM":
            settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
            ids = inputs["input_ids"][:, :5]
            assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


@every_class
def test_no_split_modules_name_the_block(kind):
    model = make(kind, num_hidden_layers=3)
    prefix = "" if kind == "MegaModel" else "mega."
    block = sum(p.numel() * p.element_size() for p in getattr(model, "mega", model).layers[0].parameters())
    limits = {0: int(block * 2.5), "cpu": 10**9}
    names = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
    assert len(set(names.values())) == 2
    inside = [name for name in names if name.startswith(f"{prefix}layers.") and name.count(".") > prefix.count(".") + 1]
    assert not inside


@every_class
def test_new_tokens(kind):
    model, inputs = make(kind), inputs_of(kind)
    before = answers(model(**inputs))
    embeddings = model.resize_token_embeddings(70)
    assert embeddings is model.get_input_embeddings() and embeddings.weight.shape == (70, 24)
    assert model.config.vocab_size == 70
    after = answers(model(**inputs))
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    inputs["input_ids"][..., 2] = 69
    outputs = model(**inputs, **({} if kind == "MegaModel" else labels_of(kind, inputs)))
    assert answers(outputs).isfinite().all()
    if kind in LANGUAGE_MODELS:
        head = model.get_output_embeddings()
        assert after.shape[-1] == 70 and head.bias.shape == (70,) and head.weight is embeddings.weight
        assert outputs.loss.isfinite()


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_tied_and_untied_heads(tmp_path, kind):
    head, embeddings = ("lm_head" if kind == "MegaForCausalLM" else "mlm_head"), "mega.embedding_layer.word_embeddings"
    for tied in (True, False):
        model = make(kind, tie_word_embeddings=tied)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        model.save_pretrained(tmp_path)
        loaded = load(kind, tmp_path)
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
        state = loaded.state_dict()
        assert torch.equal(state[f"{head}.weight"], state[f"{embeddings}.weight"]) == tied
        loaded.resize_token_embeddings(70)
        assert loaded.get_output_embeddings().weight.shape == (70, 24)
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert make(kind, lm_head_bias=False).get_output_embeddings().bias is None


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_head_that_is_untied_after_the_model_was_made_is_saved_too(tmp_path, kind):
    model, inputs = make(kind), inputs_of(kind)
    model.config.tie_word_embeddings = False
    for number, state in enumerate((None, model.state_dict())):
        model.save_pretrained(tmp_path / str(number), state_dict=state)
        loaded = load(kind, tmp_path / str(number))
        assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
        assert torch.equal(answers(loaded(**inputs)), answers(model(**inputs)))


@every_head
def test_gradient_checkpointing_changes_nothing(kind):
    inputs = inputs_of(kind)
    inputs.update(labels_of(kind, inputs))
    gradients = []
    for checkpointed in (False, True):
        model = make(kind).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        if expected is None:
            assert gradients[1][name] is None, name
        else:
            torch.testing.assert_close(gradients[1][name], expected, msg=name)


@every_class
def test_return_dict_false_is_in_standard_order(kind):
    model, inputs = make(kind), inputs_of(kind)
    if kind != "MegaModel":
        inputs.update(labels_of(kind, inputs))
    asked = {"output_hidden_states": True, "output_attentions": True}
    outputs = model(**inputs, **asked)
    plain = model(**inputs, **asked, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(outputs)
    for got, (name, expected) in zip(plain, outputs.items(), strict=True):
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
            assert torch.equal(a, b), name
    first = {"MegaModel": ["last_hidden_state", "pooler_output"], "MegaForQuestionAnswering": ["loss", "start_logits"]}
    names = list(outputs)
    assert names[:2] == first.get(kind, ["loss", "logits"]) and names[-2:] == ["hidden_states", "attentions"]
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple) and isinstance(model(**inputs, return_dict=True), type(outputs))


@every_class
def test_embeddings_stand_in_for_token_ids(kind):
    model, inputs = make(kind), inputs_of(kind)
    expected = answers(model(**inputs))
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(answers(model(inputs_embeds=embeds, **inputs)), expected)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(**inputs)


@pytest.mark.slow
@every_class
def test_forward_compiles_without_graph_breaks(kind):
    model, inputs = make(kind, num_hidden_layers=1), inputs_of(kind)
    if kind != "MegaModel":
        inputs.update(labels_of(kind, inputs))
    expected = model(**inputs)
    torch.compiler.reset()
    outputs = torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(answers(outputs), answers(expected))


@every_class
def test_encoders_and_heads_read_masks_of_any_type(kind):
    model, inputs = make(kind), inputs_of(kind)
    expected = answers(model(**inputs))
    for dtype in (torch.bool, torch.float32, torch.int32):
        mask = inputs["attention_mask"].to(dtype)
        assert torch.equal(answers(model(inputs["input_ids"], attention_mask=mask)), expected)
