"""generate(): every way of choosing tokens gives the same ones with and without a cache, across chunk borders."""

import copy

import pytest
import torch
from builders import make_ids, make_model
from transformers import GPT2Config, GPT2LMHeadModel

import mega_scale

NEW = 35  # from 5 tokens to 40: borders at 8, 16, 24 and 32
WAYS = {
    "greedy": {"do_sample": False},
    "beam-4": {"do_sample": False, "num_beams": 4},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "beam sampling": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
}


def lively(seed=3, **changes):
    """A model whose weights make both the chunk's attention and the moving average matter to every token."""
    model = make_model(seed=seed, spread=0.35, relative_positional_bias="simple", **changes)
    with torch.no_grad():
        for block in model.mega.layers:
            block.mega_layer.rel_pos_bias.rel_pos_bias.add_(0.5)  # relu2 is then not zero almost everywhere
    return model


def generate(model, ids, *, use_cache=True, seed=7, **options):
    torch.manual_seed(seed)
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, use_cache=use_cache, **settings)


@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("way", WAYS)
def test_cached_equals_uncached_over_chunk_borders(way, activation):
    model, ids = lively(attention_activation=activation), make_ids(2, 5)
    cached = generate(model, ids, **WAYS[way])
    assert torch.equal(cached, generate(model, ids, use_cache=False, **WAYS[way]))
    assert cached.shape[1] == 40
    # The comparison must not be one of a constant: many tokens, and other ones from another seed.
    assert len(cached[:, 5:].unique()) > 3
    if "sampl" in way:
        assert not torch.equal(cached, generate(model, ids, seed=8, **WAYS[way]))


@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
def test_greedy_tokens_are_the_best_ones_of_the_full_forward(activation):
    model, ids = lively(attention_activation=activation), make_ids(2, 5)
    text = generate(model, ids, do_sample=False)
    with torch.no_grad():
        best = model(text[:, :-1], use_cache=False).logits.argmax(-1)
        attended = model(text, output_attentions=True, use_cache=False).attentions
    assert torch.equal(text[:, 5:], best[:, 4:])
    assert all(weights.abs().amax(-1).median() > 1e-3 for weights in attended)


def test_one_seed_gives_one_sample():
    model, ids = lively(), make_ids(2, 5)
    assert torch.equal(*[generate(model, ids, **WAYS["sampling"]) for _ in range(2)])


def test_eos_ends_rows_alike_with_and_without_cache():
    model, ids = lively(), make_ids(3, 5)
    free = generate(model, ids, do_sample=False)
    eos = int(free[0, 20])
    rows = [
        generate(model, ids, do_sample=False, eos_token_id=eos, pad_token_id=1, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*rows)
    end = int((free[0, 5:] == eos).nonzero()[0]) + 5
    assert rows[0][0, end] == eos and (rows[0][0, end + 1 :] == 1).all()


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "another Mega"}])
def test_assisted_decoding_is_refused(options):
    model, ids = lively(), make_ids(1, 5)
    if "assistant_model" in options:
        options = {"assistant_model": lively(seed=4)}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, ids, do_sample=False, **options)


def test_assisting_another_model_is_refused():
    torch.manual_seed(0)
    target = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=8, n_layer=1, n_head=1)).eval()
    with pytest.raises(ValueError, match=r"Mega cache cannot drop tokens|stateful"):
        generate(target, make_ids(1, 5), do_sample=False, assistant_model=lively())


def test_a_conversation_goes_on_with_its_cache():
    model, cache = lively(), mega_scale.MegaCache(2)
    text = make_ids(2, 5)
    for turn in range(4):
        text = generate(model, text, do_sample=False, past_key_values=cache, max_new_tokens=7)
        assert cache.get_seq_length() == text.shape[1] - 1  # the last token has not been read yet
        text = torch.cat([text, make_ids(2, 3 + turn, seed=turn)], 1)
    fresh = mega_scale.MegaCache(2)
    rows = [
        generate(model, text, do_sample=False, max_new_tokens=20, past_key_values=past)
        for past in (copy.deepcopy(cache), fresh, None)
    ]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_one_prompt_many_answers():
    model, prompt = lively(), make_ids(1, 19)
    with torch.no_grad():
        cache = model(prompt[:, :-1], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    prompts = prompt.repeat(3, 1)
    got = generate(model, prompts, past_key_values=cache, **WAYS["sampling"])
    assert torch.equal(got, generate(model, prompts, **WAYS["sampling"])) and len(got.unique(dim=0)) == 3


def test_a_reset_cache_starts_again():
    model, ids = lively(), make_ids(2, 5)
    cache = mega_scale.MegaCache(2)
    want = generate(model, ids, do_sample=False, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert torch.equal(generate(model, ids, do_sample=False, past_key_values=cache), want)


def test_logits_to_keep():
    model, ids = lively(), make_ids(2, 21)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        for kept, expected in ((0, want), (1, want[:, -1:]), (9, want[:, -9:])):
            torch.testing.assert_close(model(ids, logits_to_keep=kept, use_cache=True).logits, expected)
        places = torch.tensor([0, 7, 8, 20])
        torch.testing.assert_close(model(ids, logits_to_keep=places).logits, want[:, places])
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, out: shapes.append(out.shape[1]))
    generate(model, ids, do_sample=False, max_new_tokens=3)
    handle.remove()
    assert shapes == [1, 1, 1]  # a prompt's logits are not computed


def test_scores_and_states_of_every_step():
    model, ids = lively(), make_ids(2, 5)
    out = generate(
        model, ids, do_sample=False, return_dict_in_generate=True, output_logits=True, output_hidden_states=True,
        output_attentions=True,
    )  # fmt: skip
    with torch.no_grad():
        want = model(out.sequences, use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), want[:, 4:-1], atol=2e-5, rtol=1e-4)
    assert isinstance(out.past_key_values, mega_scale.MegaCache)
    assert len(out.hidden_states) == NEW and out.hidden_states[1][0].shape == (2, 1, 24)
    assert len(out.attentions) == NEW and len(out.attentions[0]) == 2


def cache_bytes(config, batch, element_size):
    """The formula of the README."""
    averages = 4 * config.hidden_size * config.ema_projection_size
    widths = config.shared_representation_size + config.intermediate_size
    return config.num_hidden_layers * batch * (averages + element_size * config.chunk_size * widths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_follow_the_formula(dtype, tmp_path):
    lively().save_pretrained(tmp_path)
    model = mega_scale.MegaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for batch in (1, 3):
        for length in (1, 8, 50):
            with torch.no_grad():
                cache = model(make_ids(batch, length), use_cache=True).past_key_values
            assert cache.nbytes == cache_bytes(model.config, batch, dtype.itemsize)


@pytest.mark.slow
def test_16384_tokens_in_a_constant_cache():
    model = make_model(seed=3, chunk_size=128, num_hidden_layers=1)
    token, cache, sizes = make_ids(1, 1), None, set()
    with torch.no_grad():
        for _ in range(16384):
            out = model(token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits.argmax(-1)
            sizes.add(cache.nbytes)
    assert cache.get_seq_length() == 16384
    assert sizes == {cache_bytes(model.config, 1, 4)}
