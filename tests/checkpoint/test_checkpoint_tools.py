"""launch/checkpoint.py: lists, verifies, converts and prunes the checkpoints of a real, tiny run."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from commands import exit_code

from launch import checkpoint as command
from launch.pretrain import main as pretrain
from mega_scale.checkpoint import saver
from mega_scale.checkpoint.folder import checkpoints, verify
from mega_scale.checkpoint.state import StateReader
from mega_scale.files import FileLock

TINY = [
    "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=24", "model.nffn_hidden_size=20",
    "model.shared_representation_size=8", "model.ema_projection_size=2", "model.chunk_size=16",
    "data.source=json", "data.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2",
    "train.steps=4", "train.eval_batches=1", "train.sample_every=0", "train.tensorboard=false",
    "schedule.warmup_steps=0", "data.validation_fraction=0.5", "checkpoint.every=1", "checkpoint.keep=0",
    "parallel.engine=fsdp",
]  # fmt: skip
SECRET = b"a secret of twenty-four "


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of four steps, plain and signed."""
    folder = tmp_path_factory.mktemp("tools")
    text = folder / "text.jsonl"
    rows = [json.dumps({"text": f"document {number}, a text to train on and to validate on"}) for number in range(400)]
    text.write_text("\n".join(rows))
    (folder / "key").write_bytes(SECRET)
    for name, more in {"plain": [], "signed": [f"checkpoint.key_file={folder / 'key'}"]}.items():
        pretrain([*TINY, f"data.path={text}", f"run_dir={folder / name}", *more])
    return folder


@pytest.fixture
def run_dir(trained, tmp_path):
    shutil.copytree(trained / "plain", tmp_path / "run")
    return tmp_path / "run"


def run(*arguments):
    return exit_code(command.main, *arguments)


def damage(folder: Path) -> None:
    part = folder / "state" / "part-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 4
    part.write_bytes(content)


def state(folder: Path) -> dict[str, torch.Tensor]:
    reader = StateReader(folder / "state")
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return {f"{kind}/{name}": reader.whole(name, kind) for name in reader.shardings for kind in kinds}


def test_lists_what_there_is(run_dir, capsys):
    assert run("list", run_dir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "step-00000004" in lines[3] and "validation loss" in lines[3]
    assert "fsdp stage 3 on 1 ranks" in lines[0] and "no validation" in lines[0]
    (run_dir / "checkpoints/step-00000002/trainer.json").unlink()
    assert run("list", run_dir, "--json") == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["problem"] is None for row in rows] == [True, False, True, True]
    assert (
        rows[3]["tokens"] == 4 * 2 * 32 and rows[3]["serial"] == 4 and "trainer.json is missing" in rows[1]["problem"]
    )


def test_verifies_every_byte(run_dir, capsys):
    assert run("verify", run_dir) == 0
    assert capsys.readouterr().out.count("valid   ") == 4
    damage(run_dir / "checkpoints/step-00000003")
    assert run("list", run_dir) == 0  # which does not read the state
    capsys.readouterr()
    assert run("verify", run_dir) == 1
    assert "DAMAGED" in capsys.readouterr().out
    assert run("verify", run_dir / "checkpoints/step-00000003") == 1
    assert run("verify", run_dir / "checkpoints/step-00000002") == 0


@pytest.mark.parametrize("parts", [1, 3])
def test_converts_to_other_files_with_the_same_content(run_dir, tmp_path, parts, capsys):
    assert run("convert", run_dir, tmp_path / "out", "--parts", parts) == 0
    (folder,) = checkpoints(tmp_path / "out")
    original = run_dir / "checkpoints/step-00000004"
    assert verify(folder).step == 4 and len(list((folder / "state").glob("part-*"))) == parts
    one, other = state(original), state(folder)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert (folder / "trainer.json").read_bytes() == (original / "trainer.json").read_bytes()
    assert run("convert", run_dir, tmp_path / "out") == 2
    assert "exists: choose another folder" in capsys.readouterr().err


