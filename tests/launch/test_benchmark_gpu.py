"""The benchmarks of a GPU, as far as a machine without one can tell: refusals, and the table of training steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from launch import benchmark, benchmark_mfu  # noqa: E402

_ROW = {"kind": "ours", "length": 4096, "recompute": 2, "batch": 8, "median_ms": 1000.0, "peak_gb": 40.0}
_ROWS = [
    {**_ROW, "flops_per_token": 9e9, "parameters": 1.38e9},
    {"kind": "ours", "length": 131072, "recompute": 1, "out_of_memory": True},
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["bandwidth", "mfu"])
def test_without_a_gpu_they_end_with_one_clear_line(command):
    done = subprocess.run(
        [sys.executable, "launch/benchmark.py", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: benchmark.py {command} measures a GPU, and PyTorch sees none: run it where there is one\n"
    )


@pytest.fixture
def mfu(monkeypatch, tmp_path):
    """Runs the sub-command with a worker that says what `_ROWS` say, and a GPU of 800 TFLOP/s."""
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(benchmark_mfu, "_WORKER", worker)
    monkeypatch.setattr(benchmark_mfu, "require_gpu", lambda command: None)
    monkeypatch.setattr(benchmark_mfu, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(benchmark_mfu, "matmul_flops", lambda: 8e14)
    monkeypatch.setattr(benchmark_mfu, "peak_flops", lambda device, dtype: 1e15)

    def run(*arguments, status=0):
        lines = "\n".join(f"print({json.dumps(row)!r})" for row in _ROWS)
        worker.write_text(f"import sys\n{lines}\nsys.exit({status})\n", encoding="utf-8")
        args = benchmark.parser().parse_args(
            ["mfu", "--peers", "--lengths", "4096", "131072", "--segment", "0", "0", *arguments]
        )
        args.run(args)

    return run


def test_mfu_is_model_operations_over_the_peak_and_lost_lengths_are_named(mfu, capsys, tmp_path):
    mfu("--recompute", "2", "1", "--json", str(tmp_path / "rows.json"))
    told = capsys.readouterr()
    # 32,768 tokens of 9 GFLOP in a second
    assert "| 4,096 | 8 | ours (1.38B) | 1,000.0 | 32,768 | 0.295 | 0.369 | 40.0 | every 2nd block |" in told.out
    assert "| 131,072 |  | ours | out of memory |  |  |  |  | every block |" in told.out
    assert told.err.count("\n") == len(_ROWS)  # each as soon as it was there
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"][0]["mfu"] == pytest.approx(0.294912)


def test_a_contender_that_fails_is_named(mfu):
    with pytest.raises(ValueError, match="ours ended with exit status 3 after 2 lengths"):
        mfu("--recompute", "2", "1", status=3)


def test_options_a_length_have_as_many_values_as_there_are_lengths(mfu):
    with pytest.raises(ValueError, match="--recompute has 1 values for 2 --lengths"):
        mfu("--recompute", "2")
