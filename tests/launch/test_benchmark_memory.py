"""The `memory` sub-command of launch/benchmark.py: what it counts, what it reports, and what it refuses."""

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--hidden", "8", "--layers", "1", "--shared", "4", "--values", "8", "--states", "2", "--vocabulary", "300"]
TINY = [*SIZES, "--chunk", "64"]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("launched_benchmark_for_memory", ROOT / "launch/benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ours(benchmark):
    return sys.modules["launch.benchmark_memory"]


@pytest.mark.launch
def test_two_ranks_compute_the_same_and_each_keeps_half(tmp_path):
    # 3,900 tokens fill 62 chunks but for some padding.
    options = [*TINY, "--lengths", "3900", "--sp", "1", "2", "--json", str(tmp_path / "out.json")]
    command = [sys.executable, str(ROOT / "launch/benchmark.py"), "memory", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["benchmark"] == "memory" and report["largest_error"] < 1e-5
    assert report["sizes"]["chunk"] == 64 and report["sizes"]["engine"] == "fsdp"
    alone, shared = report["rows"]
    assert [alone["sp"], alone["tokens_per_rank"]] == [1, 3900]
    assert [shared["sp"], shared["tokens_per_rank"]] == [2, 31 * 64]
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert shared["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-5)
    assert len(shared["saved_bytes"]) == len(shared["peak_growth_bytes"]) == 2
    for saved in shared["saved_bytes"]:
        assert alone["saved_bytes"][0] / saved == pytest.approx(2, rel=0.05)
    # A block keeps more than 16 times its input of 8 channels; logits, 3,900 x 300 numbers, are not kept.
    assert alone["peak_growth_bytes"][0] > alone["saved_bytes"][0] > 4 * 3900 * 16 * 8
    assert alone["saved_bytes"][0] < 4 * 3900 * 300
    assert f"torch {torch.__version__}" in done.stdout and "Machine: " in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[2].startswith("| 3,900 | 1 | 3,900 |") and rows[3].startswith("| 3,900 | 2 | 1,984 |")


@pytest.mark.launch
def test_a_rank_that_fails_says_why_and_ends_the_others(benchmark, ours, monkeypatch):
    monkeypatch.setattr(ours, "_LET_OTHERS_END_S", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        args = benchmark.parser().parse_args(["memory", *TINY, "--port", str(port)])
        with pytest.raises(ValueError, match=rf"^rank 0 of --sp 2 at --lengths 128 ended with status 75.*:{port} .*\Z"):
            ours.measure(args, length=128, sp=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "128", "--sp", "4"], "--sp 4 is too much for --lengths 128 .* use --sp 2, or --lengths 256"),
        (["--lengths", "300", "--sp", "4"], "--sp 4 is too much for --lengths 300 .* use --sp 3, or --lengths 512"),
        (["--activation-checkpoint", "-1"], "--activation-checkpoint -1 is negative"),
        (["--port", "70000"], "--port 70000 is no port"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(benchmark, ours, capsys, monkeypatch, options, message):
    monkeypatch.setattr(ours, "measure", None)  # nothing starts
    assert benchmark.main(["memory", *TINY, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)


@pytest.mark.parametrize("wrong", [{"loss": 5.0001}, {"gradient_norm": float("nan")}])
def test_what_differs_from_one_process_is_not_reported(benchmark, ours, capsys, monkeypatch, wrong):
    def measure(args, length, sp):
        needs = ours.Needs(loss=5.0, gradient_norm=1.0, saved=1, growth=1)
        return ours.Row(length, sp, length // sp, [needs if sp == 1 else needs._replace(**wrong)] * sp, 0.0)

    monkeypatch.setattr(ours, "measure", measure)
    assert benchmark.main(["memory", "--sp", "2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nothing is reported: 65536 tokens on 2 ranks" in captured.err
    assert next(iter(wrong)).replace("_", " ") in captured.err


def test_table_shows_the_neediest_rank_against_one_process(ours):
    mib = 2**20
    one = ours.Row(4096, 1, 4096, [ours.Needs(5.0, 1.0, 8 * mib, 10 * mib)], 1.0)
    two = ours.Row(4096, 2, 2048, [ours.Needs(5.0, 1.0, 3 * mib, 5 * mib), ours.Needs(5.0, 1.0, 4 * mib, mib)], 1.0)
    assert ours.table([one, two]).splitlines()[2:] == [
        "| 4,096 | 1 | 4,096 | 8.0 | 1.000 | 10.0 | 1.000 | 5.000000 |",
        "| 4,096 | 2 | 2,048 | 4.0 | 0.500 | 5.0 | 0.500 | 5.000000 |",
    ]


def test_each_kept_storage_counts_once_and_parameters_do_not(ours):
    model = nn.Linear(10, 10, bias=False)
    x = torch.randn(7, 10, requires_grad=True)
    with ours.KeptBytes(model) as kept:
        y = model(x)  # keeps x, which was there before, and the weight
        z = y.view(70)[:5] * y.view(70)[5:10]  # keeps two views of y
        loss = z.sum()
    del y, z
    assert kept.total() == 7 * 10 * 4 + 4  # y, and the loss itself
    loss.backward()
    del loss
    assert x.grad is not None
    assert kept.total() == 0  # x.grad was not made within the statement


def test_what_is_kept_within_other_hooks_counts(ours):
    x = torch.randn(8, requires_grad=True)
    with ours.KeptBytes(nn.Module()) as kept, torch.autograd.graph.saved_tensors_hooks(torch.neg, torch.neg):
        loss = (x * 2).sigmoid().sum()
    assert kept.total() == 8 * 4 + 4  # the negative of the result, and the loss
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * torch.sigmoid(2 * x) * (1 - torch.sigmoid(2 * x)))
