"""A model that is pickled, saved whole or copied is the same model."""

import copy
import io
import pickle

import pytest
import torch
from builders import make_ids, make_model
from every_class import CLASSES, answers, inputs_of, labels_of, make


def saved_whole(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301


WAYS = {"pickle": pickled, "torch.save": saved_whole, "copy": copy.deepcopy}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
@pytest.mark.parametrize("kind", CLASSES)
def test_before_and_after_a_training_step(way, kind):
    model, inputs = make(kind), inputs_of(kind)
    expected = answers(model(**inputs))
    assert torch.equal(answers(way(make(kind))(**inputs)), expected)
    outputs = model.train()(**inputs, **({} if kind == "MegaModel" else labels_of(kind, inputs)))
    (answers(outputs).sum() if kind == "MegaModel" else outputs.loss).backward()
    again = way(model.eval())
    assert torch.equal(answers(again(**inputs)), expected)
    assert again.config.to_dict() == model.config.to_dict()
    assert again is not model


@every_way
@pytest.mark.parametrize("changes", [{}, {"use_chunking": False}, {"kind": "MegalodonForCausalLM"}], ids=str)
def test_a_cache_goes_on(way, changes):
    model, ids = make_model(**changes), make_ids(2, 21)
    with torch.no_grad():
        cache = model(ids[:, :13], use_cache=True).past_key_values
        again = way(cache)
        expected = model(ids[:, 13:], past_key_values=cache).logits
        assert torch.equal(way(model)(ids[:, 13:], past_key_values=again).logits, expected)
        assert again.get_seq_length() == 21
