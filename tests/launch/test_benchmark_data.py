"""The `loader` and `prepare` sub-commands of launch/benchmark.py report what they measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.launch, pytest.mark.slow]


def run(folder: Path, *arguments: str) -> tuple[str, dict]:
    command = [sys.executable, str(ROOT / "launch/benchmark.py"), *arguments, "--json", str(folder / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_loader_is_fast_and_its_memory_does_not_grow_with_the_file(tmp_path):
    output, report = run(tmp_path, "loader", "--megabytes", "10", "5000", "--steps", "300")
    small, large = report["readings"]
    assert (small["megabytes"], large["megabytes"]) == (10, 5000)
    assert large["memory"] - small["memory"] < 50 * 2**20
    # A fifth of what an idle core does, so that a busy one passes.
    assert min(small["tokens_per_second"], large["tokens_per_second"]) > 2e6
    assert output.count("| 5000 |") == 1


def test_prepare_is_compared_and_survives_a_kill(tmp_path):
    output, report = run(tmp_path, "prepare", "--megabytes", "2", "--shard-mb", "1", "--vocab-size", "300")
    assert report["equal"] and report["bytes"] >= 2e6
    assert [len(times) for times in report["seconds"].values()] == [1, 1]
    assert "files equal to the byte: True" in output
