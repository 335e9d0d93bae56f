"""What the benchmarks share: how they start, what they refuse, how they take turns, and how their workers end."""

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from commands import exit_code
from launching import ROOT

from launch.benchmark import harness, memory, step
from launch.benchmark.__main__ import main, parse
from mega_scale.process import PEER_LOST


@pytest.mark.slow
def test_they_start_from_any_folder_and_write_what_they_print(tmp_path):
    command = [sys.executable, str(ROOT / "launch/benchmark"), "checkpoint", "--megabytes", "1", "--repeats", "1"]
    command += ["--warmup", "0", "--json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["benchmark"] == "checkpoint" and report["options"]["megabytes"] == 1
    assert report["versions"]["torch"] == torch.__version__ and report["hardware"] in done.stdout
    assert len(report["rows"]) == 6 and all(row["times"][0] > 0 for row in report["rows"])
    assert all(row["name"] in done.stdout for row in report["rows"])


STEP = ["--hidden", "32", "--states", "2", "--chunk", "16"]
MEMORY = ["--chunk", "64", "--lengths"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ema", "--length", "0"], "0 must be at least 1"),
        (["ema", "--json", "s3://b/x.json"], "--json='s3://b/x.json': s3:// is no local path"),
        (["ema", "--peer-python", "/no/such/python"], "--peer-python /no/such/python cannot be started: No such file"),
        (["step", *STEP, "--peers", "gpt"], "invalid choice: 'gpt'"),
        (["step", *STEP, "--segment", "24"], "is not a multiple of model.chunk_size=16"),
        (["step", *STEP, "--plot", "out.txt"], "--plot out.txt: choose a name that ends in .png or .svg"),
        (["step", *STEP, "--plot", "/no/folder/out.png"], "--plot /no/folder/out.png: there is no such folder"),
        (["decode", "--tokens", "100"], "unrecognized arguments: --tokens 100"),
        (["decode", "--chunk", "8", "--contexts", "4", "32"], "must exceed 4"),
        (["decode", "--contexts", "640"], "--peer-context 2048 is not among --contexts [640]"),
        (["memory", *MEMORY, "128", "--sp", "4"], "--lengths 128 with --chunk 64: the last rank's whole chunks"),
        (["memory", *MEMORY, "300", "--sp", "4"], "use --sp 3, or --lengths 512"),
        (["memory", "--activation-checkpoint", "-1"], "-1 must be at least 0"),
        (["bandwidth"], "bandwidth measures a GPU, and PyTorch sees none"),
        (["mfu"], "mfu measures a GPU, and PyTorch sees none"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line_before_anything_is(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exit_code(main, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_without_matplotlib_is_refused(monkeypatch):
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs matplotlib, which is not installed: install mega_scale\[plot\]"):
        step.check_plot("out.png")


def test_rows_have_medians_and_ratios_of_the_same_turns():
    slow, fast = harness.timed_rows({"slow": [4.0, 40.0, 6.0], "fast": [2.0, 10.0, 2.0]}, beside="fast")
    assert (slow["median"], slow["least"], slow["greatest"], slow["ratio"]) == (6.0, 4.0, 40.0, 3.0)
    assert (fast["name"], fast["ratio"]) == ("fast", 1.0)


def test_a_report_has_a_cell_where_there_is_a_figure(capsys):
    args = argparse.Namespace(command="it", run=None, json=None, threads=1, length=8, seed=None)
    harness.report(args, {"": "{name}", "ms": "{ms:.1f}"}, [{"name": "a", "ms": 2}, {"name": "b"}], "a note")
    machine, options, table, note = capsys.readouterr().out.strip().split("\n\n")
    assert harness.hardware() in machine and options == "it: threads 1, length 8" and note == "a note"
    assert table.splitlines() == ["|  | ms |", "| --- | --- |", "| a | 2.0 |", "| b |  |"]


def test_contenders_take_turns_and_warm_up_is_not_counted():
    log = []
    durations = {"a": iter([90, 1, 2]), "b": iter([80, 3, 4])}
    contenders = {name: lambda name=name: (log.append(name), next(durations[name]))[1] for name in durations}
    assert harness.in_turns(contenders, repeats=2, warmup=1) == {"a": [1, 2], "b": [3, 4]}
    assert log == ["a", "b"] * 3


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_what_is_not_correct_is_not_reported(wrong):
    truth = {"y": torch.tensor([1.0, -2.0]), "loss": 3.0}
    good = {"y": torch.tensor([1.0, -2.0001]), "loss": 3.0, "more": 1.0}
    assert harness.compare("good", good, truth, 1e-4) == pytest.approx(5e-5, rel=0.01)
    with pytest.raises(ValueError, match=r"bad is not reported: it is wrong in loss by .*; 1e-04 is allowed"):
        harness.compare("bad", {**good, "loss": 3.0 * wrong}, truth, 1e-4)


@pytest.mark.slow
def test_a_peer_that_cannot_import_its_library_says_so(tmp_path):
    arguments = {"problem": str(tmp_path / "none.safetensors")}
    with (
        harness.worker("peers:PeerEma", arguments, name="the peer") as call,
        pytest.raises(ValueError, match=r"the peer ended with exit status 1: ModuleNotFoundError: .*\.mega"),
    ):
        call("time")


def test_a_worker_that_is_killed_is_said_to_be(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho a warning >&2\nkill -9 $$\n")
    script.chmod(0o755)
    with (
        harness.worker("", name="it", python=str(script)) as call,
        pytest.raises(ValueError, match="it ended with exit status -9: killed, as a system does that is"),
    ):
        call("time")


def test_the_rank_that_failed_is_named_not_those_that_lost_it(monkeypatch):
    def fail(status):
        raise ValueError(f"ended with {status}") from subprocess.CalledProcessError(status, "it")

    statuses = iter([PEER_LOST, 1, PEER_LOST])
    monkeypatch.setattr(harness, "worker", lambda *_, **__: nullcontext(lambda *_: fail(next(statuses))))
    with pytest.raises(ValueError, match="ended with 1"):
        memory.measure(parse(["memory"]), length=1, sp=3)


def test_peak_memory_is_counted_from_when_it_is_asked_for():
    gone = torch.ones(2**26)  # 256 MiB, more than a heap keeps
    del gone
    growth = harness.watch_peak()
    assert growth() < 2**20
    held = torch.ones(2**26)
    del held
    assert 2**28 <= growth() + 2**20 < 2**29


def test_growth_with_length_is_the_slope_of_logarithms():
    assert step.exponent({1024: 3.0, 2048: 12.0, 8192: 192.0}) == pytest.approx(2)
    # Off that by factors of 1/2, 2 and 1/2 at equal distances: no tilt, as least squares have it.
    assert step.exponent({1: 0.5, 2: 8.0, 4: 8.0}) == pytest.approx(2)


def test_a_picture_shows_every_contender(tmp_path):
    row = {"median": 4e5, "least": 3e5, "greatest": 5e5}
    rates = {"ours": {32: row, 64: row}, "transformers Llama, sdpa": {32: row}}
    step.plot_costs(str(tmp_path / "out.svg"), rates, "title")
    picture = (tmp_path / "out.svg").read_text()
    assert "<svg" in picture and all(f"<!-- {name} -->" in picture for name in rates)


peer = pytest.mark.skipif(
    "MEGA_SCALE_PEER_PYTHON" not in os.environ, reason="MEGA_SCALE_PEER_PYTHON names no Python with transformers 4.37.2"
)


@pytest.mark.slow
@pytest.mark.peer
@peer
@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["ema", "--length", "65", "--hidden", "4", "--states", "3", "--repeats", "1"], "| transformers 4.37.2 |"),
        (
            ["step", *STEP, "--lengths", "32", "--layers", "1", "--shared", "8", "--values", "24", "--peers"],
            "| 32 | transformers 4.37.2 Mega",
        ),
        (
            ["decode", "--contexts", "32", "--peer-context", "32", "--chunk", "8", "--hidden", "64", "--repeats", "1"],
            "Mega, unchunked (transformers 4.37.2) at 32",
        ),
    ],
)
def test_the_reference_computes_the_same_and_is_timed(arguments, found, capsys):
    main([*arguments, "--peer-python", os.environ["MEGA_SCALE_PEER_PYTHON"]])
    assert found in capsys.readouterr().out
