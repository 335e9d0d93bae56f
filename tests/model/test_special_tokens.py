"""Special token ids: which embedding is never learned, and which ids a model or a run refuses."""

import pytest
import torch
from builders import make_config, make_ids, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mega_scale
from mega_scale.config import MegaSection, model_config

WORDS = ["<unk>", "<pad>", "<s>", "</s>", "the", "cat", "!"]


def word_tokenizer(pad):
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


def learned_rows(model):
    """Rows of the word embeddings that begin away from zero and get a gradient as inputs."""
    weight = model.get_input_embeddings().weight
    ids = torch.arange(weight.shape[0])[None]
    model.mega(ids).last_hidden_state.square().sum().backward()
    return [row for row in range(weight.shape[0]) if weight[row].any() and weight.grad[row].any()]


@pytest.mark.parametrize("pad", ["<pad>", "</s>", "<s>", "<unk>", "the", "!"])
def test_a_run_learns_the_embedding_of_every_token_that_occurs_in_texts(pad):
    tokenizer = word_tokenizer(pad)
    config = model_config(MegaSection(hidden_size=16, num_hidden_layers=1), tokenizer)
    model = mega_scale.MegaForCausalLM(config).eval()
    assert learned_rows(model) == [row for row in range(7) if row != WORDS.index("<pad>") or pad != "<pad>"]


@pytest.mark.parametrize(
    "ids",
    [{"eos_token_id": 1}, {"bos_token_id": 1}, {"eos_token_id": [5, 1]}, {"sep_token_id": 1}, {"pad_token_id": None},
     {"decoder_start_token_id": 1}, {"pad_token_id": -1}],
    ids=str,
)  # fmt: skip
def test_a_padding_token_with_another_part_is_learned(ids, tmp_path):
    model = make_model(vocab_size=9, spread=0.0, **ids)
    assert learned_rows(model) == list(range(9))
    model.save_pretrained(tmp_path)
    assert learned_rows(mega_scale.MegaForCausalLM.from_pretrained(tmp_path).eval()) == list(range(9))
    assert learned_rows(make_model(vocab_size=9, spread=0.0)) == [0, *range(2, 9)]


def test_weights_made_when_that_row_stayed_at_zero_load_as_they_are(tmp_path):
    model = make_model(eos_token_id=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = 0
    model.save_pretrained(tmp_path)
    loaded = mega_scale.MegaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(make_ids(2, 9)).logits, model(make_ids(2, 9)).logits)
    loaded(make_ids(2, 9).index_fill(1, torch.tensor([4]), 1), labels=make_ids(2, 9)).loss.backward()
    assert loaded.get_input_embeddings().weight.grad[1].any()


@pytest.mark.parametrize(
    "ids",
    [{"pad_token_id": 5000}, {"pad_token_id": -1}, {"eos_token_id": 5000}, {"eos_token_id": [3, 7]},
     {"bos_token_id": 7}, {"eos_token_id": [-1]}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tokenizer", [word_tokenizer("<pad>"), None], ids=["tokenizer", "no tokenizer"])
def test_a_run_refuses_ids_outside_the_vocabulary(ids, tokenizer):
    (name,) = ids
    with pytest.raises(ValueError, match=rf"^model\.{name}=.*{ids[name]}.*from 0 to 6".replace("[", "\\[")):
        model_config(MegaSection(**ids, vocab_size=7), tokenizer)


def test_a_model_refuses_only_a_padding_token_that_has_no_row():
    with pytest.raises(ValueError, match=r"^pad_token_id=61 lies outside the vocabulary.*from 0 to 60"):
        make_model(pad_token_id=61)
    # 4.37.2 loads all of these.
    for ids in ({"eos_token_id": 5000}, {"pad_token_id": -1}, {"vocab_size": 2}, {"bos_token_id": -1}):
        assert torch.isfinite(make_model(**ids)(torch.tensor([[0, 1, 0]])).logits).all()
    assert model_config(MegaSection(vocab_size=2)).eos_token_id == 2  # nobody chose it


def test_a_vocabulary_is_not_cut_below_its_padding_token(tmp_path):
    model = make_model(pad_token_id=40)
    with pytest.raises(ValueError, match=r"vocabulary of 32 has no pad_token_id=40.*config\.pad_token_id"):
        model.resize_token_embeddings(32, pad_to_multiple_of=8)
    assert model.config.vocab_size == 61 and model(make_ids(1, 5)).logits.shape[-1] == 61
    model.resize_token_embeddings(34, pad_to_multiple_of=8 * 6)
    model.config.pad_token_id = 0
    model.resize_token_embeddings(9)
    model.save_pretrained(tmp_path)
    assert mega_scale.MegaForCausalLM.from_pretrained(tmp_path).config.vocab_size == 9


def test_sizes_of_parts_that_a_model_lacks_may_be_anything():
    changes = {"type_vocab_size": 0, "max_positions": 0, "nffn_hidden_size": 0, "use_normalized_ffn": False}
    assert torch.isfinite(make_model(**changes)(make_ids(1, 9)).logits).all()
    with pytest.raises(Exception, match="validate_architecture"):
        make_config(type_vocab_size=0, add_token_type_embeddings=True)
