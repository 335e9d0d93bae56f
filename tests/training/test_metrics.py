"""What a run reports, and the figures that it reports."""

import json
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from mega_scale.model import MegaConfig, MegaForCausalLM
from mega_scale.training.metrics import Reporter, Throughput, memory_bytes, peak_flops, training_flops_per_token

VALUES = {
    "loss": 2.5, "grad_norm": 0.25, "lr": 1e-3, "memory_bytes": 2**30, "tokens": 100, "tokens_per_second": 1234.0,
    "eta_seconds": 3725.0,
}  # fmt: skip


def test_a_step_is_one_line_with_all_its_figures(tmp_path, capsys):
    reporter = Reporter(tmp_path, rank=0, start=0, steps=300, tensorboard=False)
    reporter.step(30, VALUES)
    reporter.step(40, {**VALUES, "mfu": 0.4})
    reporter.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == ("step  30/300 | loss 2.5000 | grad 0.250 | lr 1.00e-03 | 1,234 tok/s | mem 1.00 GiB | eta 1:02:05")
    assert "mfu 40.0%" in second


def test_a_step_says_what_the_loader_reports(tmp_path, capsys):
    reporter = Reporter(tmp_path, rank=0, start=0, steps=3, tensorboard=True)
    data = {"loader_wait": 0.012, "padding": 0.25, "bad_rows/empty": 2, "bad_rows/too_long": 1}
    data |= {"tokens/code": 1200, "epochs/code": 0.5, "tokens/web": 4000}
    reporter.step(1, {**VALUES, **data})
    reporter.step(2, {**VALUES, "tokens/text": 1200, "epochs/text": 0.5})
    reporter.close()
    line, alone = capsys.readouterr().out.strip().splitlines()
    assert alone.endswith("eta 1:02:05 | epoch 0.50")
    assert line.endswith("wait 1.2% | padding 25.0% | bad rows 3 | code 0.50 epochs, 1,200 tok | web 4,000 tok")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("train/bad_rows/too_long")[0].value == 1
    assert events.Scalars("train/tokens/web")[0].value == 4000


def test_other_ranks_say_nothing(tmp_path, capsys):
    reporter = Reporter(tmp_path, rank=1, start=0, steps=3, tensorboard=True)
    reporter.step(1, VALUES)
    reporter.sample(1, "text")
    reporter.evaluation(1, {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.4, "tokens": 10})
    reporter.advance()
    reporter.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_run_killed_while_it_begins_to_resume_loses_no_line(tmp_path, monkeypatch):
    reporter = Reporter(tmp_path, rank=0, start=0, steps=4, tensorboard=False)
    for step in (1, 2, 3):
        reporter.step(step, VALUES)
    before = (tmp_path / "metrics.jsonl").read_text()

    def kill(*_):
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, kill)
        with pytest.raises(KeyboardInterrupt):
            Reporter(tmp_path, rank=0, start=2, steps=4, tensorboard=False)
        monkeypatch.undo()
        assert (tmp_path / "metrics.jsonl").read_text() == before
    Reporter(tmp_path, rank=0, start=2, steps=4, tensorboard=False).close()
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
        reporter = Reporter(tmp_path, rank=0, start=start, steps=9, tensorboard=True)
        for step in range(start + 1, start + 5 - number):
            reporter.step(step, {**VALUES, "loss": number})
        reporter.close()
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(point.step, int(point.value)) for point in points] == shown


def test_tensorboard_shows_no_point_that_a_rollback_took_back(tmp_path):
    reporter = Reporter(tmp_path, rank=0, start=0, steps=9, tensorboard=True)
    for step in (1, 2, 3, 4):
        reporter.step(step, {**VALUES, "loss": 1.0})
    reporter.rewind(2)
    reporter.step(3, {**VALUES, "loss": 2.0})
    reporter.close()
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_disk_that_is_full_from_the_start_ends_no_run(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mega_scale.training.metrics.replace_text", full)
        patched.setattr("mega_scale.training.metrics.SummaryWriter", full)
        reporter = Reporter(tmp_path, rank=0, start=2, steps=5, tensorboard=True)
    reporter.step(3, VALUES)
    reporter.close()
    assert capsys.readouterr().out.count("No space left on device") == 2


def test_resuming_supersedes_what_was_written_after_the_checkpoint(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        reporter = Reporter(tmp_path, rank=0, start=start, steps=4, tensorboard=False)
        for step in steps:
            reporter.step(step, {**VALUES, "loss": start + step})
        reporter.close()
        if start == 0:
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 4, "lo')  # killed while writing
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 5), (4, 6)]


