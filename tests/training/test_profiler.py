"""Traces of chosen steps, and what is said of memory that ran out."""

import json
from types import SimpleNamespace

import pytest
import torch

from mega_scale.config import parse
from mega_scale.training.config import ProfileConfig
from mega_scale.training.profiler import OutOfMemory, Profiler, explain_out_of_memory, ran_out, remedies

CPU = torch.device("cpu")


def run(folder, done, rank=0, **settings):
    lines = []
    profiler = Profiler(folder, ProfileConfig(**settings), rank, CPU, lines.append)
    for step in done:
        with profiler.step(step):
            torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.finish(done[-1])
    return lines


def steps_of(path):
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    return sorted({event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")})


def test_a_trace_is_json_and_holds_the_steps_that_were_asked_for(tmp_path):
    (line,) = run(tmp_path, range(1, 6), steps=[2, 3])
    trace = tmp_path / "profile/steps-2-3/rank-0.json"
    assert steps_of(trace) == ["ProfilerStep#2", "ProfilerStep#3"]
    assert line.startswith("step 3 | traces of steps 2 to 3, ranks 0: ") and str(trace.parent) in line
    before = trace.read_bytes()
    run(tmp_path, range(1, 6), steps=[2, 3])  # nothing is overwritten
    assert trace.read_bytes() == before and steps_of(trace.with_name("rank-0-2.json")) == steps_of(trace)
    assert not run(tmp_path, range(1, 6)) and not run(tmp_path, range(4, 6), steps=[2, 3])


def test_a_run_that_begins_or_ends_in_between_has_the_steps_that_it_did(tmp_path):
    (line,) = run(tmp_path, range(3, 5), steps=[2, 9])
    assert steps_of(tmp_path / "profile/steps-2-9/rank-0.json") == ["ProfilerStep#3", "ProfilerStep#4"]
    assert "steps 2 to 4" in line
    assert not (tmp_path / "other").exists()
    run(tmp_path / "other", range(1, 3), rank=1, steps=[1, 2], ranks=[0, 2])
    assert not (tmp_path / "other").exists()


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "profile").write_text("a file")
    (line,) = run(tmp_path, range(1, 4), steps=[2, 2])
    assert "the profile of rank 0 is not written: " in line


def trainer(folder, *words, engine=None):
    at = SimpleNamespace(step=7)
    world = SimpleNamespace(size=2, device=CPU)
    return SimpleNamespace(run_dir=folder, rank=1, config=parse(list(words)), watchdog=at, world=world, engine=engine)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
])  # fmt: skip
def test_memory_that_runs_out_is_told_in_a_line_with_what_held_it_and_what_lowers_it(tmp_path, error):
    weights, moments = torch.ones(1 << 20), torch.ones(1 << 21)
    held = {"weights": [weights, weights[:5]], "gradients": [], "moments": [moments]}
    engine = SimpleNamespace(held_tensors=lambda: held)
    with pytest.raises(OutOfMemory) as ended, explain_out_of_memory(trainer(tmp_path, engine=engine)):
        raise error
    line, path = str(ended.value), tmp_path / "profile/out-of-memory-rank-1.json"
    assert ended.value.code == 1 and "\n" not in line and line.startswith("rank 1 ran out of memory in step 7 (")
    assert "moments 0.01 GiB" in line and "activations and others" in line and str(path) in line
    assert "train.micro_batch_size=4, parallel.activation_checkpoint=1" in line
    report = json.loads(path.read_text())
    assert report["held_bytes"]["weights"] == weights.nbytes and report["held_bytes"]["moments"] == moments.nbytes
    assert report["step"] == 7 and len(report["largest_tensors"]) > 1


def test_other_errors_stay_what_they_are(tmp_path):
    assert not ran_out(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory(trainer(tmp_path)):
        raise RuntimeError("shape mismatch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "held", "first"),
    [
        ("train.micro_batch_size=8", {"weights": 1, "activations and others": 9}, "train.micro_batch_size=4"),
        ("train.micro_batch_size=1 parallel.activation_checkpoint=1", {"activations and others": 9},
         "parallel.activation_checkpoint_segment"),
        ("parallel.zero_stage=1", {"moments": 9, "activations and others": 1}, "parallel.zero_stage=3"),
        ("", {"moments": 9, "activations and others": 1}, "parallel.tp=2"),
        ("", {"activations and others": 1, "reserved, not in use": 9}, "PYTORCH_CUDA_ALLOC_CONF"),
    ],
)  # fmt: skip
def test_the_setting_that_is_named_first_lowers_what_holds_most(words, held, first):
    found = remedies(parse(words.split()), held, 2)
    assert found[0].startswith(first)
