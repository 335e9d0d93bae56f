"""fairseq's files: reading them without running code, their options, their dictionary, and the command around them."""

import argparse
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import exit_code
from fairseq_equations import Model, Options, random_state
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mega_scale.hub.fairseq import (
    config_from_args,
    find_layout,
    read_fairseq,
    tokenizer_from_dictionary,
)
from mega_scale.hub.folder import open_folder

LM = Options(chunk_size=4)
LRA = Options(layout="lra", scale_embedding=False, normalize_before=False, norm="scalenorm", max_positions=32)


def args_of(options):
    shared = {
        "activation_fn": "silu",
        "attention_activation_fn": options.attention,
        "dropout": 0.3,
        "attention_dropout": 0.1,
        "feature_dropout": False,
        "rel_pos_bias": options.rel_pos_bias,
        "truncation_length": options.truncation,
        "arch": "any",
    }
    side = "decoder" if options.causal else "encoder"
    sizes = {
        "embed_dim": options.embed_dim,
        "hidden_dim": options.hidden_dim,
        "ffn_embed_dim": options.ffn_dim,
        "layers": options.layers,
    }
    shared |= {f"{side}_{name}": value for name, value in sizes.items()}
    if options.layout == "lra":
        return shared | {
            "z_dim": options.z_dim,
            "n_dim": options.n_dim,
            "chunk_size": options.chunk_size,
            "act_dropout": 0.2,
            "norm_type": options.norm,
            "encoder_normalize_before": options.normalize_before,
            "max_positions": options.max_positions,
        }
    return shared | {
        f"{side}_z_dim": options.z_dim,
        f"{side}_n_dim": options.n_dim,
        f"{side}_chunk_size": options.chunk_size,
        "hidden_dropout": 0.15,
        "activation_dropout": 0.2,
        "normalization_type": options.norm,
        "normalize_before": options.normalize_before,
        "max_target_positions": options.max_positions,
        "max_source_positions": options.max_positions,
        "no_scale_embedding": not options.scale_embedding,
        "share_decoder_input_output_embed": options.shared_output,
    }


def save(path, options, **changes):
    content = {
        "args": argparse.Namespace(**args_of(options)),
        "model": random_state(options),
        "optimizer_history": [{"num_updates": 400, "lr_scheduler_state": {"best": 1.25}}],
        "extra_state": {"epoch": 3, "val_loss": 1.25},
    }
    torch.save(content | changes, path)
    return path


class _Shell:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_reads_tensors_and_options(tmp_path):
    found, args = read_fairseq(save(tmp_path / "model.pt", LM))
    state = random_state(LM)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert args == args_of(LM)
    torch.save(state, tmp_path / "bare.pt")
    bare, args = read_fairseq(tmp_path / "bare.pt")
    assert list(bare) == list(state)
    assert args == {}


