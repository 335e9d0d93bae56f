"""What a run reports: to the console, to metrics.jsonl, to TensorBoard and to other trackers."""

import json
import os
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from mega_scale.training.console import Reporters
from mega_scale.training.reporters import Run, TensorBoard


def reporters(folder, rank=0, start=0, steps=4, tensorboard=False, **trackers):
    """Those of a run that begins, or goes on at a step."""
    trackers = {"TensorBoard": TensorBoard, **trackers} if tensorboard else trackers
    return Reporters(Run(folder, start, steps, resumed=start > 0), rank, trackers)


VALUES = {
    "loss": 2.5, "grad_norm": 0.25, "lr": 1e-3, "memory_bytes": 2**30, "tokens": 100, "tokens_per_second": 1234.0,
    "eta_seconds": 3725.0,
}  # fmt: skip


def test_a_step_is_one_line_with_all_its_figures(tmp_path, capsys):
    reporter = reporters(tmp_path, rank=0, start=0, steps=300, tensorboard=False)
    reporter.step(30, VALUES)
    reporter.step(40, {**VALUES, "mfu": 0.4})
    reporter.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == ("step  30/300 | loss 2.5000 | grad 0.250 | lr 1.00e-03 | 1,234 tok/s | mem 1.00 GiB | eta 1:02:05")
    assert "mfu 40.0%" in second


def test_a_step_says_what_the_loader_reports(tmp_path, capsys):
    reporter = reporters(tmp_path, rank=0, start=0, steps=3, tensorboard=True)
    data = {"loader_wait": 0.012, "padding": 0.25, "bad_rows/empty": 2, "bad_rows/too_long": 1}
    data |= {"tokens/code": 1200, "epochs/code": 0.5, "tokens/web": 4000}
    reporter.step(1, {**VALUES, **data})
    reporter.step(2, {**VALUES, "tokens/text": 1200, "epochs/text": 0.5})
    reporter.close()
    line, alone = capsys.readouterr().out.strip().splitlines()
    assert alone.endswith("eta 1:02:05 | epoch 0.50")
    assert line.endswith("wait 1.2% | padding 25.0% | bad rows 3 | code 0.50 epochs, 1,200 tok | web 4,000 tok")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("training_data/bad_rows/too_long")[0].value == 1
    assert events.Scalars("training_data/tokens/web")[0].value == 4000


def test_other_ranks_say_nothing(tmp_path, capsys):
    reporter = reporters(tmp_path, rank=1, start=0, steps=3, tensorboard=True)
    reporter.step(1, VALUES)
    reporter.sample(1, "text")
    reporter.evaluation(1, {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.4, "tokens": 10})
    reporter.advance()
    reporter.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_run_killed_while_it_begins_to_resume_loses_no_line(tmp_path, monkeypatch):
    reporter = reporters(tmp_path, rank=0, start=0, steps=4, tensorboard=False)
    for step in (1, 2, 3):
        reporter.step(step, VALUES)
    before = (tmp_path / "metrics.jsonl").read_text()

    def kill(*_):
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, kill)
        with pytest.raises(KeyboardInterrupt):
            reporters(tmp_path, rank=0, start=2, steps=4, tensorboard=False)
        monkeypatch.undo()
        assert (tmp_path / "metrics.jsonl").read_text() == before
    reporters(tmp_path, rank=0, start=2, steps=4, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before.splitlines(keepends=True)[:2])


@pytest.mark.parametrize(
    "starts,shown",
    [
        ((0, 0), [(1, 1), (2, 1), (3, 1)]),
        ((0, 2), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]),
        ((2, 0), [(1, 1), (2, 1), (3, 1)]),
        ((0, 2, 1), [(1, 0), (2, 2), (3, 2)]),
    ],
)
def test_tensorboard_shows_no_point_of_a_run_that_was_superseded(tmp_path, starts, shown, monkeypatch):
    # Files of the same second are in the order of their names, in which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for number, start in enumerate(starts):
        reporter = reporters(tmp_path, rank=0, start=start, steps=9, tensorboard=True)
        for step in range(start + 1, start + 5 - number):
            reporter.step(step, {**VALUES, "loss": number})
        reporter.close()
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/train")
    assert [(point.step, int(point.value)) for point in points] == shown


def test_tensorboard_shows_no_point_that_a_rollback_took_back(tmp_path):
    reporter = reporters(tmp_path, rank=0, start=0, steps=9, tensorboard=True)
    for step in (1, 2, 3, 4):
        reporter.step(step, {**VALUES, "loss": 1.0})
    reporter.rewind(2)
    reporter.step(3, {**VALUES, "loss": 2.0})
    reporter.close()
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/train")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_disk_that_is_full_from_the_start_ends_no_run(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mega_scale.training.reporters.replace_text", full)
        patched.setattr("torch.utils.tensorboard.SummaryWriter", full)
        reporter = reporters(tmp_path, rank=0, start=2, steps=5, tensorboard=True)
    reporter.step(3, VALUES)
    reporter.close()
    assert capsys.readouterr().out.count("No space left on device") == 2


def test_resuming_supersedes_what_was_written_after_the_checkpoint(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        reporter = reporters(tmp_path, rank=0, start=start, steps=4, tensorboard=False)
        for step in steps:
            reporter.step(step, {**VALUES, "loss": start + step})
        reporter.close()
        if start == 0:
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 4, "lo')  # killed while writing
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 5), (4, 6)]


