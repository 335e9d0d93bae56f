"""Documents that share a row compute what each computes alone: logits, loss, gradients; cached, and both ways."""

import pytest
import torch
from builders import make_ids, make_model
from documents_alone import CHUNK, LENGTH, STARTS, all_alone, packed, spans, without_chunks

ACTIVATIONS = ("softmax", "laplace", "relu2")


def model_of(activation="softmax", bias="rotary", **changes):
    keys = {"chunk_size": CHUNK, "max_positions": CHUNK, "attention_activation": activation}
    return make_model(relative_positional_bias=bias, **(keys | changes))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("bias", ["rotary", "simple"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_logits_loss_and_gradients_are_those_of_every_document_alone(activation, bias, implementation):
    model = model_of(activation, bias)
    model.config._attn_implementation = implementation
    logits, loss, gradients = all_alone(without_chunks(model.config, model.state_dict()))
    tokens, labels, starts = packed()
    output = model(input_ids=tokens, shift_labels=labels, document_starts=starts, use_cache=False)
    output.loss.backward()
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys() and len(found) > 30
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    # What is kept apart matters: without the starts, everything but each row's first document differs.
    leaky = model(input_ids=tokens, use_cache=False).logits
    assert (leaky - logits)[0, 8:].abs().amax(-1).min() > 1e-4
    torch.testing.assert_close(leaky[3], logits[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_document_that_starts_on_a_chunk_border_equals_the_plain_model_on_it(activation):
    model = model_of(activation)
    tokens, _, starts = packed()
    logits = model(input_ids=tokens, document_starts=starts, use_cache=False).logits
    checked = 0
    for row, places in enumerate(STARTS):
        for begin, end in spans(places):
            if begin % CHUNK == 0 or end - begin <= CHUNK - begin % CHUNK:  # or within one chunk
                plain = model(input_ids=tokens[row : row + 1, begin:end], use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, begin:end], plain, rtol=1e-5, atol=1e-5)
                checked += 1
    assert checked > 15


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_chunks_a_document_equals_the_plain_model_on_it(activation):
    model = model_of(activation, use_chunking=False, max_positions=LENGTH)
    tokens, _, starts = packed()
    logits = model(input_ids=tokens, document_starts=starts, use_cache=False).logits
    for row, places in enumerate(STARTS):
        for begin, end in spans(places):
            plain = model(input_ids=tokens[row : row + 1, begin:end], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, begin:end], plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_directions_and_padding_keep_documents_apart(activation):
    changes = {"is_decoder": False, "bidirectional": True, "attention_activation": activation}
    model = make_model(kind="MegaForMaskedLM", **changes)
    tokens = make_ids(2, 50)
    starts, mask = torch.zeros(2, 50, dtype=torch.bool), torch.ones(2, 50, dtype=torch.bool)
    documents = [[(0, 16), (16, 40), (40, 43), (43, 45)], [(0, 8), (8, 24), (24, 50)]]
    mask[0, 45:] = False
    for row, places in enumerate(documents):
        starts[row, [begin for begin, _ in places]] = True
    logits = model(input_ids=tokens, attention_mask=mask, document_starts=starts).logits
    for row, places in enumerate(documents):
        for begin, end in places:
            plain = model(input_ids=tokens[row : row + 1, begin:end]).logits[0]
            torch.testing.assert_close(logits[row, begin:end], plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "cuts", [[5], [8], [1, 2, 3, 4, 5, 6, 7], [9, 31, 33], [6, 38, 61, 62, 63], list(range(1, 64))]
)
def test_a_row_continued_from_a_cache_goes_on_with_its_documents(cuts, activation, chunked):
    model = model_of(activation, use_chunking=chunked, max_positions=LENGTH)
    tokens, _, starts = packed()
    whole = model(input_ids=tokens, document_starts=starts, use_cache=False).logits
    cache, logits = None, []
    for begin, end in spans(cuts):
        marks = starts[:, begin:end]
        output = model(
            input_ids=tokens[:, begin:end],
            past_key_values=cache,
            use_cache=True,
            # Where no document starts, the last one goes on, said or not.
            document_starts=marks if marks.any() else None,
        )
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.documents is None or not chunked


def test_a_cache_can_be_reordered_inside_a_chunk_of_several_documents():
    model = model_of()
    tokens, _, starts = packed()
    cache = model(input_ids=tokens[:, :38], document_starts=starts[:, :38], use_cache=True).past_key_values
    order = torch.tensor([5, 5, 2, 0])
    cache.reorder_cache(order)
    found = model(input_ids=tokens[order, 38:40], document_starts=starts[order, 38:40], past_key_values=cache).logits
    whole = model(input_ids=tokens[order, :40], document_starts=starts[order, :40], use_cache=False).logits
    torch.testing.assert_close(found, whole[:, 38:], rtol=1e-5, atol=1e-5)


def test_weights_are_zero_across_documents():
    model = model_of()
    tokens, _, starts = packed()
    weights = model(input_ids=tokens, document_starts=starts, use_cache=False, output_attentions=True).attentions[0]
    numbers = starts.cumsum(1).unflatten(1, (-1, CHUNK))
    same = numbers[..., None] == numbers[..., None, :]
    assert (weights[~same] == 0).all() and (weights[same & torch.ones(CHUNK, CHUNK).tril().bool()] > 0).all()


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({}, {"document_starts": torch.zeros(2, 9, dtype=torch.bool)}, r"is torch.bool \(2, 9\).*\(2, 10\)"),
        ({}, {"document_starts": torch.zeros(2, 10)}, "document_starts is torch.float32"),
        ({}, {"attention_mask": torch.tensor([[0] + [1] * 9, [1] * 10])}, "padded on the left"),
        ({"truncation": 4}, {}, "truncation=4"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_apart_is_refused(changes, inputs, message):
    model = make_model(**changes)
    keys = {"document_starts": torch.zeros(2, 10, dtype=torch.bool), "use_cache": False} | inputs
    with pytest.raises(ValueError, match=message):
        model(input_ids=make_ids(2, 10), **keys)
