"""What earlier commits wrote, two ranks of either engine, still loads bit for bit and goes on as it did then.

Losses were recorded on another machine, whose products may round otherwise, so they are compared to 1e-6; weights,
moments and data that are only read are compared bit for bit.
"""

import json
import shutil
import tarfile

import launching
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch import evaluate, prepare
from mega_scale.checkpoint.folder import verify
from mega_scale.checkpoint.state import StateReader
from mega_scale.data import DataConfig, load_datasets, load_tokenizer
from mega_scale.hub.folder import open_folder
from mega_scale.model import MegaConfig
from mega_scale.training.trained_model import open_checkpoint

WRITTEN = launching.ROOT / "tests" / "golden" / "earlier" / "d1596f7.tar.xz"
RUNS = ("fsdp", "zero3", "zero1")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(WRITTEN) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_loads_bit_for_bit(written, run):
    folder = written / run / "checkpoints" / "step-00000004"
    assert verify(folder).step == 4
    config, tensors, tokenizer, found = open_checkpoint(written / run)
    exported, weights = open_folder(written / "export")
    assert found == folder
    assert all(getattr(config, name) == getattr(exported, name) for name in MegaConfig.__annotations__)
    assert tokenizer.get_vocab() == load_tokenizer("byte").get_vocab()
    assert set(tensors) == set(weights) and len(weights) > 20
    reader, stored = StateReader(folder / "state"), [load_file(part) for part in (folder / "state").glob("part-*")]
    numbers = {kind: np.sort(np.concatenate([of(part, kind) for part in stored])) for kind in KINDS}
    for kind in KINDS:
        whole = [reader.whole(name, kind).flatten() for name in reader.shardings]
        assert np.array_equal(np.sort(torch.cat(whole).numpy()), numbers[kind]), kind
    for name, tensor in weights.items():
        if run == "fsdp":
            assert torch.equal(tensors[name], tensor), name
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-5, atol=1e-6)


KINDS = ("weight", "exp_avg", "exp_avg_sq")


def of(part, kind):
    """All numbers of a kind in a rank's file."""
    return np.concatenate([t.flatten().numpy() for name, t in part.items() if name.split("/")[0] == kind])


def test_an_export_and_prepared_data_are_read(written, capsys):
    prepare.main([str(written / "data"), "--verify"])
    assert "train-00000" in capsys.readouterr().out
    config = DataConfig(source="prepared", path=[str(written / "data")], sequence_length=64)
    train, validation = load_datasets(config, load_tokenizer("byte"))
    assert (train.tokens, validation.tokens) == (14001, 3643)
    text = written / "text.txt"
    text.write_text("def mega(model):\n" * 20)
    losses = []
    for path in (written / "export", written / "fsdp"):
        evaluate.main([str(path), str(text), "--sequence-length", "64", "--json", "--device", "cpu"])
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("run,typed", [("fsdp", False), ("zero3", True), ("zero1", False)])
def test_a_run_goes_on_as_it_did_then(written, tmp_path, run, typed):
    shutil.copytree(written / run, tmp_path / "run")
    recorded = {part: launching.metrics(written / run, part) for part in ("train", "validation")}
    words = [f"run_dir={tmp_path / 'run'}", f"data.path={written / 'data'}", "--resume"]
    if typed:  # every key, as that commit saved it, but for one that has another name now
        saved = tmp_path / "config.yaml"
        shutil.copy(written / run / "config.yaml", saved)
        words = ["--config", str(saved), *words]
        code, output = launching.start(["two forked", "launch/pretrain.py"], words)
        assert code == 2 and "activation_checkpoint_keeps is now parallel.activation_checkpoint_policy" in output
        saved.write_text(saved.read_text().replace("checkpoint_keeps: nothing", "checkpoint_policy: full"))
    else:  # none of the model's
        words += [
            "data.source=prepared", "data.sequence_length=64", "train.global_batch_size=4", "train.micro_batch_size=1",
            "train.log_every=1", "train.eval_every=4", "train.eval_batches=2", "train.sample_every=0", "train.steps=8",
            "optimizer.lr=0.01", "schedule.warmup_steps=3", "schedule.min_lr=0", "checkpoint.every=4",
            f"parallel.engine={'fsdp' if run == 'fsdp' else 'deepspeed'}", "parallel.self_test=false",
            f"parallel.zero_stage={1 if run == 'zero1' else 3}", "train.tensorboard=false",
        ]  # fmt: skip
    code, output = launching.start(["two forked", "launch/pretrain.py"], words)
    assert code == 0 and "resumed from" in output and "from step 4 of" in output, output
    (line,) = [line for line in output.splitlines() if "other keys" in line]
    # The model's are those of the checkpoint. Where nobody chose, the device chooses now what was false.
    changed = {"data.path"} if typed else {"data.path", "train.compile"}
    assert line.count("(was") == len(changed) and all(f"{key}=" in line for key in changed)
    for part, rows in recorded.items():
        now = launching.metrics(tmp_path / "run", part)
        assert set(now) == set(rows)
        for step in (step for step in rows if step > 4):
            assert now[step]["loss"] == pytest.approx(rows[step]["loss"], rel=1e-6), (part, step)
