"""Megalodon with a cache: pieces, padding, documents and beams give what one forward of each row alone gives."""

import pytest
import torch
from builders import make_ids, make_model


def megalodon(**changes):
    return make_model(kind="MegalodonForCausalLM", **changes)


def fed(model, ids, pieces, **per_token):
    """Logits of all pieces through one cache, and the cache; masks are of all tokens so far."""
    cache, logits, end = None, [], 0
    mask = per_token.pop("attention_mask", None)
    for length in pieces:
        begin, end = end, end + length
        more = {name: value[:, begin:end] for name, value in per_token.items()}
        more |= {} if mask is None else {"attention_mask": mask[:, :end]}
        with torch.no_grad():
            out = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **more)
        cache = out.past_key_values
        logits.append(out.logits)
    assert end == ids.shape[1]
    return torch.cat(logits, 1), cache


def whole(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments).logits


def left_padded(rows, width):
    ids, mask = torch.ones(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


@pytest.mark.parametrize(
    ("chunk", "pieces"),
    [(64, [1] * 1000), (64, [130, 1, 1, 60, 64, 64, 200, *[1] * 80, 400]), (1, [5, 1, 1, 3]), (8, [8, 16, 1, 7, 9, 2])],
    ids=["single tokens", "pieces", "chunks of one", "whole chunks"],
)
def test_decoding_across_chunk_borders_equals_one_forward(chunk, pieces):
    model, ids = megalodon(chunk_size=chunk), make_ids(1, sum(pieces))
    logits, cache = fed(model, ids, pieces)
    torch.testing.assert_close(logits, whole(model, ids), atol=3e-5, rtol=1e-5)
    assert cache.get_seq_length() == len(ids[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", [1, 8, 50])
def test_a_cache_is_of_the_stated_size_whatever_the_length(dtype, seen):
    model, rows = megalodon().to(dtype), 3
    config = model.config
    _, cache = fed(model, make_ids(rows, seen), [seen])
    channels, averages, groups = config.hidden_size, config.ema_projection_size, config.timestep_norm_groups
    widths = config.shared_representation_size + config.intermediate_size
    block = 8 * channels * averages + 8 * groups + 8 + dtype.itemsize * config.chunk_size * widths
    assert cache.nbytes == config.num_hidden_layers * rows * block + rows * (8 * groups + 8)
    state = cache.states[0].state
    assert state.ema.dtype == state.norm.mean.dtype == torch.float32 and state.norm.count.tolist() == [seen] * rows


@pytest.mark.parametrize("pieces", [[30], [23, *[1] * 7], [5, 9, 1, 8, 7]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 1, "swiglu": False, "chunk_size": 5}], ids=str)
def test_left_padded_batches_equal_rows_alone(changes, pieces):
    model, rows = megalodon(**changes), [make_ids(1, length, seed=length)[0] for length in (30, 22, 17, 2)]
    ids, mask = left_padded(rows, 30)
    logits, _ = fed(model, ids, pieces, attention_mask=mask)
    assert torch.isfinite(logits).all()
    for got, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(got[30 - len(row) :], whole(model, row[None])[0], atol=2e-5, rtol=1e-5)


def test_padding_behind_and_between_is_in_no_statistic_average_or_key():
    model, ids = megalodon(), make_ids(3, 29)
    mask = torch.ones_like(ids)
    mask[0, 20:], mask[1, 4:11] = 0, 0
    logits = whole(model, ids, attention_mask=mask)
    torch.testing.assert_close(logits[0, :20], whole(model, ids[:1, :20])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[2], whole(model, ids[2:])[0], atol=1e-5, rtol=1e-5)
    # Whatever is written in a hole, tokens behind it do not see it; that it is there moves them.
    other = torch.where(mask.bool(), ids, 7)
    torch.testing.assert_close(whole(model, other, attention_mask=mask)[1, 11:], logits[1, 11:], atol=1e-5, rtol=1e-5)
    assert (whole(model, ids[1:2, mask[1].bool()])[0, 4:] - logits[1, 11:]).abs().max() > 1e-2
    stepped, _ = fed(model, ids, [6, 1, 1, 10, 11], attention_mask=mask)
    torch.testing.assert_close(stepped[mask.bool()], logits[mask.bool()], atol=2e-5, rtol=1e-5)


def test_documents_that_share_a_row_are_alone_and_go_on_through_a_cache():
    model, ids = megalodon(), make_ids(2, 41)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[0, [0, 3, 16, 17, 32]] = True
    starts[1, [8, 24]] = True
    logits = whole(model, ids, document_starts=starts)
    for row, begin, end in ((0, 16, 17), (0, 32, 41), (1, 8, 24), (1, 24, 41), (1, 0, 8)):  # which begin on borders
        alone = whole(model, ids[row : row + 1, begin:end])[0]
        torch.testing.assert_close(logits[row, begin:end], alone, atol=1e-5, rtol=1e-5)
    assert (whole(model, ids) - logits)[:, 25:].abs().amax(-1).min() > 1e-4
    for pieces in ([41], [16, 1, 1, 14, 9], [3, 5, 20, 1, 12]):
        stepped, _ = fed(model, ids, pieces, document_starts=starts)
        torch.testing.assert_close(stepped, logits, atol=2e-5, rtol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, 20:24], mask[1, 39:] = 0, 0
    expected = whole(model, ids, document_starts=starts, attention_mask=mask)
    stepped, _ = fed(model, ids, [18, 4, 1, 18], document_starts=starts, attention_mask=mask)
    torch.testing.assert_close(stepped[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        whole(model, ids, document_starts=starts, attention_mask=mask)


def test_caches_are_reordered_repeated_and_selected_with_all_that_they_hold():
    model, rows = megalodon(), [make_ids(1, length, seed=length)[0] for length in (14, 9, 11)]
    ids, mask = left_padded(rows, 14)
    after = make_ids(3, 12, seed=5)
    for change, order in (
        ("reorder_cache", [2, 0, 0]), ("batch_select_indices", [1, 2]), ("batch_repeat_interleave", [0, 0, 1, 1, 2, 2]),
    ):  # fmt: skip
        _, cache = fed(model, ids, [14], attention_mask=mask)
        getattr(cache, change)(2 if change == "batch_repeat_interleave" else torch.tensor(order))
        with torch.no_grad():
            got = model(after[order], past_key_values=cache, use_cache=True).logits
        for logits, row in zip(got, order, strict=True):
            alone = whole(model, torch.cat([rows[row], after[row]])[None])[0, -12:]
            torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-5)


def test_a_cache_holds_every_tensor_it_flattens_to():
    model, ids = megalodon(), make_ids(2, 19)
    _, cache = fed(model, ids, [13, 6])
    leaves, structure = torch.utils._pytree.tree_flatten(cache)
    copy = torch.utils._pytree.tree_unflatten([leaf.clone() for leaf in leaves], structure)
    after = make_ids(2, 9, seed=3)
    with torch.no_grad():
        first, second = (model(after, past_key_values=held).logits for held in (cache, copy))
    assert torch.equal(first, second)


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_are_those_of_each_prompt_alone(beams):
    model, rows = megalodon(seed=2), [make_ids(1, length, seed=length)[0] for length in (11, 4, 7)]
    ids, mask = left_padded(rows, 11)
    settings = {"max_new_tokens": 20, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)
    for got, row in zip(together, rows, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **settings)
        assert got[11:].tolist() == alone[0, len(row) :].tolist()
        if beams == 1:
            longer = alone[:, :-1]
            assert torch.equal(whole(model, longer)[0, len(row) - 1 :].argmax(-1), alone[0, len(row) :])


def test_sampling_repeats_with_its_seed_and_assisted_decoding_is_refused():
    model, ids = megalodon(), make_ids(2, 5)
    settings = {"max_new_tokens": 12, "attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(ids, do_sample=True, num_return_sequences=2, **settings))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and len(drawn[0]) == 4
    settings = {name: value[:1] if torch.is_tensor(value) else value for name, value in settings.items()}
    with pytest.raises(ValueError, match="assisted"):
        model.generate(ids[:1], assistant_model=megalodon(), do_sample=False, **settings)
