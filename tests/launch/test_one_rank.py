"""A rank that cannot run, alone among its ranks: it says why in one line, and the others end with that reason."""

import os
import socket
import subprocess
import sys

import pytest
import warm
from launching import ROOT, TINY

from mega_scale.process import PEER_LOST, REFUSED

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.mark.parametrize(
    ("alone", "reason"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "accelerate launch --mixed_precision"),
        ({"DS_ACCELERATOR": "cuda"}, "DeepSpeed computes on cuda, parallel.device asks for cpu"),
    ],
    ids=["before it meets the others", "when it builds its engine"],
)
def test_it_is_named_with_its_reason(tmp_path, text_file, alone, reason):
    port = warm.free_port()
    command = [sys.executable, "launch/pretrain.py", *TINY, f"data.path={text_file}", f"run_dir={tmp_path / 'run'}"]
    command += [
        "data.source=json",
        "parallel.device=cpu",
        "parallel.engine=deepspeed",
        "train.steps=2",
        "schedule.warmup_steps=1",
    ]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **warm.variables(rank, 2, port), **(alone if rank == 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [PEER_LOST, REFUSED], outputs
    assert f"rank 1 ({socket.gethostname()})" in outputs[0] and reason in outputs[0], outputs
    [line] = [line for line in outputs[1].splitlines() if line.startswith("error: ")]
    assert reason in line
    assert not any("Traceback" in output for output in outputs), outputs
