"""Samples begin as documents did, stop where they ended, and never end a run."""

import pytest
import torch
from tokenizers_at_hand import bert_like, byte_level, word_level

from mega_scale.config import model_config, parse
from mega_scale.data import as_trained, load_tokenizer, vocabulary_size
from mega_scale.model import MegaForCausalLM
from mega_scale.training.trained_model import check_sample, generate_text

TINY = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16", "model.nffn_hidden_size=16"]


def model_for(tokenizer, *changes):
    torch.manual_seed(0)
    return MegaForCausalLM(model_config(parse([*TINY, *changes]).model, tokenizer)).eval()


KINDS = {
    "bytes": (lambda: load_tokenizer("byte"), 2),
    "sep alone": (bert_like, 3),
    "no pad, no bos, holes": (lambda: word_level({"a": 0, "<unk>": 7, "</s>": 500}, eos_token="</s>"), 500),
    "bos": (lambda: byte_level("<s> $A"), 2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", " ", "a"])
def test_every_kind_of_prompt_is_continued_until_a_document_ends(kind, prompt):
    make, end = KINDS[kind]
    tokenizer = as_trained(make(), False)
    model = model_for(tokenizer)
    assert model.config.eos_token_id == end and model.config.vocab_size == vocabulary_size(tokenizer)
    with torch.no_grad():
        model.lm_head.bias[end] = 100.0  # says nothing but the end
    check_sample(model.config, tokenizer, prompt, 20)
    seen = []
    for stop in (True, False):
        calls = []
        options = {"seed": 0, "stop_at_eos": stop, "every_token": lambda calls=calls: calls.append(0)}
        generate_text(model, tokenizer, prompt, max_new_tokens=20, **options)
        seen.append(len(calls))
    assert seen == [1, 20]


def test_a_sample_beyond_the_positions_is_refused_before_the_run():
    tokenizer = load_tokenizer("byte")
    simple = ["model.relative_positional_bias=simple", "model.max_positions=16"]
    model = model_for(tokenizer, *simple, "model.use_chunking=false")
    check_sample(model.config, tokenizer, "a" * 8, 9)
    text = generate_text(model, tokenizer, "a" * 8, max_new_tokens=9, seed=0)
    assert text.startswith("a" * 8)
    with pytest.raises(ValueError, match=r"8 tokens and 10 more are beyond max_positions=16"):
        check_sample(model.config, tokenizer, "a" * 8, 10)
    chunked = model_for(tokenizer, *simple, "model.use_chunking=true", "model.chunk_size=16")
    check_sample(chunked.config, tokenizer, "a" * 8, 1000)


def test_a_truncated_average_generates_without_a_cache():
    tokenizer = load_tokenizer("byte")
    model = model_for(tokenizer, "model.truncation=8", "train.sample_every=0")
    assert generate_text(model, tokenizer, "ab", max_new_tokens=5, seed=0).startswith("ab")


def test_a_vocabulary_that_leaves_ids_out_is_refused_in_one_line():
    tokenizer = word_level({"a": 0, "</s>": 5000}, eos_token="</s>")
    assert model_for(tokenizer).config.vocab_size == 5001
    with pytest.raises(ValueError, match=r"model\.vocab_size=2 .* less than the 5001 ids"):
        model_for(tokenizer, "model.vocab_size=2")
