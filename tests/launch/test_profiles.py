"""A run of two ranks that traces steps on both, until the memory of one runs out."""

import json

import pytest
from launching import LAUNCHERS, TINY, start, write_sources

pytestmark = [pytest.mark.launch, pytest.mark.slow]

OWN = """
import torch
from mega_scale.training.callbacks import Callback


class Full(Callback):
    def on_step(self, trainer, step, result):
        if step == 3 and trainer.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
"""


def test_ranks_trace_the_steps_asked_for_and_one_without_memory_says_what_held_it(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    text = write_sources(tmp_path / "text.jsonl", 20)
    code, output = start(LAUNCHERS["two forked"], [
        *TINY, f"run_dir={tmp_path / 'run'}", "data.source=json", f"data.path={text}", "data.validation_fraction=0",
        "train.eval_batches=0", f"train.callbacks={tmp_path}/own.py:Full", "profile.steps=[1, 2]",
        "profile.ranks=[0, 1]", "train.steps=9", "parallel.engine=deepspeed",
    ])  # fmt: skip
    assert code in (1, 75) and "Traceback" not in output, output
    folder = tmp_path / "run/profile"
    for rank in (0, 1):
        events = json.loads((folder / f"steps-1-2/rank-{rank}.json").read_text())["traceEvents"]
        names = {str(event.get("name")) for event in events}
        assert {"ProfilerStep#1", "ProfilerStep#2"} <= names and "ProfilerStep#3" not in names
    assert output.count(f"step 2 | traces of steps 1 to 2, ranks 0, 1: {folder}/steps-1-2") == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: rank 1 ran out of memory in step 3")]
    assert "weights 0." in line and "train.micro_batch_size=1" in line and "out-of-memory-rank-1.json" in line
    held = json.loads((folder / "out-of-memory-rank-1.json").read_text())["held_bytes"]
    assert held["weights"] > 0 and held["moments"] >= held["weights"] / 2 and held["gradients"] > 0
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and "rank 1" in status["reason"] and "out of memory" in status["reason"]
