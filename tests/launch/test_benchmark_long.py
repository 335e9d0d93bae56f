"""`benchmark.py long`: a step of a recipe's model in segments, in its own process, with its memory."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = """
model: {hidden_size: 32, num_hidden_layers: 2, intermediate_size: 48, nffn_hidden_size: 40, use_chunking: true,
        shared_representation_size: 16, ema_projection_size: 4, chunk_size: 16, dropout_prob: 0.1}
"""


def run(tmp_path, *arguments):
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "launch/benchmark.py", "long", "--config", str(tmp_path / "tiny.yaml"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_memory_of_a_step_is_measured_and_limited(tmp_path):
    file = tmp_path / "long.json"
    done = run(tmp_path, "--length", "100", "--segment", "32", "--json", str(file), "--limit-gb", "0.001")
    assert done.returncode == 2 and "--limit-gb 0.001 allows no more" in done.stderr, done.stderr
    found = json.loads(file.read_text())
    assert "| peak memory of the process, GB |" in done.stdout
    assert 0 < found["before_gb"] <= found["peak_gb"] < 4 and found["gradient_norm"] > 0
    assert (found["length"], found["segment"]) == (100, 32)
    refused = run(tmp_path, "--segment", "24")
    assert refused.returncode == 2 and "multiple of model.chunk_size=16" in refused.stderr
