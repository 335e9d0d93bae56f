"""Defects of transformers 4.37.2 that the models here do not have: construction, masks, precision, training, heads.

Every test carries the name of its row; `test_defects_decoding.py` has the rows on caches and generation.
"""

import copy
import warnings

import pytest
import torch
from builders import make_config, make_ids, make_model
from huggingface_hub.errors import StrictDataclassError

import mega_scale
from mega_scale.model.basic_layers import MegaDropout
from mega_scale.model.layers import MegaSequenceNorm
from mega_scale.ops.ema import ema_coefficients

ENCODER = {"is_decoder": False, "bidirectional": True}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def encode(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, **arguments).last_hidden_state


def test_rmsnorm():
    x = torch.randn(2, 5, 24) * 50
    torch.testing.assert_close(MegaSequenceNorm("rmsnorm", 24)(x).square().mean(-1), torch.ones(2, 5), **CLOSE)
    model = make_model(normalization_type="rmsnorm", num_hidden_layers=6, kind="MegaModel")
    assert encode(model, make_ids(2, 30)).abs().max() < 1e3


def test_rmsnorm_of_a_4_37_2_folder_warns(tmp_path):
    config = make_config(normalization_type="rmsnorm")
    mega_scale.MegaForCausalLM(config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mega_scale.MegaForCausalLM.from_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"transformers_version": "5', '"transformers_version": "4'))
    for cls in (mega_scale.MegaForCausalLM, mega_scale.MegaModel):
        with pytest.warns(UserWarning, match="normalization_type='rmsnorm'"):
            cls.from_pretrained(tmp_path)


def test_layernorm_with_norm_affine_false():
    model = make_model(normalization_type="layernorm", norm_affine=False)
    assert not [name for name, _ in model.named_parameters() if ".norm." in name]
    assert torch.isfinite(model(make_ids(2, 9)).logits).all()


def test_simple_chunk_size_above_max_positions():
    model = make_model(relative_positional_bias="simple", chunk_size=16, max_positions=4)
    out = model(make_ids(2, 40), labels=make_ids(2, 40))
    out.loss.backward()
    assert torch.isfinite(out.logits).all()
    table = model.mega.layers[0].mega_layer.rel_pos_bias.rel_pos_bias
    assert table.shape == (7,) and torch.isfinite(table.grad).all()


def test_simple_chunk_size_set_but_use_chunking_false():
    settings = {"relative_positional_bias": "simple", "use_chunking": False}
    ids = make_ids(2, 30)
    want = make_model(**settings, chunk_size=-1)(ids).logits
    assert torch.equal(make_model(**settings, chunk_size=8)(ids).logits, want)


def test_rotary_with_odd_z_or_odd_hidden_size():
    with pytest.raises(StrictDataclassError, match="shared_representation_size=7"):
        make_model(shared_representation_size=7)
    odd = make_model(hidden_size=23, intermediate_size=19)
    assert torch.isfinite(odd(make_ids(2, 9)).logits).all()
    simple = make_model(shared_representation_size=7, relative_positional_bias="simple")
    assert torch.isfinite(simple(make_ids(2, 9)).logits).all()


@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
def test_bool_masks(activation):
    ids = make_ids(2, 13)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    for kind, settings in (("MegaForCausalLM", {}), ("MegaModel", ENCODER)):
        model = make_model(kind=kind, attention_activation=activation, **settings)
        outs = [model(ids, attention_mask=m)[0] for m in (mask, mask.bool(), mask.float())]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
def test_fully_padded_encoder_source(activation, implementation):
    model = make_model(
        add_cross_attention=True, attention_activation=activation, attn_implementation=implementation, kind="MegaModel"
    )
    source, ids = torch.randn(2, 6, 24), make_ids(2, 11)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    out = model(ids, encoder_hidden_states=source, encoder_attention_mask=mask).last_hidden_state
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
def test_a_fully_padded_chunk(activation):
    ids = make_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    mask[1, 8:16] = 0
    for kind, settings in (("MegaForCausalLM", {}), ("MegaModel", ENCODER)):
        model = make_model(kind=kind, attention_activation=activation, **settings)
        out = model(ids, attention_mask=mask)[0]
        out.square().sum().backward()
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("length", [1, 5, 7])
def test_chunked_decoder_shorter_than_a_chunk(length):
    ids = make_ids(2, length)
    torch.testing.assert_close(make_model()(ids).logits, make_model(use_chunking=False)(ids).logits, **CLOSE)


@pytest.mark.parametrize("length", [9, 21, 31])
def test_length_no_multiple_of_the_chunk(length):
    ids = make_ids(2, length)
    decoder = make_model()
    whole = decoder(make_ids(2, 32).index_copy(1, torch.arange(length), ids)).logits  # a causal model sees no tail
    torch.testing.assert_close(decoder(ids).logits, whole[:, :length], **CLOSE)
    encoder = make_model(kind="MegaModel", **ENCODER)
    padded = torch.cat([ids, torch.ones(2, 32 - length, dtype=torch.long)], 1)
    mask = (torch.arange(32) < length).expand(2, 32)
    torch.testing.assert_close(encode(encoder, ids), encode(encoder, padded, attention_mask=mask)[:, :length], **CLOSE)


def test_default_bidirectional_with_is_decoder_and_labels():
    for build in (mega_scale.MegaForCausalLM, mega_scale.MegaModel):
        with pytest.raises(ValueError, match=r"is_decoder=True.*bidirectional=True"):
            build(mega_scale.MegaConfig(is_decoder=True))


def test_eval_then_load_state_dict():
    model, other, ids = make_model(seed=1), make_model(seed=2), make_ids(2, 20)
    with torch.no_grad():
        model(ids)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_backward_twice_in_eval_and_with_grad_after_no_grad():
    model, ids = make_model(), make_ids(2, 20)
    with torch.no_grad():
        model(ids)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.mega.layers[0].mega_layer.ema_gate.decay_factor.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().min() > 0


def test_eval_in_fp32_then_bfloat16():
    model, ids = make_model(), make_ids(2, 20)
    with torch.no_grad():
        want = model(ids).logits
        got = model.bfloat16()(ids).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.1 * want.abs().max()


def test_deepcopy_after_an_eval_forward():
    model, ids = make_model(), make_ids(2, 20)
    with torch.no_grad():
        out = model(ids)
        assert torch.equal(copy.deepcopy(model)(ids).logits, out.logits)
        last = [model(ids[:, :1], past_key_values=cache).logits for cache in (copy.deepcopy(out.past_key_values), None)]
        assert torch.equal(model(ids[:, :1], past_key_values=out.past_key_values).logits, last[0])
        assert not torch.equal(*last)


@pytest.mark.parametrize("how", ["from_pretrained", "autocast"])
def test_bf16_or_autocast_kernel(how, tmp_path):
    model = make_model(kind="MegaModel")
    slow = torch.logit(torch.tensor(3e-4**0.5))  # p = a: p a = 3e-4, which bf16 would round to a decay of exactly one
    with torch.no_grad():
        for block in model.layers:
            block.mega_layer.ema_gate.damping_factor.fill_(slow)
            block.mega_layer.ema_gate.decay_factor.fill_(slow)
    model.save_pretrained(tmp_path)
    seen = []
    gate = model.layers[0].mega_layer.ema_gate
    if how == "from_pretrained":
        gate = mega_scale.MegaModel.from_pretrained(tmp_path, dtype=torch.bfloat16).layers[0].mega_layer.ema_gate
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        coefficients = ema_coefficients(
            gate.damping_factor, gate.decay_factor, gate.ema_expansion_matrix, gate.kernel_projection_matrix
        )
        x = torch.ones(1, 2000, 24, dtype=torch.bfloat16)
        seen.append(gate(x)[1])
    assert coefficients.log_decay.dtype == torch.float32
    decay = coefficients.log_decay.exp()
    torch.testing.assert_close(decay, torch.full_like(decay, 1 - 3e-4), atol=1e-7, rtol=0)
    gain = 3e-4**0.5 * model.layers[0].mega_layer.ema_gate.ema_expansion_matrix[..., 0]
    want = gain * (1 - (1 - 3e-4) ** 2000) / 3e-4  # a geometric sum; a decay of one would give 33% more
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0][0], want.detach(), atol=1e-3, rtol=1e-3)


