"""Original fairseq weights: names run both ways, and a converted model computes what the equations say."""

import itertools
from dataclasses import replace

import pytest
import torch
from fairseq_equations import Model, Options, model_shapes, random_state

from mega_scale.hub.fairseq import LAYOUTS, fairseq_to_mega, mega_to_fairseq, name_table
from mega_scale.model import MegaConfig


def config_of(options, **changes):
    chunked = options.chunk_size > 0
    values = {
        "vocab_size": options.vocabulary,
        "hidden_size": options.embed_dim,
        "intermediate_size": options.hidden_dim,
        "nffn_hidden_size": options.ffn_dim or 1,
        "use_normalized_ffn": bool(options.ffn_dim),
        "shared_representation_size": options.z_dim,
        "ema_projection_size": options.n_dim,
        "num_hidden_layers": options.layers,
        "use_chunking": chunked,
        "chunk_size": options.chunk_size,
        "max_positions": options.chunk_size if chunked else options.max_positions,
        "truncation": options.truncation,
        "normalization_type": options.norm,
        "normalize_before_mega": options.normalize_before,
        "normalize_before_ffn": options.normalize_before,
        "final_norm": options.final_norm,
        "attention_activation": options.attention,
        "relative_positional_bias": options.rel_pos_bias,
        "scale_embeddings": options.scale_embedding,
        "tie_word_embeddings": options.shared_output,
        "add_cross_attention": options.cross_attention,
        "is_decoder": options.causal,
        "bidirectional": not options.causal,
        "lm_head_bias": options.layout == "mlm",
        "add_lm_hidden_dense_layer": False,
    }
    return MegaConfig(**values | changes)


def load(options, state, **changes):
    config = config_of(options, **changes)
    tensors = fairseq_to_mega(state, config, layout=options.layout, ema_input=options.ema_input)
    model = LAYOUTS[options.layout].build(config).eval()
    model.load_state_dict(tensors, strict=True)
    return model


NORMS = ("layernorm", "scalenorm", "rmsnorm", "batchnorm")
LM = Options()
ENCODERS = [
    Options(layout=name, scale_embedding=name == "encoder", shared_output=False) for name in LAYOUTS if name != "lm"
]
COMBINATIONS = [
    replace(kind, norm=norm, normalize_before=before, rel_pos_bias=bias, ffn_dim=ffn, chunk_size=chunk, **more)
    for kind, norm, before, bias, ffn, chunk in itertools.product(
        [LM, *ENCODERS], NORMS, (True, False), ("simple", "rotary"), (9, 0), (-1, 8)
    )
    for more in ([{}, {"shared_output": False}, {"cross_attention": True}] if kind is LM else [{}])
    if not (kind is LM and norm == "batchnorm") and not ("cross_attention" in more and bias == "simple" and chunk > 0)
]


@pytest.mark.slow
def test_names_and_shapes_run_both_ways_for_every_combination_of_options():
    assert len(COMBINATIONS) > 200
    for options in COMBINATIONS:
        config, state = config_of(options), random_state(options)
        tensors = fairseq_to_mega(state, config, layout=options.layout)
        back = mega_to_fairseq(tensors, config, layout=options.layout)
        assert {name: tuple(tensor.shape) for name, tensor in back.items()} == model_shapes(options), options
        for name, tensor in state.items():
            if not name.endswith("_float_tensor"):
                assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype, name
        again = fairseq_to_mega(back, config, layout=options.layout)
        assert list(again) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_is_one_to_one(layout):
    table = name_table(LAYOUTS[layout], blocks=12)
    assert len(set(table.values())) == len(table)
    back = {ours: theirs for theirs, ours in table.items()}
    assert {theirs: back[table[theirs]] for theirs in table} == {theirs: theirs for theirs in table}


