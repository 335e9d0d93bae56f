"""launch/export.py around write_export: which checkpoint it takes, what it tells the card, and what it refuses."""

import argparse
import json
from importlib.metadata import version

import pytest
import torch
from commands import exit_code

from mega_scale import export
from mega_scale.checkpoint import state
from mega_scale.checkpoint.folder import Manifest, write_manifest
from mega_scale.checkpoint.saver import describe_model
from mega_scale.files import hash_file
from mega_scale.hub.folder import open_folder

RUN = """
data:
  source: text
  path: [one.txt, two.txt]
  sequence_length: 32
"""


@pytest.fixture
def run_folder(tmp_path, make_model, tokenizer):
    """A run folder with checkpoints of steps 20 and 100, and one that is still being written."""
    for step in (20, 100):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        for name, content in describe_model(make_model().config, tokenizer).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "config.yaml").write_text(RUN)
        trainer = {
            "step": step,
            "tokens": 32 * step,
            "data": {},
            "layout": {"engine": "fsdp", "zero_stage": 3, "world_size": 2},
            "validation": {"loss": 2.5, "perplexity": 12.18, "bits_per_byte": 3.6067, "tokens": 64},
        }
        (folder / "trainer.json").write_text(json.dumps(trainer))
        files = [path for path in folder.rglob("*") if path.is_file()]
        records = {path.relative_to(folder).as_posix(): hash_file(path, None) for path in files}
        write_manifest(folder, Manifest(step, step, records), None)
    unfinished = tmp_path / "run" / "checkpoints" / "step-00000200.unfinished"
    unfinished.mkdir()
    (unfinished / "trainer.json").write_text("{}")
    return tmp_path / "run"


@pytest.fixture
def weights(make_model, monkeypatch):
    """Stands in for the files of an engine, and notes where they were looked for."""
    model = make_model()
    model.opened = []

    def open_weights(folder, average):
        model.opened.append(folder)
        return model.state_dict()

    monkeypatch.setattr(state, "open_weights", open_weights)
    return model


def test_exports_the_newest_checkpoint_of_a_run(tmp_path, run_folder, weights, capsys):
    out = tmp_path / "out"
    export.main([str(run_folder), str(out), "--max-shard-size", "10KB"])
    newest = run_folder / "checkpoints" / "step-00000100"
    assert weights.opened == [newest / "state"]
    assert capsys.readouterr().out == f"exported {newest} to {out}\n"
    assert (out / "model.safetensors.index.json").is_file()
    _, tensors = open_folder(out)
    for name, tensor in weights.state_dict().items():
        assert torch.equal(tensors[name], tensor), name
    card = (out / "README.md").read_text()
    for expected in (
        "| steps | 100 |",
        "| tokens seen | 3,200 |",
        "| validation loss | 2.5000 nats/token (perplexity 12.18) |",
        "| validation text | 3.6067 bits/byte |",
        "| layout | fsdp, ZeRO stage 3, 2 rank(s) |",
        "| data | text (one.txt, two.txt), tokenizer byte, sequences of 32 tokens |",
        "  source: text\n",
        "  - one.txt\n  - two.txt\n",
        f"| torch | {version('torch')} |",
    ):
        assert expected in card


def test_exports_a_named_checkpoint_in_bf16_over_an_earlier_export(tmp_path, run_folder, weights):
    checkpoint = run_folder / "checkpoints" / "step-00000020"
    for options in ([], ["--dtype", "bf16", "--overwrite"]):
        export.main([str(checkpoint), str(tmp_path / "out"), *options])
    assert weights.opened == [checkpoint / "state"] * 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_exports_the_models_code_when_asked(tmp_path, run_folder, weights):
    for options in ([], ["--remote-code", "--overwrite"]):
        out = tmp_path / "out"
        export.main([str(run_folder), str(out), *options])
        assert ("auto_map" in json.loads((out / "config.json").read_text())) == bool(options)
        assert (out / "modeling_mega.py").is_file() == bool(options)
        assert ("trust_remote_code=True" in (out / "README.md").read_text()) == bool(options)


def test_refusals_are_one_line(tmp_path, run_folder, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    refusals = {
        (tmp_path / "nowhere", tmp_path / "out"): "nowhere is neither a checkpoint",
        (run_folder, taken): "taken exists and is not empty",
    }
    for arguments, message in refusals.items():
        assert exit_code(export.main, *arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]


def test_sizes_are_read_with_their_units():
    sizes = {"5GB": 5 * 10**9, "512MiB": 512 * 2**20, "1.5 kb": 1500, "7": 7}
    assert {text: export.byte_size(text) for text in sizes} == sizes
    for text in ("5TB", "0", "-1GB", "GB", "0.1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size of at least 1 byte"):
            export.byte_size(text)