def test_tensorboard_holds_the_same_figures(tmp_path):
    reporter = reporters(tmp_path, rank=0, start=0, steps=4, tensorboard=True)
    reporter.step(2, VALUES)
    reporter.evaluation(2, {"loss": 1.5, "perplexity": 4.5, "bits_per_byte": 2.2, "tokens": 10})
    reporter.sample(2, "def f():\n    pass")
    reporter.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss/train")[0].value == 2.5 and events.Scalars("loss/validation_bits_per_byte")[0].step == 2
    assert any("sample" in tag for tag in events.Tags()["tensors"])


def line(step):
    return json.dumps({"step": step, "part": "train", "loss": 2.5}).encode()


BAD_LINES = {
    "a byte that is not UTF-8": b'{"step": 2, "part": "tr\xffain"}',
    "a step that is no number": b'{"step": "two", "part": "train"}',
    "a step that is none": b'{"step": null}',
    "a step that is a list": b'{"step": [2]}',
    "a step of NaN": b'{"step": NaN}',
    "a step of true": b'{"step": true}',
    "no object": b"3",
    "null bytes": bytes(100),
    "a huge line": b'{"step": 2, "text": "' + b"x" * 3_000_000 + b'"}',
    "deep nesting": b'{"step": ' + b"[" * 100_000,
    "a number of many digits": b'{"step": ' + b"9" * 10_000 + b"}",
    "half a line": b'{"step": 2, "part"',
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("at", ["middle", "end"])
def test_a_line_that_cannot_be_read_is_kept_aside_and_the_run_goes_on(tmp_path, capsys, name, at):
    path, bad = tmp_path / "metrics.jsonl", BAD_LINES[name]
    rest = [line(2), line(3), line(9)]
    lines = [line(1), bad, *rest] if at == "middle" else [line(1), *rest, bad]
    path.write_bytes(b"\n".join(lines) + (b"\n" if at == "middle" else b""))
    reporter = reporters(tmp_path, rank=0, start=3, steps=4, tensorboard=False)
    reporter.step(4, VALUES)
    reporter.close()
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl.bad").read_bytes().strip(b"\n") == bad
    assert capsys.readouterr().out.count("cannot be read") == 1


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xef\xbb\xbf" + line(1) + b"\r\n\r\n" + line(2) + b"\r\n")
    reporters(tmp_path, rank=0, start=2, steps=4, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == line(1) + b"\n" + line(2) + b"\n"
    assert capsys.readouterr().out == "" and not (tmp_path / "metrics.jsonl.bad").exists()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to(path)])
def test_metrics_and_events_that_cannot_be_written_end_no_run(tmp_path, capsys, make):
    make(tmp_path / "metrics.jsonl")
    (tmp_path / "tensorboard").write_text("a file")
    reporter = reporters(tmp_path, rank=0, start=3, steps=4, tensorboard=True)
    reporter.step(4, VALUES)
    reporter.close()
    output = capsys.readouterr().out
    assert "TensorBoard is not written" in output and "step 4/4" in output


def test_a_row_has_its_time_and_the_first_one_describes_the_run(tmp_path):
    run = Run(tmp_path, facts={"parameters": 7, "versions": {"torch": "2"}})
    reporter = Reporters(run)
    assert not (tmp_path / "metrics.jsonl").read_text()  # a run that reports nothing leaves no run behind
    before = time.time()
    reporter.step(1, VALUES)
    reporter.close()
    first, row = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["part"] == "run" and first["parameters"] == 7 and first["versions"] == {"torch": "2"}
    assert before - 0.001 <= row["time"] <= time.time() + 0.001 and row["part"] == "train"


class Kept:
    """A tracker that keeps what it is given, and fails when it is told to."""

    def __init__(self, run):
        self.calls, self.fails = [], False

    def __getattr__(self, name):
        def take(*arguments):
            if self.fails:
                raise ConnectionError("no route to host")
            self.calls.append((name, *arguments[:2]))

        return take


def test_a_tracker_that_fails_ends_no_run_and_misses_nothing(tmp_path, capsys):
    kept = Kept(None)
    reporter = reporters(tmp_path, mine=lambda run: kept, broken=lambda run: 1 / 0)
    reporter.step(1, VALUES)
    kept.fails = True
    reporter.step(2, VALUES)
    reporter.sample(2, "text")
    reporter.step(3, VALUES)
    kept.fails = False
    reporter.rewind(1)
    reporter.values(2, "mine", {"score": 1.0})
    reporter.close()
    expected = [("log", 1, "train"), ("log", 2, "train"), ("text", 2, "sample"), ("log", 3, "train"), ("rewind", 1)]
    assert kept.calls == [*expected, ("log", 2, "mine"), ("close",)]
    output = capsys.readouterr().out
    assert output.count("broken is not written, the run goes on without it: ZeroDivisionError") == 1
    assert output.count("mine is not written") == output.count("mine is written again: 3 reports came late") == 1
    reporter = reporters(tmp_path, mine=lambda run: kept)
    kept.fails = True
    reporter.step(1, VALUES)
    reporter.step(2, VALUES)
    reporter.close()
    assert "mine lacks the last 2 reports" in capsys.readouterr().out


def test_progress_is_told_where_something_takes_long(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mega_scale.training.console.time.monotonic", lambda: now[0])
    reporter = reporters(tmp_path)
    for batch in range(1, 61):
        now[0] += 1.0
        reporter.progress(5, "evaluating", batch, 60, "batches", since=0.0)
    reporter.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 5 | evaluating: 21 of 60 batches, 21 s so far" and "42 of 60" in second
