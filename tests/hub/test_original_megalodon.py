"""Original Megalodon checkpoints: names, cuts and configurations both ways, what is said, and what is refused."""

import itertools
import json
import os

import pytest
import torch
from commands import exit_code
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import import_megalodon
from mega_scale import export
from mega_scale.hub.export import write_export
from mega_scale.hub.folder import open_folder, read_pickle, state_dict_spec
from mega_scale.hub.megalodon import config_from_original, config_to_original, name_table, open_original, write_original
from mega_scale.model import MegalodonConfig, MegalodonForCausalLM

SIZES = {
    "vocab_size": 263,
    "model_dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "z_dim": 8,
    "value_dim": 24,
    "ffn_hidden_dim": 12,
    "cema_ndim": 3,
    "chunk_size": 8,
    "norm_num_groups": 4,
    "rope_base": 100.0,
}
MODELS = {
    "plain": {"rope_base": None},
    "tied, scaled, swiglu": {"share_emb": True, "scale_emb": True, "swiglu": True},
    "rescaled, no affine norms": {"rescale_nffn": True, "norm_affine": False, "num_heads": 4},
    "vocabulary by the embedding": {"vocab_size": -1, "init_mode": "bert", "dropout": 0.1},
}


def shapes(model):
    """Shape, and the dimension along which ranks share it, of all that the original writes."""
    d, n, z = model["model_dim"], model["cema_ndim"], model["z_dim"]
    e, f, v, g = model["value_dim"], model["ffn_hidden_dim"], SIZES["vocab_size"], model["norm_num_groups"]
    norm = {
        "weight": ([d], 0), "bias": ([d], 0),
        "prior_count": ([], None), "prior_mean": ([g], 0), "prior_logv": ([g], 0),
    }  # fmt: skip
    block = {f"mega.timenorm.{name}": place for name, place in norm.items()}
    block |= {f"mega.cema.{name}": ([d, n, 1], 0) for name in ("alpha", "delta")}
    block |= {"mega.cema.theta": ([d, 1, 1], 0), "mega.cema.gamma": ([d, n, 2], 0), "mega.cema.omega": ([d, 1], 0)}
    for name, rows in {"wv": e, "wr": e, "wz": z, "wh1": d}.items():
        block |= {f"mega.{name}.weight": ([rows, d], 0), f"mega.{name}.bias": ([rows], 0)}
    block |= {"mega.wh2.weight": ([d, e], 1), "mega.gamma": ([2, z], 1), "mega.beta": ([2, z], 1)}
    block |= {"nffn.fc1.weight": ([f, d], 0), "nffn.fc2.weight": ([d, f], 1)}
    if model.get("norm_affine", True):
        whole = ("mega.rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias")
        block |= {name: ([d], None) for name in whole}
    if model.get("swiglu"):
        block["nffn.fc3.weight"] = ([f, d], 0)
    if model.get("rescale_nffn"):
        block["nffn.alpha"] = ([d], None)
    found = {"embed.weight": ([v, d], 1), "rope.freqs": ([z // model["num_heads"] // 2], None)}
    for i in range(model["num_layers"]):
        found |= {f"layers.{i}.{name}": place for name, place in block.items()}
    found |= {f"output.final_norm.{name}": place for name, place in norm.items()}
    return found | {"output.output.weight": ([v, d], 1)}


def original(model, ranks=1, dtype=torch.float32):
    """State dicts of an original model of random weights, one a rank, and the whole one."""
    generator = torch.Generator().manual_seed(len(str(model)))
    places, whole = shapes(model), {}
    for name, (shape, _) in places.items():
        zeros = "prior" in name
        kind = torch.int64 if name.endswith("count") else dtype
        whole[name] = (torch.zeros(shape) if zeros else torch.randn(shape, generator=generator)).to(kind)
    width = 2 * whole["rope.freqs"].numel()
    base = model.get("rope_base") or 10000.0
    whole["rope.freqs"] = (1 / torch.tensor([base ** (j / width) for j in range(0, width, 2)])).to(dtype)
    if model.get("share_emb"):
        whole["output.output.weight"] = whole["embed.weight"]
    parts = [{} for _ in range(ranks)]
    for rank, (name, (_, cut)) in itertools.product(range(ranks), places.items()):
        parts[rank][name] = whole[name] if cut is None else whole[name].tensor_split(ranks, cut)[rank].clone()
    return parts, whole


def save(folder, model, states, **changes):
    folder.mkdir(exist_ok=True)
    tokenizer = {"path": "/data/tokenizer.model", "additional_vocab_size": 0, "data_tokenized": False}
    run = {"model": model, "tokenizer": tokenizer, "model_parallel_size": 8, "chunk_parallel_size": 2}
    (folder / "config.json").write_text(json.dumps(run))
    consolidated = {"model_parallel_size": len(states), "dtype": "fp32"} | changes
    (folder / "consolidate_config.json").write_text(json.dumps(consolidated))
    for rank, state in enumerate(states):
        name = "consolidated.pth" if len(states) == 1 else f"consolidated.{rank:02d}.pth"
        torch.save(state, folder / name)
    return folder


def load_shards(folder):
    return [read_pickle(path) for path in sorted(folder.glob("consolidated*.pth"))]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_way_in_and_out_again_changes_no_bit(tmp_path, changes):
    model = SIZES | changes
    for ranks in (1, 2, 4):
        states, whole = original(model, ranks)
        opened = open_original(save(tmp_path / f"in{ranks}", model, states))
        assert opened.note is None
        table = name_table(model["num_layers"])
        held = {table[name].name: tensor for name, tensor in whole.items() if name in table}
        assert set(held) == set(opened.tensors)
        for name, tensor in held.items():
            assert torch.equal(opened.tensors[name], tensor), name
        MegalodonForCausalLM(opened.config).load_state_dict(dict(opened.tensors), strict=True)
        for again in (1, 2, 4):  # ranks may be others than those that wrote it
            out = tmp_path / f"out{ranks}-{again}"
            write_original(out, opened.tensors, opened.config, shards=again)
            for found, expected in zip(load_shards(out), original(model, again)[0], strict=True):
                assert_same(found, expected)
            back = open_original(out)
            assert back.config.to_dict() == opened.config.to_dict()
            for name, tensor in held.items():
                assert torch.equal(back.tensors[name], tensor), name


def test_the_table_is_one_to_one_and_complete():
    for changes in MODELS.values():
        config = open_config(SIZES | changes)
        table = name_table(config.num_hidden_layers)
        names = [place.name for place in table.values()]
        assert len(set(names)) == len(names)
        assert set(state_dict_spec(config).tensors) <= set(names)


def open_config(model):
    return config_from_original(model, SIZES["vocab_size"])


def test_tensors_that_do_not_fit_are_not_written(tmp_path):
    config = open_config(SIZES)
    tensors = MegalodonForCausalLM(config).state_dict()
    name = "megalodon.layers.1.nffn.fc2.weight"
    for wrong_tensors, message in (
        ({n: t for n, t in tensors.items() if n != name}, rf"missing \(1\): {name}"),
        (tensors | {"extra": torch.zeros(1)}, r"unexpected \(1\): extra"),
        (tensors | {name: torch.zeros(2, 2)}, rf"{name} is \(2, 2\), expected \(16, 12\)"),
    ):
        with pytest.raises(ValueError, match=message):
            write_original(tmp_path / "out", wrong_tensors, config)
        assert not list(tmp_path.iterdir())


def test_configurations_run_both_ways():
    config = open_config({})
    assert (config.num_hidden_layers, config.rope_base, config.tie_word_embeddings) == (8, 10000.0, False)
    fields = {
        **SIZES, "norm_affine": False, "norm_eps": 1e-6, "init_mode": "xavier", "swiglu": True, "rescale_nffn": True,
        "scale_emb": True, "share_emb": True, "dropout": 0.1, "hidden_dropout": 0.2, "attention_dropout": 0.3,
    }  # fmt: skip
    config = open_config(fields | {"efficient_attn": "swift", "layerwise_ckpt": True, "output_size": -1})
    back = config_to_original(config)
    assert back == fields | {"output_size": -1, "efficient_attn": None, "layerwise_ckpt": False}
    default = MegalodonConfig()
    assert open_config(config_to_original(default)).to_dict() == default.to_dict()


def test_wrappers_are_stripped_and_half_precision_is_read(tmp_path):
    model = SIZES | {"share_emb": True, "z_dim": 32}
    states, _ = original(model, 2, torch.bfloat16)
    wrap = "_fsdp_wrapped_module."
    for state in states:
        for name in [name for name in state if name.startswith("layers.")]:
            block, rest = name[:9], name[9:]
            state[f"{wrap}{block}{wrap}_fpw_module._checkpoint_wrapped_module.{rest}"] = state.pop(name)
    opened = open_original(save(tmp_path / "in", model, [{f"module.{n}": t for n, t in s.items()} for s in states]))
    assert opened.tensors["megalodon.layers.1.mega.wz.weight"].dtype == torch.float32
    assert "rotary frequencies are rounded to bf16" in opened.note
    write_original(tmp_path / "out", opened.tensors, opened.config, shards=2, dtype="bf16")
    for found, expected in zip(load_shards(tmp_path / "out"), original(model, 2, torch.bfloat16)[0], strict=True):
        assert_same(found, expected)


def drop(name):
    return lambda states: states[-1].pop(name)


def put(name, tensor):
    return lambda states: states[-1].update({name: tensor})


def wrong(name, function):
    return lambda states: states[-1].update({name: function(states[-1][name])})


def repeated(states):
    states[1] = {name: tensor.clone() for name, tensor in states[0].items()}


REFUSED = {
    "missing": (drop("layers.1.mega.wz.bias"), r"consolidated\.01\.pth .*missing \(1\): layers\.1\.mega\.wz\.bias"),
    "missing buffer": (drop("rope.freqs"), r"missing \(1\): rope\.freqs"),
    "unexpected": (put("layers.0.nffn.fc3.weight", torch.zeros(6, 16)), r"unexpected \(1\): layers\.0\.nffn\.fc3"),
    "flat": (put("layers.0.flat_param_0", torch.zeros(6)), r"unexpected \(1\): layers\.0\.flat_param_0"),
    "whole in a shard": (
        put("layers.0.mega.wh2.weight", torch.zeros(16, 24)),
        r"mis-shaped \(1\): layers\.0\.mega\.wh2\.weight is \(16, 24\), expected \(16, 12\)",
    ),
    "integers": (wrong("layers.0.mega.wz.bias", torch.Tensor.long), r"layers\.0\.mega\.wz\.bias is torch\.int64"),
    "half a shard": (wrong("layers.0.mega.wz.bias", torch.Tensor.half), r"differ in the dtype of layers\.0\.mega\.wz"),
    "same shard": (repeated, r"consolidated\.00\.pth and consolidated\.01\.pth hold the same shard"),
    "not whole": (wrong("layers.1.nffn.norm.bias", lambda x: x + 1), r"01\.pth differ in layers\.1\.nffn\.norm\.bias"),
    "prior mean": (wrong("layers.1.mega.timenorm.prior_mean", lambda x: x + 1), r"timenorm\.prior_mean are not zero"),
    "prior count": (wrong("output.final_norm.prior_count", lambda x: x + 5), r"final_norm\.prior_count are not zero"),
    "twice": (lambda s: s[1].update({"module.embed.weight": s[1]["embed.weight"]}), r"holds embed\.weight twice"),
}  # fmt: skip


@pytest.mark.parametrize("change,message", REFUSED.values(), ids=REFUSED)
def test_shards_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    states, _ = original(SIZES, 2)
    change(states)
    with pytest.raises(ValueError, match=message):
        open_original(save(tmp_path / "in", SIZES, states))


def test_rotary_frequencies_tell_how_they_were_rounded(tmp_path):
    states, whole = original(SIZES | {"z_dim": 32}, 1)
    exact = whole["rope.freqs"]
    for frequencies, said in {
        exact.bfloat16().float(): "bf16",
        exact.bfloat16(): "bf16",
        exact.half(): "fp16",
        exact * (1 + 2**-23): None,
    }.items():
        states[0]["rope.freqs"] = frequencies
        note = open_original(save(tmp_path / "in", SIZES | {"z_dim": 32}, states)).note
        assert (note is None) == (said is None) and (note is None or f"rounded to {said}" in note)
    for frequencies in (exact * 1.001, exact.bfloat16() * 1.02, exact.flip(0), exact * float("nan")):
        states[0]["rope.freqs"] = frequencies
        with pytest.raises(ValueError, match=r"rope\.freqs is \[.*rope_base=100\.0 with heads of 8 channels"):
            open_original(save(tmp_path / "in", SIZES | {"z_dim": 32}, states))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_size": 5}, "output_size=5 is a head of another width than vocab_size=263"),
        ({"relu": True}, r"unknown fields \(relu\)"),
        ({"share_emb": True}, r"share_emb is true, but output\.output\.weight and embed\.weight differ"),
        ({"num_layers": 3}, r"missing .*layers\.2\.mega"),
        ({"norm_num_groups": 16}, "timestep_norm_groups=16"),
        ({"value_dim": 25}, "intermediate_size=25"),
        ({"rescale_nffn": True}, r"missing \(2\): layers\.0\.nffn\.alpha, layers\.1\.nffn\.alpha"),
    ],
)
def test_configurations_that_are_not_the_checkpoints_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        open_original(save(tmp_path / "in", SIZES | fields, original(SIZES, 2)[0]))


class _Shell:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_folders_that_are_not_whole_or_would_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "in", SIZES, original(SIZES, 2)[0])
    held = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(message, name, content):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_original(folder)
        (folder / name).unlink(missing_ok=True)
        if name in held:
            (folder / name).write_bytes(held[name])

    count = "model_parallel_size=2: expected consolidated.00.pth, consolidated.01.pth"
    refused(f"in holds consolidated.00.pth, but .* {count}", "consolidated.01.pth", None)
    refused(f"consolidated.02.pth, but .* {count}", "consolidated.02.pth", held["consolidated.01.pth"])
    refused(f"consolidated.01.pth, consolidated.pth, but .* {count}", "consolidated.pth", b"")
    refused("model_parallel_size=4: expected", "consolidate_config.json", b'{"model_parallel_size": 4}')
    refused("model_parallel_size=None", "consolidate_config.json", b"{}")
    refused("in holds no consolidate_config.json", "consolidate_config.json", None)
    refused("in holds no config.json", "config.json", None)
    refused("config.json has no 'model'", "config.json", b"{}")
    refused("config.json is not JSON", "config.json", b"{")
    refused("01.pth cannot be read as tensors", "consolidated.01.pth", held["consolidated.01.pth"][:900])
    torch.save({"embed.weight": _Shell()}, tmp_path / "hostile.pth")
    refused("01.pth cannot be read as tensors", "consolidated.01.pth", (tmp_path / "hostile.pth").read_bytes())
    torch.save({"model": {}}, tmp_path / "nested.pth")
    refused("01.pth holds something else", "consolidated.01.pth", (tmp_path / "nested.pth").read_bytes())
    assert not (tmp_path / "ran").exists()
    assert open_original(folder).note is None


