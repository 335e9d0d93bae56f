"""One rule for masks: of the new tokens, or of all with a cache; what a cache remembers; what is refused."""

import pytest
import torch
from builders import make_ids, make_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LEFT = [[0] * 6 + [1] * 24, [1] * 30, [0] * 12 + [1] * 18]
HOLES = [[0] * 3 + [1] * 5 + [0] * 4 + [1] * 18, [1] * 9 + [0] * 3 + [1] * 18, [0] * 30]
RIGHT = [[1] * 7 + [0] * 5 + [1] * 18, [1] * 30, [1] * 12 + [0] * 18]


def pieces_of(model, ids, mask, cuts, masks):
    """Logits of cached calls; `masks` says what each is told: all columns, the new ones alone, or by turns."""
    cache, logits = None, []
    for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, ids.shape[1]], strict=True)):
        alone = masks == "new" or (masks == "turns" and number % 2 == 1)
        part = mask[:, begin:end] if alone else mask[:, :end]
        out = model(ids[:, begin:end], attention_mask=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("rows", [LEFT, HOLES, RIGHT], ids=["left", "holes", "right"])
@pytest.mark.parametrize("activation", ["softmax", "laplace"])
def test_a_cache_goes_on_with_the_mask_of_the_new_tokens_alone(rows, activation, chunked):
    model = make_model(use_chunking=chunked, attention_activation=activation)
    ids, mask = make_ids(3, 30), torch.tensor(rows)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        for cuts in ([10], [12], [4, 8, 20], [15], [1, 29], list(range(12, 30))):
            for masks in ("all", "new", "turns"):
                got, _ = pieces_of(model, ids, mask, cuts, masks)
                torch.testing.assert_close(got[mask.bool()], whole[mask.bool()], **CLOSE)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_cache_goes_on_without_a_mask_as_with_one_of_ones(chunked):
    model, ids = make_model(use_chunking=chunked), make_ids(3, 30)
    mask = torch.tensor(HOLES)
    mask[:, 14:] = 1
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        cache = pieces_of(model, ids[:, :14], mask[:, :14], [6], "turns")[1]
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        last = [model(part[order], past_key_values=cache).logits for part in ids[:, 14:].split([2, 14], 1)]
    torch.testing.assert_close(torch.cat(last, 1), whole[order, 14:], **CLOSE)


def test_an_encoders_mask_need_not_come_again():
    model, ids = make_model(add_cross_attention=True), make_ids(2, 12)
    encoder = {"encoder_hidden_states": torch.randn(2, 7, 24)}
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    with torch.no_grad():
        whole = model(ids, encoder_attention_mask=mask, use_cache=False, **encoder).logits
        first = model(ids[:, :5], encoder_attention_mask=mask, use_cache=True, **encoder)
        last = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last, whole[:, 5:], **CLOSE)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 9), torch.ones(2, 7), torch.ones(1, 8), torch.ones(3, 8), torch.ones(8), torch.ones(2, 1, 8, 8),
     torch.ones(2, 8, 1), torch.ones(2, 8) * 2, -torch.ones(2, 8), torch.zeros(2, 8) - 1e9, torch.full((2, 8), 0.5),
     torch.full((2, 8), torch.nan), torch.ones(2, 0)],
    ids=lambda mask: f"{tuple(mask.shape)} of {mask.flatten()[:1].tolist()}",
)  # fmt: skip
def test_masks_of_another_shape_or_meaning_are_refused(mask):
    model, ids = make_model(add_cross_attention=True), make_ids(2, 8)
    encoder = {"encoder_hidden_states": torch.randn(2, 8, 24)}
    for name in ("attention_mask", "encoder_attention_mask"):
        with pytest.raises(ValueError, match=rf"^{name} (has shape|holds numbers)"):
            model(ids, **{name: mask}, **encoder)
    plain = make_model(kind="MegaForSequenceClassification", is_decoder=False, bidirectional=True)
    with pytest.raises(ValueError, match=r"^attention_mask"):
        plain(ids, attention_mask=mask)
    # With a cache of five tokens: (2, 8) and (2, 13) are right.
    cached = make_model()
    cache = cached(ids[:, :5], use_cache=True).past_key_values
    for wrong in (torch.ones(2, 9), torch.ones(2, 5), torch.ones(2, 12), torch.ones(2, 14), torch.ones(1, 13), mask):
        if tuple(wrong.shape) != (2, 13):
            with pytest.raises(ValueError, match=r"^attention_mask"):
                cached(ids, attention_mask=wrong, past_key_values=cache)
    want = cached(torch.cat([ids[:, :5], ids], 1), use_cache=False).logits[:, 5:]
    torch.testing.assert_close(cached(ids, attention_mask=torch.ones(2, 13), past_key_values=cache).logits, want)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("changed", [(0, 0), (0, 7), (1, 0), (1, 11), (2, 13), "none given before"])
def test_a_mask_that_changes_the_past_is_refused(changed, chunked):
    model, ids = make_model(use_chunking=chunked), make_ids(3, 16)
    mask = torch.tensor(LEFT)[:, :16]
    first = None if isinstance(changed, str) else mask[:, :14]
    cache = model(ids[:, :14], attention_mask=first, use_cache=True).past_key_values
    other = mask.clone()
    if first is not None:
        other[changed] = 1 - other[changed]
    seen_columns = isinstance(changed, str) or not chunked or changed[1] >= 6 or changed[1] == 0
    if (seen_columns and not torch.equal(other, mask)) or first is None:
        with pytest.raises(ValueError, match="attention_mask says of cached tokens something else"):
            model(ids[:, 14:], attention_mask=other, past_key_values=cache)
    if first is not None:
        whole = model(ids, attention_mask=mask, use_cache=False).logits[:, 14:]
        got = model(ids[:, 14:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(got, whole, **CLOSE)


@pytest.mark.parametrize("shape", [(3, 7, 24), (2, 7, 23), (2, 7)])
def test_an_encoders_output_that_does_not_fit_is_refused(shape):
    model = make_model(add_cross_attention=True)
    with pytest.raises(ValueError, match=r"^encoder_hidden_states has shape .* expected"):
        model(make_ids(2, 8), encoder_hidden_states=torch.zeros(shape))
