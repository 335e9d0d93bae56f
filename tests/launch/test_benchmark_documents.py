"""The `reset` sub-command of launch/benchmark.py reports what keeping documents apart costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.benchmark_documents import documents

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.launch]


def test_documents_have_the_mean_length_asked_for():
    starts = documents(8, 4096, 100, seed=0)
    assert starts.shape == (8, 4096) and starts.dtype == torch.bool
    assert 8 * 4096 / int(starts.sum()) == pytest.approx(100, rel=0.15)


@pytest.mark.slow
def test_cost_is_measured_in_turns(tmp_path):
    sizes = ["--batch", "2", "--length", "256", "--chunk", "32", "--hidden", "64", "--document", "20", "90"]
    command = [sys.executable, str(ROOT / "launch/benchmark.py"), "reset", *sizes, "--repeats", "3", "--warmup", "1"]
    command += ["--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert {name: len(times) for name, times in report["seconds"].items()} == {
        "concat": 3, "reset, 20 tokens": 3, "reset, 90 tokens": 3,
    }  # fmt: skip
    assert 0 < report["mixed"]["reset, 90 tokens"] < report["mixed"]["reset, 20 tokens"] <= 1
    assert "cost over concat" in done.stdout