CASES = {
    "recipe": Options(chunk_size=4),
    "untied": Options(chunk_size=4, shared_output=False, scale_embedding=False),
    "post-norm, simple": Options(normalize_before=False, rel_pos_bias="simple", norm="scalenorm"),
    "simple in chunks, laplace": Options(chunk_size=4, rel_pos_bias="simple", attention="laplace", norm="rmsnorm"),
    "relu2, no feed-forward": Options(attention="relu2", ffn_dim=0),
    "truncated": Options(truncation=3),
    "alpha": Options(ema_input="alpha"),
    "encoder": Options(layout="encoder"),
    "encoder in chunks, laplace": Options(layout="encoder", chunk_size=4, attention="laplace", rel_pos_bias="simple"),
    "encoder, alpha": Options(layout="encoder", ema_input="alpha"),
    "lra": Options(layout="lra", scale_embedding=False, normalize_before=False, norm="scalenorm"),
    "lra, batch norm": Options(layout="lra", scale_embedding=False, norm="batchnorm", attention="laplace"),
    "masked": Options(layout="mlm", scale_embedding=False, shared_output=False),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_converted_model_matches_the_equations(options):
    state = random_state(options)
    model = load(options, state)
    tokens = torch.randint(2, options.vocabulary, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(input_ids=tokens)
    truth = Model(options, state)
    for row in range(2):
        if options.layout in ("lm", "mlm"):
            got, expected = out.logits[row], truth.logits(tokens[row])
        else:
            got, expected = out.last_hidden_state[row], truth.hidden(tokens[row])
        assert expected.abs().max() > 0.1
        assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("norm", ["layernorm", "scalenorm", "rmsnorm"])
@pytest.mark.parametrize("layout", ["lm", "encoder", "lra"])
def test_a_final_norm_with_parameters(layout, norm):
    """As in encoders, and in language models without --no-affine-final-norm."""
    options = Options(layout=layout, norm=norm, scale_embedding=False, shared_output=False)
    state = random_state(options)
    block_norm = f"{options.block(0)}mega_layer.norm.norm."
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in state if name.startswith(block_norm)]:
        parameter = LAYOUTS[layout].final_norm + "norm." + name.removeprefix(block_norm)
        state[parameter] = torch.randn(state[name].shape, generator=generator)
    with pytest.raises(ValueError, match="final_norm_affine=True"):
        load(options, state)
    model = load(options, state, final_norm_affine=True)
    tokens = torch.arange(2, 12)
    with torch.no_grad():
        out = model(input_ids=tokens[None])
    truth = Model(options, state)
    got, expected = (
        (out.logits[0], truth.logits(tokens)) if layout == "lm" else (out.last_hidden_state[0], truth.hidden(tokens))
    )
    assert (got - expected).abs().max() < 1e-5
    back = mega_to_fairseq(model.state_dict(), model.config, layout=layout)
    assert back.keys() == state.keys() and all(
        torch.equal(back[name], state[name]) for name in state if not name.endswith("_float_tensor")
    )


def test_alpha_and_delta_are_told_apart():
    state = random_state(LM)
    tokens = torch.arange(2, 12)
    delta, alpha = (Model(replace(LM, ema_input=name), state).logits(tokens) for name in ("delta", "alpha"))
    assert (delta - alpha).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["lm", "encoder"])
def test_the_other_ema_input_also_runs_both_ways(layout):
    options = Options(layout=layout, ema_input="alpha")
    config, state = config_of(options), random_state(options)
    tensors = fairseq_to_mega(state, config, layout=layout, ema_input="alpha")
    back = mega_to_fairseq(tensors, config, layout=layout, ema_input="alpha")
    for name, tensor in state.items():
        # What an encoder moves into omega and back is rounded.
        tolerance = 1e-6 if name.endswith("omega") and layout == "encoder" else 0
        assert name.endswith("_float_tensor") or (back[name] - tensor).abs().max() <= tolerance, name


def test_a_table_for_one_chunk_fits_a_longer_one_here():
    options = Options(chunk_size=4, rel_pos_bias="simple")
    state, tokens = random_state(options), torch.arange(2, 13)
    model = load(options, state, max_positions=32)
    assert model.mega.layers[0].mega_layer.rel_pos_bias.rel_pos_bias.shape == (63,)
    with torch.no_grad():
        assert (model(input_ids=tokens[None]).logits[0] - Model(options, state).logits(tokens)).abs().max() < 1e-5
    back = mega_to_fairseq(model.state_dict(), model.config)
    for i in range(options.layers):
        name = f"decoder.layers.{i}.mega_layer.rel_pos_bias.rel_pos_bias"
        assert torch.equal(back[name], state[name])
    with pytest.raises(ValueError, match=r"chunk_size=8 needs \(15,\): set it to 4"):
        load(options, state, chunk_size=8, max_positions=32)
    with pytest.raises(ValueError, match="max_positions=3 must be at least chunk_size=4"):
        load(options, state, max_positions=3)
    whole = Options(rel_pos_bias="simple")
    with pytest.raises(ValueError, match=r"max_positions=32 needs \(63,\): set it to 24"):
        load(whole, random_state(whole), max_positions=32)


