"""launch/benchmark.py: what it prints, what it refuses to time, and the peer in another interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TINY = ["--batch", "1", "--length", "65", "--hidden", "4", "--states", "3", "--repeats", "3", "--warmup", "1"]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("launched_benchmark", LAUNCH / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(LAUNCH / "benchmark.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


class Fixed:
    """A contender with given results and durations."""

    def __init__(self, name, results=None, durations=(), log=None):
        self.name, self.given, self.durations, self.log = name, results, iter(durations), log

    def results(self):
        return self.given

    def time(self):
        if self.log is not None:
            self.log.append(self.name)
        return next(self.durations)


def test_compares_our_implementations_without_a_peer(tmp_path):
    done = run("ema", *TINY, "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["native", "blocked", "fft"]
    assert f"torch {torch.__version__}" in done.stdout
    assert "not the residual, nor silu" in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert (
        set(report["peak_inputs"]) == {"native", "blocked", "fft"} and "Peak of extra memory, in inputs" in done.stdout
    )
    assert {name: len(times) for name, times in report["milliseconds"].items()} == {"native": 3, "blocked": 3, "fft": 3}
    assert max(report["largest_error"].values()) < 1e-4
    assert report["sizes"] == {"batch": 1, "length": 65, "hidden": 4, "states": 3}


def test_contenders_take_turns_and_warm_up_is_not_counted(benchmark):
    log = []
    contenders = [Fixed("a", durations=[90, 1, 2], log=log), Fixed("b", durations=[80, 3, 4], log=log)]
    assert benchmark.interleave(contenders, repeats=2, warmup=1) == {"a": [1, 2], "b": [3, 4]}
    assert log == ["a", "b"] * 3


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_what_is_not_correct_is_not_timed(benchmark, wrong):
    truth = {"y": torch.tensor([1.0, -2.0]), "dx": torch.tensor([3.0])}
    good = Fixed("good", {"y": torch.tensor([1.0, -2.0001]), "dx": torch.tensor([3.0])})
    bad = Fixed("bad", {"y": torch.tensor([1.0, -2.0]), "dx": torch.tensor([3.0 * wrong])})
    assert benchmark.largest_errors([good], truth)["good"] == pytest.approx(5e-5, rel=0.01)
    with pytest.raises(ValueError, match=r"bad is not timed.*dx by"):
        benchmark.largest_errors([good, bad], truth)


def test_table_gives_medians_and_ratios(benchmark):
    durations = {"ours": [1.0, 2.0, 9.0], "peer": [10.0, 11.0, 12.0]}
    rows = benchmark.table(durations, {"ours": 1e-7, "peer": 2e-7}).splitlines()
    assert rows[0] == "|  | median ms | min | max | times faster than peer | largest error |"
    assert rows[2:] == [
        "| ours | 2.000 | 1.000 | 9.000 | 5.50 | 1.0e-07 |",
        "| peer | 11.000 | 10.000 | 12.000 | 1.00 | 2.0e-07 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer-python", "/no/such/python"], "--peer-python /no/such/python cannot be started"),
        (["--peer-python", sys.executable], "the peer ended with exit status 1: ModuleNotFoundError"),
        (["--length", "0"], "0 must be at least 1"),
        (["--json", "s3://b/x.json"], "--json='s3://b/x.json': s3:// is no local path"),
    ],
)
def test_bad_arguments_end_with_one_clear_line(arguments, message):
    done = run("ema", *TINY, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_worker_that_is_killed_is_said_to_be(benchmark, tmp_path):
    code = "import os, sys; print('a warning', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    with pytest.raises(ValueError, match="exit status -9: killed, as a system does that is short of memory"):
        sys.modules["launch.worker_process"].WorkerProcess(
            [sys.executable, "-c", code], 1, (tmp_path / "errors.txt").open("w+", encoding="utf-8")
        )


@pytest.mark.peer
@pytest.mark.skipif(
    "MEGA_SCALE_PEER_PYTHON" not in os.environ, reason="MEGA_SCALE_PEER_PYTHON names no Python with transformers 4.37.2"
)
def test_the_peer_computes_the_same_and_is_timed(tmp_path):
    peer = os.environ["MEGA_SCALE_PEER_PYTHON"]
    done = run("ema", *TINY, "--peer-python", peer, "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["median_ms"]) == ["native", "blocked", "fft", "transformers 4.37.2"]
    assert report["largest_error"]["transformers 4.37.2"] < 1e-5
    assert report["versions"]["peer's transformers"] == "4.37.2"


STEP = [
    "--lengths",
    "32",
    "64",
    "--hidden",
    "32",
    "--layers",
    "1",
    "--shared",
    "8",
    "--expanded",
    "24",
    "--averages",
    "2",
]
STEP += ["--chunk", "16", "--vocabulary", "64", "--llama-expanded", "24", "--repeats", "1", "--warmup", "1"]
STEP += ["--mamba-layers", "1", "--mamba-states", "4", "--mamba-chunk", "16"]


def test_a_training_step_is_timed_beside_a_peer(tmp_path):
    plot, report = tmp_path / "out.svg", tmp_path / "out.json"
    options = ["--bf16", "--compile", "--peers", "llama", "mamba2", "--peer-longest", "32", "--plot", str(plot)]
    done = run("step", *STEP, *options, "--json", str(report))
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    rows, ours = content["rows"], ("ours", "ours bf16", "ours compiled")
    expected = [*((32, kind) for kind in (*ours, "llama", "mamba2")), *((64, kind) for kind in ours)]
    assert [(row["length"], row["kind"]) for row in rows] == expected
    assert all(row["tokens_per_s"] > 0 and (row["kind"] not in ours or row["shares"]["torch.mm"] > 0) for row in rows)
    # Peers were given one length, from which nothing follows.
    assert tuple(content["exponents"]) == ours and "Time grows as length to the power of" in done.stdout
    picture = plot.read_text()
    assert "<svg" in picture and all(f"<!-- {name} -->" in picture for name in (*ours, "transformers Llama, sdpa"))


def test_a_training_step_in_segments_is_the_same_step(tmp_path, benchmark):
    from launch.benchmark_step_worker import Trainer  # noqa: PLC0415  needs the path that benchmark.py sets

    sizes = {"vocabulary": 64, "hidden": 32, "layers": 2, "shared": 8, "expanded": 24, "averages": 2, "chunk": 16}
    sizes |= {"lengths": [64], "weights": str(tmp_path / "weights.pt")}
    whole, parts = (Trainer("ours", {**sizes, "segment": segment}).check(64) for segment in (0, 32))
    assert all(parts[name] == pytest.approx(whole[name], rel=1e-5) for name in ("loss", "norm"))


def test_growth_with_length_is_the_slope_of_logarithms(benchmark):
    exponent = sys.modules["launch.plots"].exponent
    assert exponent({1024: 3.0, 2048: 12.0, 8192: 192.0}) == pytest.approx(2)
    # Off that by factors of 1/2, 2 and 1/2 at equal distances: no tilt, as least squares have it.
    assert exponent({1: 0.5, 2: 8.0, 4: 8.0}) == pytest.approx(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "gpt"], "invalid choice: 'gpt'"),
        (["--segment", "24"], "is not a multiple of model.chunk_size=16"),
        (["--plot", "out.txt"], "--plot out.txt: choose a name that ends in .png or .svg"),
        (["--plot", "/no/such/folder/out.png"], "--plot /no/such/folder/out.png: there is no such folder"),
    ],
)
def test_steps_that_cannot_be_timed_are_refused(arguments, message):
    done = run("step", *STEP, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_picture_without_matplotlib_is_refused_before_anything_is_timed(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["step", *STEP, "--plot", "out.png"]) == 2
    assert "needs matplotlib, which is not installed: install mega_scale[plot]" in capsys.readouterr().err


def test_peak_memory_is_counted_from_when_it_is_asked_for(benchmark):
    count = sys.modules["launch.machine"].PeakMemory
    gone = torch.ones(2**24)  # 64 MiB
    del gone
    peak = count()
    assert peak.growth() < 2**20
    held = torch.ones(2**24)
    del held
    assert 2**26 <= peak.growth() + 2**20 < 2**27


@pytest.mark.peer
@pytest.mark.skipif(
    "MEGA_SCALE_PEER_PYTHON" not in os.environ, reason="MEGA_SCALE_PEER_PYTHON names no Python with transformers 4.37.2"
)
def test_the_reference_trains_the_same_model():
    peer = os.environ["MEGA_SCALE_PEER_PYTHON"]
    done = run("step", *STEP, "--peers", "--peer-python", peer)
    assert done.returncode == 0 and "transformers 4.37.2 Mega" in done.stdout, done.stderr