def test_signed_checkpoints_need_their_secret(trained, tmp_path, capsys):
    key = trained / "key"
    assert run("verify", trained / "signed") == 1 and run("verify", trained / "signed", "--key-file", key) == 0
    assert run("verify", trained / "plain", "--key-file", key) == 1
    capsys.readouterr()
    assert run("convert", trained / "signed", tmp_path / "open", "--key-file", key) == 0
    assert run("verify", tmp_path / "open") == 0
    assert run("convert", tmp_path / "open", tmp_path / "again", "--new-key-file", key) == 0
    assert run("verify", tmp_path / "again", "--key-file", key) == 0
    assert run("export", trained / "signed", tmp_path / "export") == 2
    assert "checkpoint.key_file" in capsys.readouterr().err
    assert run("export", trained / "signed", tmp_path / "export", "--key-file", key) == 0
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_prunes_but_never_the_last_valid_one(run_dir, capsys):
    names = lambda: [folder.name[-1] for folder in checkpoints(run_dir)]  # noqa: E731
    damage(run_dir / "checkpoints/step-00000004")
    assert run("prune", run_dir, "--keep", 1, "--dry-run") == 0
    assert capsys.readouterr().out.count("would delete") == 2 and names() == ["1", "2", "3", "4"]
    assert run("prune", run_dir, "--keep", 1, "--keep-every", 2) == 0
    assert names() == ["2", "3", "4"]
    assert run("prune", run_dir, "--damaged") == 0
    assert names() == ["2", "3"]
    damage(run_dir / "checkpoints/step-00000003")
    damage(run_dir / "checkpoints/step-00000002")
    assert run("prune", run_dir, "--keep", 1, "--damaged") == 2
    assert names() == ["2", "3"] and "no valid checkpoint" in capsys.readouterr().err


def test_a_running_jobs_folder_is_left_alone(run_dir, tmp_path, capsys):
    (tmp_path / "fresh").mkdir()
    with FileLock(run_dir / "run.lock"), FileLock(tmp_path / "fresh/run.lock"):
        assert run("prune", run_dir, "--keep", 1) == 2 and len(checkpoints(run_dir)) == 4
        assert f"process {os.getpid()}" in capsys.readouterr().err
        assert run("convert", run_dir, tmp_path / "fresh") == 2 and not checkpoints(tmp_path / "fresh")
        assert f"process {os.getpid()}" in capsys.readouterr().err
        assert run("prune", run_dir, "--keep", 1, "--dry-run") == 0
        assert run("convert", run_dir, tmp_path / "free") == 0  # reading it is safe
    assert run("prune", run_dir, "--keep", 1) == 0 and len(checkpoints(run_dir)) == 1
    assert not list(tmp_path.rglob("run.lock*"))


def test_refusals(tmp_path, run_dir, capsys):
    assert run("list", tmp_path) == 2 and run("verify", tmp_path) == 2 and run("prune", run_dir) == 2
    assert run("convert", run_dir, tmp_path / "out", "--parts", 0) == 2
    assert "parts=0" in capsys.readouterr().err


def test_the_run_waits_for_a_copy_that_takes_longer_than_a_step(trained, tmp_path, monkeypatch):
    copy = saver.Staging.copy

    def slow(staging, tensors):
        time.sleep(0.3)
        return copy(staging, tensors)

    monkeypatch.setattr(saver.Staging, "copy", slow)
    pretrain([*TINY, f"data.path={trained / 'text.jsonl'}", f"run_dir={tmp_path}"])
    saved = checkpoints(tmp_path)
    assert len(saved) == 4
    for slowly, swiftly in zip(saved, checkpoints(trained / "plain"), strict=True):
        expected = state(swiftly)
        for name, tensor in state(slowly).items():
            assert torch.equal(tensor, expected[name]), (slowly.name, name)