def test_half_precision_and_unused_values_arrive_clean():
    state = {name: tensor.half() for name, tensor in random_state(LM).items()}
    state["decoder.layers.0.mega_layer.rel_pos_bias._float_tensor"].fill_(float("nan"))
    tensors = fairseq_to_mega(state, config_of(LM))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not any(tensor.isnan().any() for tensor in tensors.values())


def test_a_tied_output_may_be_left_out_but_not_differ():
    state = random_state(LM)
    del state["decoder.output_projection.weight"]
    tensors = fairseq_to_mega(state, config_of(LM))
    assert torch.equal(tensors["lm_head.weight"], state[LM.embedding])
    state["decoder.output_projection.weight"] = state[LM.embedding] + 1
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True, but lm_head.weight and .* differ"):
        fairseq_to_mega(state, config_of(LM))
    assert fairseq_to_mega(state, config_of(LM, tie_word_embeddings=False))["lm_head.weight"].shape == (13, 6)


def test_parts_of_other_models_are_left_out():
    both = random_state(Options(layout="encoder"), 1) | random_state(replace(LM, cross_attention=True))
    for options in (replace(LM, cross_attention=True), Options(layout="encoder")):
        load(options, both)
    options = CASES["lra"]
    head = {"classifier.0.0.weight": torch.zeros(5, 6), "sentence_projection_layer.weight": torch.zeros(2, 5)}
    assert load(options, random_state(options) | head).config.num_hidden_layers == options.layers


UNKNOWN = {
    "decoder.adaptive_softmax.head.weight": "adaptive softmax",
    "decoder.embed_tokens.embeddings.0.0.weight": "adaptive embedding",
    "decoder.project_in_dim.weight": "a width of their own",
    "decoder.embed_norm.norm.weight": "--normalize-embedding",
    "decoder.final_norm.norm.weight": "final_norm_affine=True",
    "decoder.layers.0.cross_attn.k_proj.bias": "add_cross_attention=True",
    "decoder.layers.0.mega_layer.norm.norm.scalar": "this configuration has none",
    "decoder.layers.2.nffn.fc1.bias": "use_normalized_ffn=True",
    "something.else": "this configuration has none",
}


def test_what_has_no_counterpart_is_listed_with_its_reason():
    extra = {name: torch.full((6,), 0.5) for name in UNKNOWN}
    with pytest.raises(ValueError, match="no counterpart") as caught:
        fairseq_to_mega(random_state(LM) | extra, config_of(LM))
    for name, reason in UNKNOWN.items():
        assert name in str(caught.value)
        assert reason in str(caught.value)


def test_misfits_are_listed():
    state = random_state(LM)
    del state["decoder.layers.1.mega_layer.move.alpha"]
    state["decoder.layers.0.nffn.fc1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"missing \(1\): mega.layers.1.mega_layer.ema_gate.decay_factor") as caught:
        fairseq_to_mega(state, config_of(LM))
    assert "mis-shaped (1): mega.layers.0.nffn.fc1.bias is (3,), expected (9,)" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (LM, {"final_norm": False}, "final_norm=False, normalize_before_mega=True, .* one switch"),
        (LM, {"normalize_before_ffn": False}, "normalize_before_ffn=False: fairseq has one switch"),
        (CASES["lra"], {"scale_embeddings": True}, "layout='lra' does not scale embeddings"),
        (CASES["masked"], {"final_norm": True}, "layout='mlm' has no final norm"),
    ],
)
def test_configurations_that_fairseq_does_not_compute_are_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        load(options, random_state(options), **changes)


def test_models_that_fairseq_lacks_are_refused():
    config = config_of(LM, lm_head_bias=True, add_token_type_embeddings=True)
    tensors = LAYOUTS["lm"].build(config).state_dict()
    with pytest.raises(ValueError, match=r"no counterpart of .*token_type_embeddings.weight, lm_head.bias"):
        mega_to_fairseq(tensors, config)
    del tensors["lm_head.bias"]
    with pytest.raises(ValueError, match=r"missing \(1\): lm_head.bias"):
        mega_to_fairseq(tensors, config)
    for options in ({"layout": "bert"}, {"ema_input": "beta"}):
        with pytest.raises(ValueError, match="is unknown: choose one of"):
            fairseq_to_mega({}, config_of(LM), **options)
