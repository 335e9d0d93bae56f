"""Options of `generate()` that users of transformers combine, decoded with the cache and without it."""

import pytest
import torch
from builders import make_ids, make_model
from transformers import GenerationConfig, LogitsProcessorList, MinLengthLogitsProcessor, set_seed
from transformers.generation.streamers import BaseStreamer

OPTIONS = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_k": 20},
    "min_p": {"do_sample": True, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.1},
    "forbidden words": {"bad_words_ids": [[5], [9, 4]], "suppress_tokens": [7, 8]},
    "length": {"min_new_tokens": 18, "eos_token_id": list(range(3, 40))},
    "forced end": {"forced_eos_token_id": 2},
    "processor": {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(20, 2)])},
    "configuration": {"generation_config": GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=1)},
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("option", OPTIONS)
def test_cache_changes_nothing(model, option):
    ids, rows = make_ids(2, 11), []
    settings = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 1, "attention_mask": torch.ones_like(ids)}
    for use_cache in (True, False):
        set_seed(0)
        given = {"do_sample": False, **settings, **OPTIONS[option]}
        if "generation_config" in given:
            given = {"generation_config": given["generation_config"], "attention_mask": given["attention_mask"]}
        rows.append(model.generate(ids, use_cache=use_cache, **given))
    assert torch.equal(*rows) and rows[0].shape[1] > 11


def test_a_streamer_gets_every_token(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    ids, streamer = make_ids(1, 9), Collect()
    out = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=1, streamer=streamer)
    assert streamer.seen == out[0].tolist() and streamer.ended


def test_embeddings_begin_a_text_as_their_tokens_do(model):
    ids = make_ids(2, 13)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    settings["attention_mask"] = torch.ones_like(ids)
    made = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings)
    assert torch.equal(made, model.generate(ids, **settings)[:, 13:])


def test_stop_words_and_the_configuration_end_a_text(model):
    ids = make_ids(1, 9)
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 1, "attention_mask": torch.ones_like(ids)}
    free = model.generate(ids, eos_token_id=None, **settings)[0, 9:].tolist()
    end = free[4]
    ended = model.generate(ids, eos_token_id=[end, 60], **settings)[0, 9:].tolist()
    assert ended == free[: min(free.index(token) for token in (end, 60) if token in free) + 1]
