"""`launch/benchmark accept`: its stages at the size of a CPU, and what happens to one that fails or hangs."""

import json
import time

import pytest

from launch.benchmark import accept
from launch.benchmark.__main__ import main


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("stage", ["facts", "average", "step_eager", "staging", "fp8"])
def test_a_stage_finds_facts_at_a_tiny_size(stage, capsys):
    main(["accept", "--device", "cpu", "--stage", stage])
    found = lines(capsys)
    assert found and all(value is None or value for line in found for value in line.values())
    wanted = {"facts": "launch_us", "average": "of_copy_backward", "step_eager": "loss", "staging": "seconds",
              "fp8": "TFLOP_s"}  # fmt: skip
    assert found[-1][wanted[stage]] > 0


@pytest.mark.slow
def test_stages_that_fail_or_hang_cost_their_limit_and_no_more(monkeypatch, tmp_path, capsys):
    """The first ends, the second finds no configuration, the third is too slow, and for the last there is no time."""
    for name, limit in (("staging", 60), ("step_eager", 60), ("facts", 1), ("average", 9)):
        monkeypatch.setitem(accept.STAGES, name, (limit, accept.STAGES[name][1]))
    began, file = time.monotonic(), tmp_path / "lines.jsonl"
    words = [
        "--stages",
        "staging",
        "step_eager",
        "facts",
        "--config",
        str(tmp_path / "none.yaml"),
        "--lines",
        str(file),
    ]
    with pytest.raises(ValueError, match=r"did not pass: step_eager, facts;"):
        main(["accept", "--device", "cpu", *words])
    assert time.monotonic() - began < 150
    found = lines(capsys)
    assert found == [json.loads(line) for line in file.read_text().splitlines()]
    summary = found[-1]["summary"]
    assert summary["staging"]["outcome"] == "passed" and "exit status" in summary["step_eager"]["outcome"]
    assert "more than 1 s" in summary["facts"]["outcome"]
    assert any("none.yaml" in line.get("error", "") for line in found)
    with pytest.raises(ValueError, match="did not pass: average"):
        main(["accept", "--device", "cpu", "--stages", "average", "--minutes", "0"])
    assert lines(capsys)[-1]["summary"]["average"]["outcome"] == "no time left"


def test_what_cannot_run_is_refused(capsys):
    with pytest.raises(ValueError, match=r"--stages walk is unknown: choose of facts, kernels"):
        main(["accept", "--stages", "walk"])
    with pytest.raises(ValueError, match="accept measures a GPU, and PyTorch sees none"):
        main(["accept"])
    main(["accept", "--list"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(accept.STAGES) and all(len(line) > 30 for line in printed)
    main(["accept", "--gpus", "2", "--list"])
    assert capsys.readouterr().out.count(" s  ") == len(accept.PAIRS)
    with pytest.raises(ValueError, match=r"--stages facts is unknown: choose of lost, layouts"):
        main(["accept", "--gpus", "2", "--stages", "facts"])
