"""Accelerate with DeepSpeed, launched and used as a third party would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate_study as study
import pytest
import torch
import warm
from builders import make_model

import mega_scale

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NO_DROPOUT = dict.fromkeys(("dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)


def plain_training(model):
    """The same steps without any library; returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=study.RATE)
    size = 2 * study.MICRO_BATCH * study.ACCUMULATION
    losses = []
    for _ in range(study.EPOCHS):
        for ids in torch.stack(study.rows()).split(size):
            loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), study.CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_under_accelerate_equals_plain_training(stage, tmp_path):
    model = make_model(spread=0.05, normalization_type="layernorm", nffn_activation_dropout_prob=0.0, **NO_DROPOUT)
    model.save_pretrained(tmp_path / "start")
    command = [
        "accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
        "no", "--dynamo_backend", "no", "--main_process_port", str(warm.free_port()), study.__file__,
        str(tmp_path / "start"), str(tmp_path / "end"), str(stage),
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "end" / "report.json").read_text())
    assert (report["kind"], report["stage"]) == ("DEEPSPEED", stage)
    assert bool(report["sharded"]) == (stage == 3)

    want = plain_training(model.train())
    steps = torch.tensor(report["losses"]).unflatten(1, (-1, study.ACCUMULATION)).mean((0, 2))
    torch.testing.assert_close(steps, torch.tensor(want), atol=1e-5, rtol=1e-5)
    assert steps[-1] < steps[0] - 0.02
    trained = mega_scale.MegaForCausalLM.from_pretrained(tmp_path / "end")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
