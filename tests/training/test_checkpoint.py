"""Checkpoint folders: complete or not there, found by run, pruned after a new one is complete."""

import json
import os

import pytest
import torch

from mega_scale.training.checkpoint import (
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)


class OneRank:
    """A world of one process, without a process group."""

    rank, size, local_rank, device = 0, 1, 0, torch.device("cpu")

    def __init__(self, agree=True):
        self.agree = agree

    def barrier(self):
        pass

    def all_agree(self, flag):
        return flag and self.agree


class TextEngine:
    """An engine whose state is a text."""

    def __init__(self, text):
        self.text = text

    def save(self, folder):
        (folder / "weights.txt").write_text(self.text)

    def load(self, folder):
        self.text = (folder / "weights.txt").read_text()


def describe(folder):
    (folder / "config.yaml").write_text("run_dir: here\n")


def save(run_dir, step, text="w", world=None, keep=0):
    return save_checkpoint(run_dir, step, TextEngine(text), world or OneRank(), {"step": step}, describe, keep)


def test_what_was_saved_comes_back_with_its_random_state(tmp_path):
    torch.manual_seed(5)
    torch.rand(3)
    folder = save(tmp_path, 7, "weights of step 7")
    following = torch.rand(4)
    engine = TextEngine("other")
    torch.manual_seed(0)
    assert load_checkpoint(folder, engine, OneRank()) == {"step": 7}
    assert engine.text == "weights of step 7"
    assert torch.equal(torch.rand(4), following)


def test_newest_is_found_and_unfinished_ones_are_not(tmp_path):
    for step in (5, 20, 100):
        save(tmp_path, step)
    unfinished = tmp_path / "checkpoints" / "step-00000300.unfinished"
    unfinished.mkdir()
    (unfinished / "trainer.json").write_text("{}")
    assert [json.loads((c / "trainer.json").read_text())["step"] for c in checkpoints(tmp_path)] == [5, 20, 100]
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000100"
    assert find_checkpoint(tmp_path / "checkpoints" / "step-00000005").name == "step-00000005"


def test_a_rank_that_fails_leaves_older_checkpoints_alone(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(RuntimeError, match="step-00000010 is incomplete"):
        save(tmp_path, 10, world=OneRank(agree=False), keep=1)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000005"]


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_step_saved_again_replaces_the_earlier_one(tmp_path):
    save(tmp_path, 3, "first")
    folder = save(tmp_path, 3, "second")
    assert (folder / "engine" / "weights.txt").read_text() == "second"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.json"):
        find_checkpoint(tmp_path)
    (tmp_path / "trainer.json").write_text("{broken")
    with pytest.raises(ValueError, match="cannot be read"):
        read_state(tmp_path)


def test_nothing_is_flushed_while_other_ranks_still_write(tmp_path, monkeypatch):
    """A file of another rank has a temporary name until that rank has written it, which all ranks then agree on."""
    temporary = tmp_path / "checkpoints/step-00000003.unfinished/.tmp-of-another-rank"

    class Slow(OneRank):
        def all_agree(self, flag):
            if temporary.exists():
                temporary.rename(temporary.with_name("rng-00001.safetensors"))
            return flag

    def look(path, flags, *rest, **options):
        assert flags != os.O_RDONLY or not temporary.exists(), "flushed too early"
        return opened(path, flags, *rest, **options)

    opened = os.open
    monkeypatch.setattr(os, "open", look)

    def describe_slowly(folder):
        describe(folder)
        temporary.touch()

    folder = save_checkpoint(tmp_path, 3, TextEngine("w"), Slow(), {"step": 3}, describe_slowly)
    assert (folder / "rng-00001.safetensors").exists()
