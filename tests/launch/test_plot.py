"""Curves of runs, from their metrics.jsonl."""

import importlib.util
import json

import pytest
from commands import exit_code

from launch.plot import PANELS, draw, main
from mega_scale.training.reporters import read_charts


def write(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(loss, first=1, last=4):
    found = []
    for step in range(first, last + 1):
        known = {"loss": loss + step, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 9.0, "tokens": 8 * step}
        found.append({"step": step, "part": "train", "time": 3600.0 * step, **known})
    return [*found, {"step": last, "part": "validation", "time": 3600.0 * last, "loss": loss}]


def test_points_are_those_of_the_last_time_a_step_was_done(tmp_path):
    again = [{"step": 4, "part": "bad_step", "total": 1, "time": 0.0}, *rows(20.0, first=3)]
    charts = read_charts(write(tmp_path / "run", [{"step": 0, "part": "run", "time": 0.0}, *rows(10.0), *again]))
    assert [(point["step"], point["value"]) for point in charts["loss/train"]] == [(1, 11), (2, 12), (3, 23), (4, 24)]
    (point,) = charts["loss/validation"]
    assert point == {"step": 4, "value": 20.0, "tokens": 32, "hours": 4.0}
    with pytest.raises(ValueError, match="has no figures to draw"):
        read_charts(tmp_path)


def test_several_runs_share_panels_and_are_told_apart(tmp_path):
    runs = {name: read_charts(write(tmp_path / name, rows(loss))) for name, loss in (("a", 1.0), ("b", 2.0))}
    panel = draw(runs, PANELS, "tokens").axes[0]
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["a train", "a validation", "b train", "b validation"]
    lines = panel.get_lines()
    assert list(lines[0].get_xdata()) == [8, 16, 24, 32] and list(lines[2].get_ydata()) == [3, 4, 5, 6]
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()


def test_a_picture_is_written_once(tmp_path, capsys, monkeypatch):
    one, two = (write(tmp_path / name / "run", rows(1.0)) for name in ("x", "y"))
    picture = tmp_path / "curves.png"
    arguments = [one, two / "metrics.jsonl", "--output", picture, "--charts", "optimizer/lr"]
    assert exit_code(main, *arguments) == 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{picture}: x/run, y/run\n"
    for words, message in (
        (arguments, "it exists"),
        ([one, "--output", tmp_path / "a.txt"], "ends in .png"),
        ([one, "--output", tmp_path / "a.png", "--charts", "loss/nothing"], "choose among loss/train"),
        ([one, one, "--output", tmp_path / "a.png"], "given twice"),
        ([tmp_path, "--output", tmp_path / "a.png"], "no figures"),
    ):
        assert exit_code(main, *words) == 2 and message in capsys.readouterr().err
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert exit_code(main, one, "--output", tmp_path / "a.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err
