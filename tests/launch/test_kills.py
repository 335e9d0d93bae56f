"""Runs killed at random moments go on to the bit, and the study that says so notices when they do not."""

import json

import kills
import pytest
import torch
from launching import ROOT, study
from same_runs import metric_problems, state_problems

from mega_scale.checkpoint.folder import state_file
from mega_scale.checkpoint.saver import INDEX, build_index, rank_tensors, write_tensors
from mega_scale.parallel.shard import EngineState, LocalTensor, Shard, Sharding


@pytest.mark.launch
@pytest.mark.slow
def test_runs_killed_at_random_moments_go_on_to_the_bit(tmp_path):
    """Both engines, four kills; tests/campaigns/kill_study.py makes a hundred."""
    arguments = ["--kills", "4", "--cells", "2", "--json", str(tmp_path / "found.json")]
    code, output = study(ROOT / "tests/campaigns/kill_study.py", arguments, timeout=800)
    assert code == 0, output[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["problems"] == [] and found["kills"] == 4
    assert found["during_a_save"] >= 1
    assert found["resumes"] + found["killed_again_in_start_up"] == 4
    assert found["bit_equal"] == found["chains"] >= 2
    assert found["longest_until_the_other_ended_s"] < kills.TIMEOUT_S


def write_metrics(run_dir, losses, steps=(1, 2, 3)):
    run_dir.mkdir(exist_ok=True)
    rows = [
        {"step": step, "part": "train", "loss": loss, "grad_norm": 1.0, "lr": 0.1, "tokens": step}
        for step, loss in zip(steps, losses, strict=True)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_loss_that_differs_a_lost_row_and_a_repeated_one_are_noticed(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    write_metrics(one, [3.0, 2.0, 1.0])
    write_metrics(other, [3.0, 2.0, 1.5])
    assert metric_problems(one, one, 3) == [] == metric_problems(one, other, 2)
    assert metric_problems(one, other, 3) == ["step 3: loss is 1.5, not 1.0"]
    write_metrics(other, [3.0, 1.0], steps=(1, 3))
    assert "steps [1, 3]" in metric_problems(one, other, 3)[0]
    write_metrics(other, [3.0, 2.0, 2.0, 1.0], steps=(1, 2, 2, 3))
    assert "steps [1, 2, 2, 3]" in metric_problems(one, other, 3)[0]
    assert "steps []" in metric_problems(one, tmp_path / "none", 3)[0]


def write_checkpoint(folder, change=None, steps=2.0):
    tensors = {kind: torch.arange(6.0) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    if change is not None:
        tensors[change][0] = -0.0  # equal as a number
    local = {"layer.weight": LocalTensor(torch.Size([2, 3]), Shard((0, 0), (2, 3)), 0, tensors, 1, 0)}
    table = {"layer.weight": Sharding("layer.weight")}
    state = EngineState(table, {}, 1, 0, local, [torch.tensor(steps)], {"mean": torch.ones(2)})
    (folder / "state").mkdir(parents=True)
    (folder / "random").mkdir()
    (folder / "random/rank-00000.safetensors").write_bytes(b"1")
    (folder / "trainer.json").write_text("{}")
    found, spans = rank_tensors(state, 0)
    write_tensors(folder / "state" / state_file(0), found, lambda _: None)
    (folder / "state" / INDEX).write_text(json.dumps(build_index(state, [spans])))
    return folder


def test_one_bit_in_weights_moments_counters_and_files_is_noticed(tmp_path):
    reference = write_checkpoint(tmp_path / "reference")
    assert state_problems(reference, write_checkpoint(tmp_path / "same")) == []
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        other = write_checkpoint(tmp_path / kind, change=kind)
        assert state_problems(reference, other) == [f"{kind} of layer.weight differs"]
    assert state_problems(reference, write_checkpoint(tmp_path / "steps", steps=3.0)) == [
        "other parameters, moments or optimizer steps"
    ]
    for name in ("trainer.json", "random/rank-00000.safetensors"):
        other = write_checkpoint(tmp_path / name.replace("/", "-"))
        (other / name).write_bytes(b"2")
        assert state_problems(reference, other) == [f"{name} differs"]