def test_files_that_would_run_code_or_hold_no_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "hostile.pt", LM, extra_state=_Shell())
    torch.save(random_state(LM), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "broken.pt").write_bytes((tmp_path / "hostile.pt").read_bytes()[:500])
    for name in ("hostile.pt", "old.pt", "broken.pt", "absent.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as tensors and plain values .* open it where you"):
            read_fairseq(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    for content in ({"model": {}}, {"model": {"step": 3}}, [1, 2], {"epoch": 1}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"other\.pt holds no model"):
            read_fairseq(tmp_path / "other.pt")


def test_options_become_fields():
    config = config_from_args(random_state(LM), args_of(LM), "lm")
    expected = {
        "vocab_size": 13,
        "hidden_size": 6,
        "intermediate_size": 10,
        "nffn_hidden_size": 9,
        "num_hidden_layers": 2,
        "shared_representation_size": 4,
        "ema_projection_size": 3,
        "use_chunking": True,
        "chunk_size": 4,
        "max_positions": 4,
        "truncation": None,
        "dropout_prob": 0.3,
        "embedding_dropout_prob": 0.3,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.15,
        "nffn_activation_dropout_prob": 0.2,
        "normalization_type": "layernorm",
        "normalize_before_mega": True,
        "normalize_before_ffn": True,
        "final_norm": True,
        "scale_embeddings": True,
        "tie_word_embeddings": True,
        "lm_head_bias": False,
        "add_lm_hidden_dense_layer": False,
        "is_decoder": True,
        "bidirectional": False,
        "add_cross_attention": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    whole = replace(LM, chunk_size=-1, cross_attention=True, ffn_dim=0, truncation=0)
    config = config_from_args(random_state(whole), args_of(whole), "lm")
    assert (config.use_chunking, config.max_positions, config.truncation) == (False, 24, None)
    assert (config.add_cross_attention, config.use_normalized_ffn) == (True, False)
    config = config_from_args(random_state(LRA), args_of(LRA), "lra")
    assert (config.bidirectional, config.is_decoder, config.final_norm) == (True, False, False)
    assert (config.normalization_type, config.hidden_dropout_prob, config.scale_embeddings) == ("scalenorm", 0.2, False)


def test_absent_and_impossible_options_are_named():
    args = args_of(LM)
    del args["decoder_n_dim"], args["dropout"]
    with pytest.raises(ValueError, match=r"dropout_prob \(dropout\), .*ema_projection_size \(decoder_n_dim\).*--set"):
        config_from_args(random_state(LM), args, "lm")
    changes = {"ema_projection_size": 3, "dropout_prob": 0.0, "embedding_dropout_prob": 0.0, "truncation": 16}
    config = config_from_args(random_state(LM), args, "lm", changes)
    assert {name: getattr(config, name) for name in changes} == changes
    with pytest.raises(ValueError, match="activation='tanh' is unknown"):
        config_from_args({}, args_of(LM) | {"activation_fn": "tanh"}, "lm")
    with pytest.raises(ValueError, match="build its MegaConfig by hand"):
        config_from_args({}, {}, "mlm")


def test_the_layout_is_told_by_the_names():
    for options in (LM, LRA, Options(layout="encoder"), Options(layout="mlm")):
        assert find_layout(random_state(options)) == options.layout
    with pytest.raises(ValueError, match="several models: choose --layout lm or --layout encoder"):
        find_layout(random_state(LM) | random_state(Options(layout="encoder")))
    with pytest.raises(ValueError, match=r"no word embedding .* adaptive input"):
        find_layout({"decoder.embed_tokens.embeddings.0.0.weight": torch.zeros(1)})


def test_a_dictionary_becomes_a_tokenizer(tmp_path):
    (tmp_path / "dict.txt").write_text("the 31\nné 7\n= 2\n", encoding="utf-8")
    tokenizer = tokenizer_from_dictionary(tmp_path / "dict.txt")
    assert tokenizer("the  né\n= other")["input_ids"] == [4, 5, 6, 3]
    assert tokenizer.decode([4, 5, 6]) == "the né ="
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 2, 7)
    for text, message in {"the\n": "line 1 is 'the'", "the 3\nthe 2\n": "line 2 repeats the word 'the'"}.items():
        (tmp_path / "dict.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            tokenizer_from_dictionary(tmp_path / "dict.txt")


@pytest.fixture(scope="module")
def launched():
    path = Path(__file__).resolve().parents[2] / "launch" / "import_fairseq.py"
    spec = importlib.util.spec_from_file_location("launched_import", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_writes_a_language_model(tmp_path, launched, capsys):
    checkpoint, out = save(tmp_path / "model.pt", LM), tmp_path / "out"
    (tmp_path / "dict.txt").write_text("".join(f"word{number} 1\n" for number in range(9)))
    launched.main([str(checkpoint), str(out), "--dictionary", str(tmp_path / "dict.txt")])
    assert capsys.readouterr().out == f"converted {checkpoint} (lm) to {out}\n"
    tokens = torch.arange(2, 13)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0]
    assert (logits - Model(LM, random_state(LM)).logits(tokens)).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(out)("word0 word8")["input_ids"] == [4, 12]
    config, tensors = open_folder(out)
    assert torch.equal(tensors["mega.embedding_layer.word_embeddings.weight"], random_state(LM)[LM.embedding])
    assert config.truncation is None


def test_the_command_writes_an_encoder_and_says_what_it_refuses(tmp_path, launched, capsys):
    options = replace(LRA, ema_input="alpha")
    checkpoint, out = save(tmp_path / "model.pt", options), tmp_path / "out"
    for changes in ([], ["--set", "dropout_prob=0.5", "--overwrite"]):
        launched.main([str(checkpoint), str(out), "--ema-input", "alpha", *changes])
    tokens = torch.arange(2, 13)
    model = AutoModel.from_pretrained(out).eval()
    assert model.config.dropout_prob == 0.5
    with torch.no_grad():
        hidden = model(input_ids=tokens[None]).last_hidden_state[0]
    assert (hidden - Model(options, random_state(options)).hidden(tokens)).abs().max() < 1e-5
    capsys.readouterr()
    save(tmp_path / "lm.pt", LM)
    for arguments, message in {
        (str(checkpoint), str(out)): "exists and is not empty",
        (str(tmp_path / "lm.pt"), str(tmp_path / "lm")): "give --dictionary",
        (str(checkpoint), str(tmp_path / "new"), "--layout", "lm"): "the checkpoint does not say",
    }.items():
        assert exit_code(launched.main, *arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]
    with pytest.raises(argparse.ArgumentTypeError, match="is not FIELD=VALUE with a field of MegaConfig"):
        launched.field_value("depth=3")
