"""Which caches a model takes, and what it says to others."""

import pytest
import torch
from builders import make_ids, make_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import mega_scale


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        lambda model: DynamicCache(),
        lambda model: DynamicCache(config=model.config),
        lambda model: StaticCache(config=model.config, max_cache_len=40),
        lambda model: ((torch.zeros(2, 1),) * 4,) * 2,
        lambda model: [],
        lambda model: torch.zeros(2),
    ],
)
def test_other_caches_are_refused_by_naming_the_one_that_is_taken(other, cross):
    model, ids = make_model(add_cross_attention=cross), make_ids(2, 9)
    encoder = {"encoder_hidden_states": torch.zeros(2, 5, 24)} if cross else {}
    for use_cache in (None, True, False):
        with pytest.raises(ValueError, match=r"mega_scale\.MegaCache"):
            model(ids, past_key_values=other(model), use_cache=use_cache, **encoder)


def test_a_used_cache_of_an_encoder_and_a_decoder_is_refused_and_an_empty_one_replaced():
    model, ids = make_model(), make_ids(2, 9)
    for inner in (DynamicCache(), DynamicCache(config=model.config)):
        empty = EncoderDecoderCache(inner, DynamicCache())
        assert isinstance(model(ids, past_key_values=empty).past_key_values, mega_scale.MegaCache)
    used = EncoderDecoderCache(DynamicCache(), DynamicCache())
    used.self_attention_cache.update(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8), 0)
    with pytest.raises(ValueError, match=r"EncoderDecoderCache.*MegaCache"):
        model(ids, past_key_values=used)


def test_a_cache_of_another_model_or_batch_is_refused():
    model, ids = make_model(), make_ids(2, 9)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 2 rows, the input 3"):
        model(make_ids(3, 1), past_key_values=cache)
    for layers in (1, 3):
        with pytest.raises(ValueError, match=f"has {layers} layers, the model 2"):
            model(ids, past_key_values=mega_scale.MegaCache(layers))


@pytest.mark.parametrize("implementation", ["static", "dynamic", "offloaded", "quantized"])
def test_generate_uses_its_own_cache_whichever_is_asked_for(implementation):
    model, ids = make_model(seed=3), make_ids(2, 5)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    got = model.generate(ids, cache_implementation=implementation, **settings)
    assert torch.equal(got, model.generate(ids, **settings))


MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", MODES)
def test_a_cache_goes_on_with_or_without_gradients(before, after, chunked):
    model, ids = make_model(use_chunking=chunked), make_ids(2, 20)
    want = model(ids, use_cache=False).logits[:, 11:].detach()
    with before():
        cache = model(ids[:, :11], use_cache=True).past_key_values
    with after():
        got = [model(part, past_key_values=cache).logits for part in ids[:, 11:].split([1, 2, 6], 1)]
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)
