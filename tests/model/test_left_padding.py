"""Left-padded batches equal unpadded runs: logits, cached calls of any length, generated tokens, attention weights."""

import pytest
import torch
from builders import make_ids, make_model

LENGTHS = (21, 13, 8, 1)  # real tokens of each row; chunks of 8
OPTIONS = [
    {"attention_activation": activation, "use_chunking": chunked, "relative_positional_bias": bias}
    for activation in ("softmax", "laplace", "relu2")
    for chunked in (True, False)
    for bias in ("rotary", "simple")
]


def name(options):
    chunked = "chunked" if options["use_chunking"] else "whole"
    return f"{options['attention_activation']}-{chunked}-{options['relative_positional_bias']}"


def left_padded(rows, width):
    ids = torch.full((len(rows), width), 1)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def rows_of(lengths, seed=0):
    return [make_ids(1, length, seed=seed + length)[0] for length in lengths]


def alone(model, rows):
    with torch.no_grad():
        return [model(row[None], use_cache=False).logits[0] for row in rows]


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_logits_equal_those_of_unpadded_rows(options):
    model, rows = make_model(**options), rows_of(LENGTHS)
    for width in (21, 24, 27):
        ids, mask = left_padded(rows, width)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        for got, want in zip(logits, alone(model, rows), strict=True):
            torch.testing.assert_close(got[width - len(want) :], want, atol=1e-5, rtol=1e-5)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("pieces", [[23] + [1] * 7, [5, 9, 1, 8, 7], [30]], ids=str)
def test_cached_calls_equal_unpadded_rows(options, pieces):
    model, rows = make_model(**options), rows_of((30, 22, 17, 9))
    ids, mask = left_padded(rows, 30)
    cache, got, end = None, [], 0
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            end += piece.shape[1]
            out = model(piece, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            got.append(out.logits)
    for logits, want in zip(torch.cat(got, 1), alone(model, rows), strict=True):
        torch.testing.assert_close(logits[30 - len(want) :], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_generated_tokens_equal_those_of_unpadded_rows(options):
    model, rows = make_model(seed=2, **options), rows_of((11, 6, 3))
    ids, mask = left_padded(rows, 11)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    want = [model.generate(row[None], attention_mask=torch.ones(1, len(row)), **settings)[0, -30:] for row in rows]
    for use_cache in (True, False):
        got = model.generate(ids, attention_mask=mask, use_cache=use_cache, **settings)[:, -30:]
        assert torch.equal(got, torch.stack(want)), f"use_cache={use_cache}"


@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_beam_search_of_a_padded_batch(activation):
    model, rows = make_model(seed=2, attention_activation=activation), rows_of((11, 6, 3))
    ids, mask = left_padded(rows, 11)
    settings = {"max_new_tokens": 20, "do_sample": False, "num_beams": 4, "eos_token_id": None, "pad_token_id": 1}
    want = [model.generate(row[None], attention_mask=torch.ones(1, len(row)), **settings)[0, -20:] for row in rows]
    got = model.generate(ids, attention_mask=mask, **settings)[:, -20:]
    assert torch.equal(got, torch.stack(want))


def test_weights_of_a_padded_batch_lie_in_its_own_columns():
    model, rows = make_model(use_chunking=False), rows_of((9, 4))
    ids, mask = left_padded(rows, 9)
    with torch.no_grad():
        got = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
        for i, row in enumerate(rows):
            want = model(row[None], output_attentions=True, use_cache=False).attentions
            for ours, theirs in zip(got, want, strict=True):
                assert (ours[i, 0, :, : 9 - len(row)] == 0).all()
                torch.testing.assert_close(ours[i, 0, 9 - len(row) :, 9 - len(row) :], theirs[0, 0])
        first = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
        last = model(ids[:, 8:], attention_mask=mask, past_key_values=first.past_key_values, output_attentions=True)
    torch.testing.assert_close(last.attentions[1], got[1][:, :, -1:])


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_encoder_rows(activation, chunked):
    model = make_model(
        kind="MegaModel", is_decoder=False, bidirectional=True, attention_activation=activation, use_chunking=chunked
    )
    rows = rows_of((21, 16, 5))
    ids, mask = left_padded(rows, 24)
    with torch.no_grad():
        got = model(ids, attention_mask=mask).last_hidden_state
        for hidden, row in zip(got, rows, strict=True):
            want = model(row[None], attention_mask=torch.ones(1, len(row))).last_hidden_state[0]
            torch.testing.assert_close(hidden[24 - len(row) :], want, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_unpadded_rows():
    rows = rows_of((21, 13, 2))
    ids, mask = left_padded(rows, 24)
    labels = ids.masked_fill(mask == 0, -100)
    model = make_model()
    count = sum(len(row) - 1 for row in rows)
    # The first real token is predicted from padding in the padded batch only.
    for label in labels:
        label[(label != -100).nonzero()[0]] = -100
    model(ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row in rows:
        model(row[None], labels=row[None], num_items_in_batch=count).loss.backward()
    for one, other in zip(got, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_cross_attention_positions():
    model = make_model(add_cross_attention=True)
    encoder = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(5))
    encoder_mask = torch.ones(2, 10, dtype=torch.bool)
    encoder_mask[1, 6:] = False
    rows = rows_of((19, 7))
    ids, mask = left_padded(rows, 19)
    with torch.no_grad():
        got = model(ids, attention_mask=mask, encoder_hidden_states=encoder, encoder_attention_mask=encoder_mask).logits
        for i, row in enumerate(rows):
            want = model(
                row[None], encoder_hidden_states=encoder[i : i + 1], encoder_attention_mask=encoder_mask[i : i + 1]
            ).logits[0]
            torch.testing.assert_close(got[i, 19 - len(row) :], want, atol=1e-5, rtol=1e-5)


def test_generate_carries_the_encoder():
    model = make_model(add_cross_attention=True, seed=3)
    encoder = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(5)) * 3
    ids = make_ids(2, 4)
    settings = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    for beams in (1, 3):
        cached = model.generate(ids, encoder_hidden_states=encoder, num_beams=beams, **settings)
        whole = model.generate(ids, encoder_hidden_states=encoder, num_beams=beams, use_cache=False, **settings)
        assert torch.equal(cached, whole)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model(ids)
