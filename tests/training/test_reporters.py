"""Trackers: charts in the order in which people look at them, what tells runs apart, and runs that go on."""

import importlib
import importlib.util
import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mega_scale.training.callbacks import Callback, load_callbacks
from mega_scale.training.console import Reporters
from mega_scale.training.reporters import (
    Run,
    TensorBoard,
    Trackio,
    WeightsAndBiases,
    charts,
    find_trackers,
    last_steps,
    versions,
)

VALUES = {
    "loss": 2.5, "grad_norm": 0.25, "lr": 1e-3, "memory_bytes": 2**29, "tokens": 100, "tokens_per_second": 1234.0,
    "eta_seconds": 3725.0, "step_seconds": 0.5, "mfu": 0.4, "bad_steps": 0, "epochs/web": 0.5, "padding": 0.0,
}  # fmt: skip
EVALUATION = {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 2.9, "tokens": 10}


def test_charts_sort_into_loss_throughput_optimizer_data_and_health():
    shown = dict(charts("train", VALUES)) | dict(charts("validation", EVALUATION))
    shown |= dict(charts("validation/code", EVALUATION)) | dict(charts("bad_step", {"total": 3, "rows": [1, 2]}))
    groups = list(dict.fromkeys(name.partition("/")[0] for name in sorted(shown)))
    assert groups == ["loss", "model_throughput", "optimizer", "training_data", "training_health"]
    assert shown["loss/train"] == 2.5 and shown["loss/validation"] == shown["loss/validation/code"] == 2.0
    assert shown["training_health/memory_gib"] == 0.5 and shown["training_health/bad_steps"] == 3
    assert dict(charts("mine", {"score": 2, "name": "x", "good": True})) == {"mine/score": 2}


def run_of(folder, start=0, **facts):
    config = {"train": {"steps": 4}, "optimizer": {"lr": 0.001}}
    differing = {"optimizer.lr": 0.001, "data.path": ["a.txt"]}
    facts = {"parameters": 672_000, "layout": {"engine": "fsdp"}, "versions": versions(), **facts}
    reported = last_steps(folder) if start else {}
    return Run(folder, start, 4, start > 0, config, differing, facts, reported=reported)


def report(run, trackers, steps, loss=1.0):
    reporter = Reporters(run, trackers=trackers)
    for step in steps:
        reporter.step(step, {**VALUES, "loss": loss})
        reporter.evaluation(step, {**EVALUATION, "loss": loss})
    reporter.sample(steps[-1], "a <text>\nof two lines")
    reporter.close()


def test_tensorboard_tells_runs_apart_by_texts_and_hparams(tmp_path):
    report(run_of(tmp_path), {"TensorBoard": TensorBoard}, [1, 2])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
        if tag.endswith("text_summary")
    }
    facts = next(text for tag, text in texts.items() if tag.startswith("run/facts"))
    assert "| parameters | 672000 |" in facts and "| versions.torch |" in facts and "| layout.engine | fsdp |" in facts
    assert '"lr": 0.001' in next(text for tag, text in texts.items() if tag.startswith("run/config"))
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for key in (b"optimizer.lr", b"parameters", b"data.path", b"versions.mega_scale"):
        assert key in hparams


def test_charts_of_a_run_that_an_earlier_version_began_go_on(tmp_path):
    rows = [{"step": step, "part": "train", "loss": float(step), "lr": 0.1} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(run_of(tmp_path, start=2), {"TensorBoard": TensorBoard}, [3, 4], loss=9.0)
    report(run_of(tmp_path, start=3), {"TensorBoard": TensorBoard}, [4], loss=8.0)
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/train")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 2.0), (3, 9.0), (4, 8.0)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start, steps in ((0, [1, 2]), (1, [2, 3])):
        report(run_of(tmp_path, start), {"wandb": WeightsAndBiases}, steps)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    identities = {folder.name.rpartition("-")[2] for folder in folders}
    assert len(folders) == 2 and identities == {json.loads((tmp_path / "trackers.json").read_text())["wandb"]}
    content = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    assert b"loss/validation" in content and b"optimizer" in content


# A run that is killed in step 3, then in step 2, each time goes on from step 1, and is then done again.
LIVES = ((0, [1, 2, 3]), (1, [2]), (1, [2, 3, 4]), (0, [1]))


def test_wandb_is_told_of_a_step_once_however_often_a_run_goes_on(tmp_path, monkeypatch):
    told = []
    settings = types.SimpleNamespace(update=lambda *args, **kwargs: None)
    made = types.SimpleNamespace(
        url="here", config=settings, log=told.append, define_metric=lambda *args, **kwargs: None, finish=lambda: None
    )
    fake = types.SimpleNamespace(init=lambda **options: made, Settings=dict, Html=str)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start, steps in LIVES:
        report(run_of(tmp_path, start), {"wandb": WeightsAndBiases}, steps)
    for chart in ("loss/train", "loss/validation"):
        assert [figures["step"] for figures in told if chart in figures] == [1, 2, 3, 4, 1]
    assert [figures["step"] for figures in told if "sample" in figures] == [3, 4, 1]


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")
def test_a_resumed_run_goes_on_in_the_same_run_of_trackio(tmp_path, monkeypatch):
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "db")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "db")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    (tmp_path / "run").mkdir()
    for start, steps in LIVES[:3]:
        report(run_of(tmp_path / "run", start), {"trackio": Trackio}, steps)
    [name] = storage.get_runs("mega_scale")
    logged = storage.get_logs("mega_scale", name)
    assert [row["step"] for row in logged if "loss/train" in row] == [1, 2, 3, 4]


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_in_a_line(monkeypatch):
    with pytest.raises(ValueError, match=r"train\.trackers='wand' is not possible: choose wandb or trackio, or name"):
        find_trackers(["wand"])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ValueError, match=r"train\.trackers='wandb' .* wandb is not installed: pip install wandb"):
        find_trackers(["wandb"])


def test_classes_of_the_users_own_are_loaded_by_module_or_file(tmp_path, monkeypatch):
    source = "from mega_scale.training.callbacks import Callback\nclass Mine(Callback): ...\nclass Other: ...\n"
    (tmp_path / "own_callbacks.py").write_text(source)
    path = list(sys.path)
    (first,) = load_callbacks([f"{tmp_path}/own_callbacks.py:Mine"])
    (second,) = load_callbacks([f"{tmp_path}/own_callbacks.py:Mine"])
    assert type(first) is type(second) and isinstance(first, Callback) and sys.path == path
    monkeypatch.syspath_prepend(tmp_path)
    assert type(load_callbacks(["own_callbacks:Mine"])[0]).__name__ == "Mine"
    assert find_trackers(["own_callbacks:Other"])["own_callbacks:Other"].__name__ == "Other"
    for name, message in (
        ("own_callbacks:Nobody", "own_callbacks has no Nobody"),
        ("own_callbacks:Other", "no subclass of"),
        ("nowhere:Mine", "nowhere cannot be imported"),
        (f"{tmp_path}/none.py:Mine", "No such file"),
        ("Mine", "name a class as MODULE:CLASS"),
    ):
        with pytest.raises(ValueError, match=r"train\.callbacks=.*") as refused:
            load_callbacks([name])
        assert message in str(refused.value) and "\n" not in str(refused.value)