def test_the_commands_go_both_ways(tmp_path, tokenizer, make_model, capsys):
    states, whole = original(SIZES, 2)
    source, words = save(tmp_path / "in", SIZES, states), tmp_path / "words"
    tokenizer.save_pretrained(words)
    out, back = tmp_path / "hf", tmp_path / "back"
    import_megalodon.main([str(source), str(out), "--tokenizer", str(words)])
    assert capsys.readouterr().out == f"converted {source} to {out}\n"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, whole["output.output.weight"])
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 2)
    assert AutoTokenizer.from_pretrained(out)("def")["input_ids"]
    export.main([str(out), str(back), "--format", "original", "--model-parallel", "2"])
    for found, expected in zip(load_shards(back), states, strict=True):
        assert_same(found, expected)
    # The tokenizer went along.
    import_megalodon.main([str(back), str(tmp_path / "again")])
    for name, tensor in open_folder(out)[1].items():
        assert torch.equal(open_folder(tmp_path / "again")[1][name], tensor), name
    assert "already" not in capsys.readouterr().err

    def refused(main, *arguments):
        assert exit_code(main, *arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    original_format = ("--format", "original")
    assert "give --tokenizer" in refused(import_megalodon.main, source, tmp_path / "new")
    assert "exists and is not empty" in refused(import_megalodon.main, source, out, "--tokenizer", words)
    assert "is the checkpoint that is read" in refused(import_megalodon.main, back, back, "--overwrite")
    assert "cannot share timestep_norm_groups=4" in refused(
        export.main, out, tmp_path / "new", *original_format, "--model-parallel", "8"
    )
    assert "exists and is not empty" in refused(export.main, out, back, *original_format)
    assert "so it is no original checkpoint" in refused(export.main, out, words, *original_format, "--overwrite")
    assert "--model-parallel is for --format original" in refused(export.main, out, back, "--model-parallel", "2")
    assert "--remote-code is for --format hf" in refused(export.main, out, back, *original_format, "--remote-code")
    mega = make_model()
    write_export(tmp_path / "mega", mega.state_dict(), mega.config, tokenizer, "")
    assert "mega holds a mega model" in refused(export.main, tmp_path / "mega", tmp_path / "new", *original_format)
    assert "--average is for checkpoints" in refused(export.main, out, tmp_path / "new", *original_format, "--average")
    assert not (tmp_path / "new").exists()
