"""What a run writes beside its checkpoints, on a disk that takes nothing: said once, and the run goes on."""

import errno
import io
import json
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mega_scale import files
from mega_scale.training.console import Reporters
from mega_scale.training.reporters import Run, TensorBoard
from mega_scale.training.stopping import RunStatus

VALUES = {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.4, "tokens": 10}


class FullDisk(io.FileIO):
    """A file with room for ten more bytes."""

    room = 10

    def write(self, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(data[: self.room])
        self.room -= taken
        return taken


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    files.append_line(path, "the first")
    with monkeypatch.context() as patched:
        patched.setattr(files, "open", lambda path, mode, buffering: FullDisk(path, "a"), raising=False)
        with pytest.raises(OSError, match="No space left"):
            files.append_line(path, "the second, for which there is no room")
    files.append_line(path, "the third")
    assert path.read_text().splitlines() == ["the first", "the third"]


def test_metrics_that_cannot_be_written_are_reported_once_and_written_later(tmp_path, monkeypatch, capsys):
    reporter = Reporters(Run(tmp_path, steps=5), trackers={"TensorBoard": TensorBoard})

    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr("mega_scale.training.reporters.append_line", fail)
        patched.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
        reporter.evaluation(1, VALUES)
        reporter.evaluation(2, VALUES)
    reporter.evaluation(3, VALUES)
    reporter.close()
    output = capsys.readouterr().out
    for name in ("metrics.jsonl", "TensorBoard"):
        assert output.count(f"step 1 | {name} is not written: Read-only file system") == 1
        assert output.count(f"step 3 | {name} is written again: 2 reports came late") == 1
    assert output.count("is not written") == 2
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("loss/validation")] == [1, 2, 3]


def test_a_status_that_cannot_be_written_hides_no_reason(tmp_path, capsys):
    RunStatus(tmp_path / "gone", 0).write("failed", 3, "the reason")
    assert "status.json is not written: No such file or directory" in capsys.readouterr().err