def test_feature_dropout_on_chunked_v():
    dropout = MegaDropout(0.5, featurewise=True).train()
    dropped = dropout(torch.ones(3, 16, 100)) == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped)) and 0.3 < dropped.float().mean() < 0.7
    model = make_model(use_feature_dropout=True, hidden_dropout_prob=0.5, dropout_prob=0.0, kind="MegaModel").train()
    seen = []
    handle = model.layers[0].mega_layer.hidden_dropout.register_forward_hook(lambda m, i, out: seen.append((i[0], out)))
    model(make_ids(3, 40))
    handle.remove()
    value, out = seen[0]
    assert value.shape == (3, 40, 20)  # before it is cut into chunks
    per_row = ((out == 0) & (value != 0)).all(1).sum(1)
    assert ((per_row > 0) & (per_row < 20)).all()  # features, neither all nor none, of each sequence


@pytest.mark.parametrize("kind", ["batchnorm", "syncbatchnorm"])
def test_batchnorm_with_a_causal_mask_in_training(kind):
    model, ids = make_model(normalization_type=kind), make_ids(2, 9)
    with torch.no_grad():  # running statistics show no position another one
        changed = ids.index_fill(1, torch.tensor([5]), 7)
        assert torch.equal(model(ids).logits[:, :5], model(changed).logits[:, :5])
    for part in (model, model.mega.layers[1].nffn.norm):
        model.eval()
        part.train()
        with pytest.raises(ValueError, match=r"batch norms.*future.*eval\(\)"):
            model(ids, labels=ids)
    norm = MegaSequenceNorm(kind, 24).train()
    x = torch.randn(2, 9, 24)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    padded = torch.where(mask[..., None], x, torch.full_like(x, 1e6))
    out = norm(padded, mask)
    torch.testing.assert_close(norm.norm.running_mean, 0.1 * x[mask].mean(0), **CLOSE)
    torch.testing.assert_close(out[mask].mean(0), torch.zeros(24), **CLOSE)


