"""What holds for every model: random configurations, lengths and masks, drawn by hypothesis in a fixed order."""

import pytest
import torch
from builders import make_ids, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHECKS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
CLOSE = {"atol": 2e-5, "rtol": 2e-4}


@st.composite
def configurations(draw, **fixed):
    """Arguments of `make_model`; the simple bias gets a table that reaches any length drawn here."""
    bias = draw(st.sampled_from(["rotary", "simple"]))
    width = draw(st.integers(1, 5)) * (2 if bias == "rotary" else 1)
    return {
        "seed": draw(st.integers(0, 99)),
        "attention_activation": draw(st.sampled_from(["softmax", "laplace", "relu2"])),
        "relative_positional_bias": bias,
        "shared_representation_size": width,
        "use_chunking": draw(st.booleans()),
        "chunk_size": draw(st.integers(1, 9)),
        "normalization_type": draw(st.sampled_from(["scalenorm", "layernorm", "rmsnorm"])),
        "norm_affine": draw(st.booleans()),
        "normalize_before_mega": draw(st.booleans()),
        "normalize_before_ffn": draw(st.booleans()),
        "use_normalized_ffn": draw(st.booleans()),
        "activation": draw(st.sampled_from(["silu", "relu", "linear", "gelu", "gelu_accurate"])),
        "hidden_size": draw(st.integers(3, 13)),
        "intermediate_size": draw(st.integers(1, 13)),
        "nffn_hidden_size": draw(st.integers(1, 13)),
        "ema_projection_size": draw(st.integers(1, 5)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "final_norm": draw(st.booleans()),
        "scale_embeddings": draw(st.booleans()),
        "add_lm_hidden_dense_layer": draw(st.booleans()),
        "add_token_type_embeddings": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "lm_head_bias": draw(st.booleans()),
        "attn_implementation": draw(st.sampled_from(["eager", "sdpa"])),
        **fixed,
    }


@st.composite
def masks(draw, batch, length):
    """None, or (batch, length) int64: padded on the right, on the left, with holes, or all of these by row."""
    kinds = draw(st.lists(st.sampled_from(["none", "right", "left", "holes"]), min_size=batch, max_size=batch))
    if set(kinds) == {"none"}:
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, kind in zip(mask, kinds, strict=True):
        if kind in ("right", "left"):
            real = draw(st.integers(1, length))
            row[real:] = 0
            row.copy_(row.flip(0) if kind == "left" else row)
        elif kind == "holes":
            row.copy_(torch.tensor(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))))
            row[draw(st.integers(0, length - 1))] = 1
    return mask


@st.composite
def texts(draw, longest=26):
    """Token ids (B, L) and a mask for them."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    return make_ids(batch, length, seed=draw(st.integers(0, 99))), draw(masks(batch, length))


@st.composite
def cuts(draw):
    """A text, its mask, and lengths of the pieces that it is read in."""
    ids, mask = draw(texts())
    borders = sorted(draw(st.sets(st.integers(1, max(1, ids.shape[1] - 1)), max_size=6)) - {ids.shape[1]})
    return ids, mask, [end - begin for begin, end in zip([0, *borders], [*borders, ids.shape[1]], strict=True)]


def read(model, ids, mask, pieces):
    """Logits of one call a piece, with the cache in between."""
    cache, end, logits = None, 0, []
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            end += piece.shape[1]
            part = None if mask is None else mask[:, :end]
            out = model(piece, attention_mask=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(logits, 1)


def at_once(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def assert_close(got, want, mask):
    """Equal at valid positions, relative to the largest logit; finite everywhere."""
    valid = torch.ones(got.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert torch.isfinite(got).all() and torch.isfinite(want).all()
    scale = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got[valid] / scale, want[valid] / scale, **CLOSE)


@pytest.mark.slow
@settings(max_examples=100, **CHECKS)
@given(configurations(), texts())
def test_cached_steps_equal_the_full_forward(options, text):
    model, (ids, mask) = make_model(**options), text
    assert_close(read(model, ids, mask, [1] * ids.shape[1]), at_once(model, ids, mask), mask)


@settings(max_examples=140, **CHECKS)
@given(configurations(), cuts())
def test_calls_of_any_length_equal_the_full_forward(options, cut):
    model, (ids, mask, pieces) = make_model(**options), cut
    assert_close(read(model, ids, mask, pieces), at_once(model, ids, mask), mask)


@settings(max_examples=80, **CHECKS)
@given(configurations(use_chunking=True), texts(longest=40))
def test_calls_chunk_by_chunk_equal_the_full_forward(options, text):
    model, (ids, mask) = make_model(**options), text
    whole, rest = divmod(ids.shape[1], options["chunk_size"])
    pieces = [options["chunk_size"]] * whole + ([rest] if rest else [])
    assert_close(read(model, ids, mask, pieces), at_once(model, ids, mask), mask)


@settings(max_examples=80, **CHECKS)
@given(configurations(), texts(), st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_a_batch_is_irrelevant(options, text, shuffle, encoder):
    model, (ids, mask) = make_model(**options, **({"is_decoder": False} if encoder else {})), text
    order = list(range(ids.shape[0]))
    shuffle.shuffle(order)
    got = at_once(model, ids[order], None if mask is None else mask[order])
    assert_close(got, at_once(model, ids, mask)[order], None if mask is None else mask[order])


@settings(max_examples=80, **CHECKS)
@given(configurations(), texts())
def test_a_row_does_not_depend_on_the_others(options, text):
    model, (ids, mask) = make_model(**options), text
    together = at_once(model, ids, mask)
    for i in range(ids.shape[0]):
        row = None if mask is None else mask[i : i + 1]
        assert_close(at_once(model, ids[i : i + 1], row), together[i : i + 1], row)


@settings(max_examples=120, **CHECKS)
@given(
    configurations(),
    texts(),
    st.sampled_from(["decoder", "encoder", "one direction", "truncated"]),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
)
def test_nothing_is_ever_nan(options, text, shape, dropout, featurewise):
    ids, mask = text
    if shape != "decoder":
        options |= {"kind": "MegaForMaskedLM", "is_decoder": False, "bidirectional": shape != "one direction"}
    probabilities = ("dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout_prob")
    model = make_model(
        **options,
        **dict.fromkeys(probabilities, dropout),
        use_feature_dropout=featurewise,
        truncation=4 if shape == "truncated" else None,
    ).train()
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=ids.numel())
    out.loss.backward()
    assert torch.isfinite(out.logits).all() and torch.isfinite(out.loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@settings(max_examples=80, **CHECKS)
@given(configurations(add_cross_attention=True), cuts(), st.integers(1, 12), st.data())
def test_cached_cross_attention_equals_the_full_forward(options, cut, source_length, data):
    model, (ids, mask, pieces) = make_model(**options), cut
    source = torch.randn(
        ids.shape[0], source_length, options["hidden_size"], generator=torch.Generator().manual_seed(1)
    )
    source_mask = data.draw(masks(ids.shape[0], source_length))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {**kwargs, "encoder_hidden_states": source, "encoder_attention_mask": source_mask},
        ),
        with_kwargs=True,
    )
    assert_close(read(model, ids, mask, pieces), at_once(model, ids, mask), mask)
