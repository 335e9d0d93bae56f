"""launch/pretrain.py with rows or channels cut over ranks: equal losses, exact resume, exports, new starts."""

import json
import re

import pytest
import torch
from launching import LAUNCHERS, ROOT, TINY, metrics, pretrain, pretrain_until, start
from transformers import AutoModelForCausalLM

from mega_scale.checkpoint.state import open_weights

pytestmark = [pytest.mark.launch, pytest.mark.slow]

STEPS = 12


def settings(text_file, *changes):
    common = ["data.source=json", f"data.path={text_file}", "data.validation_fraction=0.2", "model.vocab_size=260"]
    # Dropout is on: what is dropped does not depend on the layout.
    common += [f"train.steps={STEPS}", "checkpoint.every=6", "train.sample_every=6"]
    return [*common, "parallel.activation_checkpoint=1", "optimizer.eps=1e-6", *changes]


def assert_same_run(run_dir, expected, steps=range(1, STEPS + 1), rel=1e-5):
    got, want = metrics(run_dir), metrics(expected)
    for step in steps:
        for key in ("loss", "grad_norm", "tokens"):
            assert got[step][key] == pytest.approx(want[step][key], rel=rel), (step, key)


def one_layout(engine, axis, run_dir, text_file):
    output = pretrain(
        "two forked", run_dir, *settings(text_file), f"parallel.engine={engine}", f"parallel.{axis}=2",
        "parallel.self_test=true",
    )  # fmt: skip
    assert "self-test: loss and" in output
    assert f" {axis} 2" in output and re.search(r"gradients and moments of [\d.]+K parameters", output)
    return output


def test_sequence_parallel_zero3_equals_tensor_parallel_fsdp(tmp_path, text_file):
    """Two layouts, two engines: the same losses, validation and samples, with dropout.

    Under launchers they are in test_packed_runs.py (tp) and test_two_hosts.py (sp).
    """
    text = []
    for engine, axis in (("deepspeed", "sp"), ("fsdp", "tp")):
        output = one_layout(engine, axis, tmp_path / axis, text_file)
        text.append([line for line in output.splitlines() if "sample:" in line])
    assert len(text[0]) == 2 and text[0] == text[1]
    assert_same_run(tmp_path / "sp", tmp_path / "tp")
    validation = [metrics(tmp_path / name, "validation")[STEPS] for name in ("sp", "tp")]
    assert validation[0]["loss"] == pytest.approx(validation[1]["loss"], rel=1e-5)
    assert validation[0]["tokens"] == validation[1]["tokens"]


def test_a_tensor_parallel_zero3_run_killed_half_way_goes_on_bit_for_bit(tmp_path, text_file):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    common = [*settings(text_file), "parallel.engine=deepspeed", "parallel.tp=2"]
    pretrain("two forked", whole, *common)
    pretrain_until("step 6 | saved", halves, *common)
    output = pretrain("two forked", halves, *common, "--resume")  # by launchers: test_killed_ranks.py
    assert "from step 6 of" in output
    assert "collectives are waited for: parallel.engine=deepspeed" in output
    first, second = metrics(whole), metrics(halves)
    for step in range(7, STEPS + 1):
        for key in ("loss", "grad_norm", "lr", "tokens"):
            assert second[step][key] == first[step][key], (step, key)
    weights = [dict(open_weights(run / f"checkpoints/step-{STEPS:08d}/state")) for run in (whole, halves)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

    # Another layout and engine may continue from these files, too.
    elastic = [*common, "parallel.tp=1", "parallel.engine=fsdp", f"train.steps={STEPS + 1}", "--resume"]
    code, output = start(LAUNCHERS["forked"], [*TINY, *elastic, f"run_dir={whole}"])
    changes = "parallel.engine deepspeed -> fsdp, processes 2 -> 1, parallel.tp 2 -> 1"
    assert code == 0 and changes in output and f"from step {STEPS} of" in output, output
    export = tmp_path / "export"
    code, output = start(["forked", "launch/export.py"], [str(halves), str(export)])
    assert code == 0, output
    model = AutoModelForCausalLM.from_pretrained(export)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[0][name]), name
    code, output = start(["forked", "launch/generate.py"], [str(export), "--prompt", "def ", "--max-new-tokens", "20"])
    assert code == 0 and "def " in output, output
    code, output = start(["forked", "launch/evaluate.py"], [str(export), str(ROOT / "README.md"), "--json"])
    assert code == 0 and 2 < json.loads(output.splitlines()[-1])["bits_per_byte"] < 9, output
    still = ["train.steps=1", "optimizer.lr=1e-9", "schedule.warmup_steps=0", "train.sample_every=0"]
    again = [*common, f"init_from={export}", *still]
    pretrain("two forked", tmp_path / "again", *again, "parallel.engine=fsdp", "parallel.tp=1", "parallel.sp=2")
    last = metrics(whole, "validation")[STEPS]["loss"]
    assert metrics(tmp_path / "again", "validation")[1]["loss"] == pytest.approx(last, rel=1e-5)