def test_tensorboard_holds_the_same_figures(tmp_path):
    reporter = Reporter(tmp_path, rank=0, start=0, steps=4, tensorboard=True)
    reporter.step(2, VALUES)
    reporter.evaluation(2, {"loss": 1.5, "perplexity": 4.5, "bits_per_byte": 2.2, "tokens": 10})
    reporter.sample(2, "def f():\n    pass")
    reporter.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("train/loss")[0].value == 2.5 and events.Scalars("validation/bits_per_byte")[0].step == 2
    assert any("sample" in tag for tag in events.Tags()["tensors"])


def test_throughput_leaves_out_pauses():
    config = MegaConfig(is_decoder=True, bidirectional=False, use_chunking=False)
    throughput = Throughput(config, torch.device("cpu"), "bf16", ranks=2)
    assert throughput.peak is None
    throughput.peak = 1e9
    throughput.skip(-9.0)  # as if nine seconds had passed
    throughput.add(50, 0.0, 64)
    throughput.add(50, 0.0, 1024)  # longer sequences
    flops = 50 * sum(training_flops_per_token(config, length) for length in (64, 1024))
    report = throughput.report(steps_left=4)
    assert report["tokens_per_second"] == pytest.approx(100 / 9, rel=0.05)
    assert report["eta_seconds"] == pytest.approx(18, rel=0.05)
    assert report["mfu"] == pytest.approx(flops / 9 / 2e9, rel=0.05)
    throughput.add(7, 0.25, 64)
    throughput.skip(-1.0)
    report = throughput.report(0)
    assert report["tokens_per_second"] == pytest.approx(7, rel=0.05)
    assert report["loader_wait"] == pytest.approx(0.25, rel=0.05)
    assert throughput.report(0)["loader_wait"] == 0


def test_device_figures():
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert memory_bytes(torch.device("cpu")) > 10 * 2**20


def test_flops_follow_the_matrix_products():
    """Six operations per matrix weight and token, plus averages and attention."""
    config = MegaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, intermediate_size=96, nffn_hidden_size=80,
        shared_representation_size=32, ema_projection_size=4, is_decoder=True, bidirectional=False, use_chunking=True,
        chunk_size=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = MegaForCausalLM(config)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    rest = 3 * 3 * (6 * 4 * 64 + 129 * (32 + 96))
    assert training_flops_per_token(config, 1024) == 6 * weights + rest
    shorter = training_flops_per_token(config, 64)
    assert training_flops_per_token(config, 1024) - shorter == 3 * 3 * 64 * (32 + 96)
    config.bidirectional, config.is_decoder = True, False  # twice the averages, and every key of a chunk
    assert training_flops_per_token(config, 1024) == 6 * weights + 3 * 3 * (2 * 6 * 4 * 64 + 256 * (32 + 96))
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        training_flops_per_token(MegaConfig(add_cross_attention=True, is_decoder=True, bidirectional=False), 8)


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
    reporter = Reporter(tmp_path, rank=0, start=3, steps=4, tensorboard=False)
    reporter.step(4, VALUES)
    reporter.close()
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl.bad").read_bytes().strip(b"\n") == bad
    assert capsys.readouterr().out.count("cannot be read") == 1


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xef\xbb\xbf" + line(1) + b"\r\n\r\n" + line(2) + b"\r\n")
    Reporter(tmp_path, rank=0, start=2, steps=4, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == line(1) + b"\n" + line(2) + b"\n"
    assert capsys.readouterr().out == "" and not (tmp_path / "metrics.jsonl.bad").exists()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to(path)])
def test_metrics_and_events_that_cannot_be_written_end_no_run(tmp_path, capsys, make):
    make(tmp_path / "metrics.jsonl")
    (tmp_path / "tensorboard").write_text("a file")
    reporter = Reporter(tmp_path, rank=0, start=3, steps=4, tensorboard=True)
    reporter.step(4, VALUES)
    reporter.close()
    output = capsys.readouterr().out
    assert "TensorBoard events are not written" in output and "step 4/4" in output
