"""A run with classes of its user's own, and what it says from its start to its end."""

import json

import pytest
from launching import metrics, pretrain, write_sources

pytestmark = [pytest.mark.launch, pytest.mark.slow]

OWN = """
import json
from pathlib import Path

import torch
from mega_scale.training.callbacks import Callback


class Count(Callback):
    def note(self, trainer, *values):
        with Path(__file__).with_name(f"rank-{trainer.rank}.txt").open("a") as file:
            file.write(json.dumps(values) + "\\n")

    def on_start(self, trainer):
        self.note(trainer, "start", trainer.progress.step)

    def on_step(self, trainer, step, result):
        both = int(trainer.world.sum(torch.tensor(1)))  # collective: every rank is here
        trainer.reporter.values(step, "mine", {"ranks": both})
        self.note(trainer, "step", step, result.loss)

    def on_evaluation(self, trainer, step, values):
        self.note(trainer, "evaluation", step, values["loss"])

    def on_save(self, trainer, saved):
        self.note(trainer, "save", saved.step, saved.folder.name)

    def on_end(self, trainer, stopped):
        self.note(trainer, "end", stopped)


class Keep:
    def __init__(self, run):
        self.path = Path(__file__).with_name("kept.txt")
        self.path.write_text(f"{run.folder.name} {run.facts['parameters']} {run.config['train']['steps']}\\n")

    def log(self, step, part, values):
        with self.path.open("a") as file:
            file.write(f"{step} {part}\\n")

    def text(self, step, name, text): ...
    def rewind(self, step): ...

    def close(self):
        raise ConnectionError("no route to host")
"""


def test_own_callbacks_and_trackers_take_part_in_a_run_that_says_what_it_is_and_how_it_ended(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    text = write_sources(tmp_path / "text.jsonl", 20)
    run_dir = tmp_path / "run"
    output = pretrain(
        "two forked", run_dir, "train.steps=2", "schedule.warmup_steps=1", "data.source=json",
        f"data.path={text}", f"data.validation_path={text}",
        f"train.callbacks={tmp_path}/own.py:Count", f"train.trackers={tmp_path}/own.py:Keep", "parallel.engine=fsdp",
    )  # fmt: skip
    loss = {step: row["loss"] for step, row in metrics(run_dir).items()}
    validation = metrics(run_dir, "validation")[2]["loss"]
    for rank in (0, 1):
        lines = [json.loads(line) for line in (tmp_path / f"rank-{rank}.txt").read_text().splitlines()]
        assert lines == [
            ["start", 0], ["step", 1, loss[1]], ["step", 2, loss[2]], ["evaluation", 2, validation],
            ["save", 2, "step-00000002"], ["end", None],
        ]  # fmt: skip
    assert {step: row["ranks"] for step, row in metrics(run_dir, "mine").items()} == {1: 2, 2: 2}
    facts = metrics(run_dir, "run")[0]
    kept = (tmp_path / "kept.txt").read_text().splitlines()
    assert kept[0] == f"run {facts['parameters']} 2" and facts["layout"]["dp_shard"] == facts["ranks"] == 2
    assert sorted(kept[1:]) == sorted(["1 mine", "1 train", "2 mine", "2 train", "2 validation"])
    assert output.count("Keep cannot be closed: no route to host") == 1
    # The table at its start, and the line at its end.
    names = ("model", "data", "batch", "layout", "memory", "run folder", "trackers", "resume")
    table = [line.split(" | ", 2) for line in output.splitlines() if line.startswith("mega_scale | ")]
    rows = {name.strip(): row for _, name, row in (line for line in table if len(line) == 3)}
    assert tuple(rows) == names
    assert "2 ranks" in rows["layout"] and str(run_dir) in rows["run folder"] and "own.py:Keep" in rows["trackers"]
    end = output[output.index("mega_scale | finished") :].splitlines()[0]
    assert "step 2 of 2 in 0:0" in end and f"validation loss {validation:.4f}" in end
    assert f"{run_dir}/checkpoints/step-00000002" in end and f"launch/export.py {run_dir}" in end
