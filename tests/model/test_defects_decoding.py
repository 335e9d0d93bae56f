"""Defects of transformers 4.37.2 that the models here do not have: caches, generation, padding before a prompt.

Every test carries the name of its row; `test_defects.py` has the others.
"""

import pytest
import torch
from builders import make_config, make_ids, make_model

import mega_scale

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def run(model, ids, pieces, **arguments):
    """Logits of calls over pieces of a text, each with the cache of the one before."""
    cache, logits, mask, end = None, [], arguments.pop("attention_mask", None), 0
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            end += piece.shape[1]
            part = None if mask is None else mask[:, :end]
            out = model(piece, attention_mask=part, past_key_values=cache, use_cache=True, **arguments)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, 1)


def whole(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments).logits


def left_padded(model, activation, use_cache):
    """Difference between a left-padded row and the same row alone."""
    ids = make_ids(1, 13)
    padded = torch.cat([torch.ones(1, 6, dtype=torch.long), ids], 1)
    mask = (torch.arange(19) >= 6).long()[None]
    logits = model(padded, attention_mask=mask, use_cache=use_cache).logits
    assert torch.isfinite(logits).all()
    return (logits[:, 6:] - whole(model, ids)).abs().max()


def test_several_tokens_with_a_cache():
    model, ids = make_model(), make_ids(2, 30)
    torch.testing.assert_close(run(model, ids, [11, 1, 7, 11]), whole(model, ids), **CLOSE)


@pytest.mark.parametrize("activation", ["laplace", "relu2"])
def test_laplace_or_relu2_cached_against_full_forward(activation):
    for chunked in (False, True):
        model, ids = make_model(attention_activation=activation, use_chunking=chunked), make_ids(2, 20)
        torch.testing.assert_close(run(model, ids, [1] * 20), whole(model, ids), **CLOSE)


@pytest.mark.parametrize("bias", ["simple", "rotary"])
def test_cross_attention_cached(bias):
    model, ids = make_model(add_cross_attention=True, relative_positional_bias=bias), make_ids(2, 20)
    source = {"encoder_hidden_states": torch.randn(2, 11, 24)}
    source["encoder_attention_mask"] = torch.arange(11) < torch.tensor([[11], [4]])
    torch.testing.assert_close(run(model, ids, [3] + [1] * 17, **source), whole(model, ids, **source), **CLOSE)


def test_generate_with_encoder_hidden_states():
    model, ids = make_model(add_cross_attention=True, seed=3), make_ids(2, 3)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    sources = [torch.randn(2, 9, 24) * 3 for _ in range(2)]
    rows = [model.generate(ids, encoder_hidden_states=source, **settings) for source in sources]
    assert not torch.equal(*rows)
    for source, got in zip(sources, rows, strict=True):
        want = ids
        for _ in range(20):
            want = torch.cat([want, whole(model, want, encoder_hidden_states=source)[:, -1:].argmax(-1)], 1)
        assert torch.equal(got, want)


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_causal_softmax(use_cache):
    assert left_padded(make_model(use_chunking=False), "softmax", use_cache) < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_causal_laplace(use_cache):
    model = make_model(use_chunking=False, attention_activation="laplace")
    assert left_padded(model, "laplace", use_cache) < 1e-5


@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
def test_cached_step_over_masked_keys(activation):
    settings = {"use_chunking": False, "relative_positional_bias": "simple", "attention_activation": activation}
    model, ids = make_model(**settings), make_ids(1, 12)
    with torch.no_grad():
        for block in model.mega.layers:
            block.mega_layer.rel_pos_bias.rel_pos_bias.add_(1.0)  # so that relu2 leaves every weight above zero
    mask = torch.ones_like(ids)
    mask[0, 4:7] = 0
    first = model(ids[:, :11], attention_mask=mask[:, :11], use_cache=True)
    last = model(ids[:, 11:], attention_mask=mask, past_key_values=first.past_key_values, output_attentions=True)
    for weights in last.attentions:
        assert weights.shape == (1, 1, 1, 12) and torch.equal(weights[0, 0] > 0, mask.bool())
    torch.testing.assert_close(last.logits, whole(model, ids, attention_mask=mask)[:, 11:], **CLOSE)


@pytest.mark.parametrize("prompt", [1, 7, 8, 20])
def test_chunked_generate(prompt):
    model, ids = make_model(seed=3), make_ids(2, prompt)
    settings = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    for use_cache in (True, False):
        want = ids
        for _ in range(30):
            want = torch.cat([want, whole(model, want)[:, -1:].argmax(-1)], 1)
        assert torch.equal(model.generate(ids, max_new_tokens=30, use_cache=use_cache, **settings), want)
    sizes = [model(make_ids(2, length), use_cache=True).past_key_values.nbytes for length in (8, 64, 200)]
    assert len(set(sizes)) == 1


def test_chunked_beam_search():
    model, ids = make_model(seed=3), make_ids(2, 5)
    settings = {"max_new_tokens": 30, "num_beams": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    rows = [model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False)]
    assert torch.equal(*rows)


def test_truncation_with_use_cache_on_or_off():
    model, ids = make_model(truncation=4), make_ids(2, 20)
    with pytest.raises(ValueError, match="truncation=4"):
        model(ids, use_cache=True)
    assert model(ids).past_key_values is None
    assert torch.equal(model(ids).logits, whole(model, ids))
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match="truncation=4"):
        model.generate(ids, use_cache=True, **settings)
    assert model.generate(ids, use_cache=False, **settings).shape == (2, 28)


def test_causal_lm_from_a_bidirectional_checkpoint(tmp_path, caplog):
    encoder = make_model(kind="MegaForMaskedLM", is_decoder=False, bidirectional=True)
    encoder.save_pretrained(tmp_path)
    config = mega_scale.MegaConfig.from_pretrained(tmp_path)
    config.is_decoder, config.bidirectional = True, False
    model, report = mega_scale.MegaForCausalLM.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    names = ("damping_factor", "decay_factor", "ema_expansion_matrix", "kernel_projection_matrix")
    expected = {f"mega.layers.{i}.mega_layer.ema_gate.{name}" for i in range(2) for name in names}
    assert {entry[0] for entry in report["mismatched_keys"]} == expected
    fresh = mega_scale.MegaForCausalLM(make_config(num_hidden_layers=2)).state_dict()
    for name, tensor in model.state_dict().items():
        if name in expected:
            assert tensor.shape == fresh[name].shape and torch.isfinite(tensor).all()
            assert abs(float(tensor.std() / fresh[name].std()) - 1) < 0.5, name
        elif name.startswith("mega."):
            assert torch.equal(tensor, encoder.state_dict()[name]), name
    assert torch.isfinite(model(make_ids(2, 20)).logits).all()
