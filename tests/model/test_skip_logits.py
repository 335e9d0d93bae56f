"""The causal model's loss without logits is the one with them."""

import pytest
import torch
from transformers import set_seed

from mega_scale import MegaConfig, MegaForCausalLM


def model(**changes):
    set_seed(1)
    config = MegaConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, intermediate_size=24, nffn_hidden_size=20, chunk_size=8,
        shared_representation_size=8, ema_projection_size=2, use_chunking=True, is_decoder=True, bidirectional=False,
        **changes,
    )  # fmt: skip
    return MegaForCausalLM(config).eval()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "lm_head_bias": False}])
@pytest.mark.parametrize("items", [None, 7])
def test_loss_and_gradients_are_those_with_logits(changes, items):
    made, ids = model(**changes), torch.randint(1, 61, (3, 21))
    found = []
    for skip in (False, True):
        made.zero_grad()
        output = made(input_ids=ids, labels=ids, num_items_in_batch=items, skip_logits=skip)
        assert (output.logits is None) == skip
        output.loss.backward()
        found.append((output.loss, {name: value.grad for name, value in made.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    for name, expected in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_without_labels_logits_are_there():
    assert model()(input_ids=torch.ones(1, 4, dtype=torch.int64), skip_logits=True).logits.shape == (1, 4, 61)


def test_a_resized_head_still_computes_losses():
    made = model()
    made.resize_token_embeddings(70)
    ids = torch.full((1, 9), 69)
    with_logits, without = (made(input_ids=ids, labels=ids, skip_logits=skip).loss for skip in (False, True))
    torch.testing.assert_close(with_logits, without)
    assert made.lm_head.weight is made.mega.embedding_layer.word_embeddings.weight
