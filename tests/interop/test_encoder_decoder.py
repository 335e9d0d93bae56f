"""EncoderDecoderModel of transformers with a Mega encoder and a Mega decoder with cross-attention."""

import pytest
import torch
from builders import make_ids, make_model
from transformers import EncoderDecoderConfig, EncoderDecoderModel

import mega_scale


def make_pair(seed=3, encoder_width=24, **changes):
    """Encoder and decoder with weights large enough to matter."""
    encoder = make_model(
        seed=seed, spread=0.3, kind="MegaModel", is_decoder=False, bidirectional=True, hidden_size=encoder_width
    )
    decoder = make_model(seed=seed + 1, spread=0.3, add_cross_attention=True, **changes)
    torch.manual_seed(seed)
    pair = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    for config in (pair.config, pair.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 1, None
    return pair


def source():
    """Two rows of 19 and 12 tokens, padded on the right."""
    ids = make_ids(2, 19)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


@pytest.mark.parametrize("width", [24, 16])
def test_learns_from_labels(width):
    pair, labels = make_pair(encoder_width=width).train(), make_ids(2, 13, seed=5)
    labels[0, 9:] = -100
    optimizer = torch.optim.AdamW(pair.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        out = pair(**source(), labels=labels)
        out.loss.backward()
        losses.append(out.loss.item())
        if step == 0:
            # Only the pooler has no use here.
            idle = {name for name, p in pair.named_parameters() if p.grad is None}
            assert all("pooler" in name for name in idle), idle
            embedding = pair.encoder.get_input_embeddings().weight.grad
            assert torch.isfinite(embedding).all() and embedding.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
    assert out.logits.shape == (2, 13, 61)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True}], ids=str)
def test_generates_alike_with_and_without_cache(options, activation):
    pair = make_pair(attention_activation=activation)
    rows = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        rows.append(pair.generate(**source(), max_new_tokens=30, use_cache=use_cache, **options))
    assert torch.equal(*rows) and rows[0].shape == (2, 31)
    other = source()
    other["input_ids"] = (other["input_ids"] + 7) % 58 + 3
    torch.manual_seed(0)
    assert not torch.equal(pair.generate(**other, max_new_tokens=30, **options), rows[0])


def test_source_padding_changes_nothing():
    pair, batch = make_pair(), source()
    together = pair.generate(**batch, max_new_tokens=20, do_sample=False)
    alone = pair.generate(
        batch["input_ids"][1:, :12], attention_mask=torch.ones(1, 12), max_new_tokens=20, do_sample=False
    )
    assert torch.equal(together[1:], alone)


def test_saves_and_loads(tmp_path):
    pair = make_pair()
    pair.save_pretrained(tmp_path / "pair")
    loaded = EncoderDecoderModel.from_pretrained(tmp_path / "pair")
    arguments = {**source(), "decoder_input_ids": make_ids(2, 9, seed=5)}
    assert type(loaded.encoder) is mega_scale.MegaModel and type(loaded.decoder) is mega_scale.MegaForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(loaded(**arguments).logits, pair(**arguments).logits)


def test_is_made_from_two_folders(tmp_path):
    encoder = make_model(kind="MegaForMaskedLM", is_decoder=False, bidirectional=True)
    encoder.save_pretrained(tmp_path / "encoder")
    make_model(add_cross_attention=True).save_pretrained(tmp_path / "decoder")
    pair = EncoderDecoderModel.from_encoder_decoder_pretrained(str(tmp_path / "encoder"), str(tmp_path / "decoder"))
    assert isinstance(pair.config, EncoderDecoderConfig) and pair.config.decoder.add_cross_attention
    with torch.no_grad():
        logits = pair(**source(), decoder_input_ids=make_ids(2, 9)).logits
        states = encoder.eval().mega(**source()).last_hidden_state
        want = pair.decoder(
            make_ids(2, 9), encoder_hidden_states=states, encoder_attention_mask=source()["attention_mask"]
        ).logits
    torch.testing.assert_close(logits, want)