def test_sequence_head_on_a_decoder():
    model = make_model(kind="MegaForSequenceClassification", num_labels=3)
    ids = make_ids(2, 13)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        out = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(out[1:], model(ids[1:, :9]).logits, **CLOSE)
        changed = ids.index_fill(1, torch.tensor([8]), 7)
        assert (model(changed, attention_mask=mask).logits - out).abs().min() > 1e-4


def test_sequence_head_left_padding():
    ids = make_ids(1, 9)
    padded = torch.cat([torch.ones(1, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(14) >= 5).long()[None]
    for settings in ({}, ENCODER):
        model = make_model(kind="MegaForSequenceClassification", num_labels=3, **settings)
        torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["MegaForCausalLM", "MegaForMaskedLM", "MegaForTokenClassification"])
def test_loss_over_micro_batches(kind):
    model = make_model(kind=kind, **({} if kind == "MegaForCausalLM" else ENCODER))
    ids = make_ids(4, 12)
    labels = ids % model.config.num_labels if kind == "MegaForTokenClassification" else ids.clone()
    labels[0, 3:] = -100
    counted = labels[:, 1:] if kind == "MegaForCausalLM" else labels
    count = (counted != -100).sum()
    model(ids, labels=labels).loss.backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        model(ids[part], labels=labels[part], num_items_in_batch=count).loss.backward()
    for got, expected in zip((p.grad for p in model.parameters() if p.grad is not None), want, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_token_types_longer_than_max_positions():
    model = make_model(kind="MegaModel", add_token_type_embeddings=True, max_positions=8, **ENCODER)
    ids = make_ids(2, 40)
    torch.testing.assert_close(encode(model, ids), encode(model, ids, token_type_ids=torch.zeros_like(ids)))
    assert not torch.equal(encode(model, ids), encode(model, ids, token_type_ids=torch.ones_like(ids)))


def test_qa_with_three_labels():
    with pytest.raises(ValueError, match="num_labels=3"):
        make_model(kind="MegaForQuestionAnswering", num_labels=3, **ENCODER)


def test_return_dict_false():
    model, ids = make_model(), make_ids(2, 9)
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (2, 9, 61)
    logits, cache, states, weights = model(
        ids, use_cache=True, output_hidden_states=True, output_attentions=True, return_dict=False
    )
    assert isinstance(cache, mega_scale.MegaCache) and len(states) == 3 and len(weights) == 2
    encoder = make_model(kind="MegaModel", **ENCODER)
    hidden, pooled = encoder(ids, return_dict=False)
    assert hidden.shape == (2, 9, 24) and pooled.shape == (2, 24)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradient_checkpointing_and_sdpa(implementation):
    ids, gradients = make_ids(2, 20), []
    for checkpointing in (False, True):
        model = make_model(attn_implementation=implementation).train()
        assert model.config._attn_implementation == implementation
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_no_split_modules():
    model = make_model()
    assert model._no_split_modules in (["MegaBlock"], {"MegaBlock"})
    assert {type(layer).__name__ for layer in model.mega.layers} == {"MegaBlock"}
