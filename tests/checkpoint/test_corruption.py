"""Every damaged checkpoint is found before anything changes, and an older one is resumed from instead."""

from pathlib import Path

import corruption_study
import damage
import pytest
import verified_run

from mega_scale.checkpoint.folder import find_checkpoint

TRIALS = 150  # corruption_study.py has 500


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corruption")
    return corruption_study.study(TRIALS, 0, folder, plain=False, trained=False)["mega_scale"]


@pytest.mark.slow
def test_all_are_found_and_the_older_checkpoint_comes_back_bit_for_bit(found):
    assert len(found) == TRIALS
    missed = [trial for trial in found if trial.outcome != corruption_study.FOUND]
    assert not missed, missed[:5]


@pytest.mark.slow
def test_every_file_and_every_kind_had_its_turn(found):
    kinds = {trial.kind for trial in found}
    assert kinds >= {*damage.OF_ONE_FILE, "two files swapped", "file of the older checkpoint", "extra entry", "link"}
    assert kinds >= {"folder of that name", "pointer damaged", "stale pointer", "folder damaged"}
    assert len({kind for kind in kinds if kind.startswith("manifest: ")}) >= len(damage.MANIFEST_EDITS) / 2
    types = {"manifest.json", "trainer.json", "state/index.json", "state/part-00000.safetensors", "latest"}
    types |= {"random/rank-00000.safetensors", "config.yaml", "model/config.json", "model/tokenizer.json"}
    assert {trial.file for trial in found} >= types


@pytest.mark.launch
@pytest.mark.slow
def test_a_run_of_two_ranks_beside_plain_checkpoints_and_resumed_after_damage(tmp_path: Path):
    """The same damage goes unnoticed where nobody verifies."""
    studied = corruption_study.study(60, 1, tmp_path)
    wrong = {name: sum(t.outcome == corruption_study.WRONG for t in trials) for name, trials in studied.items()}
    assert wrong["mega_scale"] == 0 and wrong["DCP"] > 0 and wrong["DeepSpeed"] > 0, wrong
    table = corruption_study.table(studied)
    assert "| all | 60 of 60 found, 0 loaded wrong" in table and "stale pointer" in table
    # And two ranks of the trainer, which share the reading, go on from what is left.
    run = tmp_path / "ours" / "run"
    newer = run / "checkpoints" / f"step-{verified_run.NEWER:08d}"
    content = bytearray((newer / "state/part-00001.safetensors").read_bytes())
    content[-9] ^= 4
    (newer / "state/part-00001.safetensors").write_bytes(content)
    output = verified_run.train_two_ranks(run, "--resume")
    older = newer.with_name(f"step-{verified_run.OLDER:08d}")
    assert f"{newer} is no valid checkpoint: state/part-00001.safetensors" in output
    assert f"resumed from {older}" in output and find_checkpoint(run) == (newer, [])
