"""launch/pretrain.py with blocks that inductor compiles, in bf16: the losses of eager blocks, resume, one graph."""

import shutil

import pytest
from launching import metrics, pretrain, text
from same_runs import metric_problems, state_problems

pytestmark = [pytest.mark.launch, pytest.mark.slow]

STEPS, HALF = 4, 2
# Evaluation between steps is eager, and takes no graph's place.
COMMON = [
    "train.dtype=bf16", f"train.steps={STEPS}", f"checkpoint.every={HALF}", f"train.eval_every={HALF}",
    "model.attention_probs_dropout_prob=0.1", "parallel.timeout_s=600",
]  # fmt: skip
# Of losses and norms of gradients: what bf16 numbers round to where a compiler keeps them wider between operators.
NEAR = {"loss": 1e-3, "grad_norm": 1e-2}


@pytest.fixture(scope="module")
def inductor(tmp_path_factory):
    """Settings of inductor: a folder for these tests alone, as a run that is killed while it compiles leaves half a
    file, which the next one takes for a whole one; and no processes of its own, which take longer than they save."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


@pytest.mark.parametrize(("launcher", "engine"), [("torchrun", "fsdp"), ("deepspeed", "deepspeed")])
def test_compiled_runs_in_bf16_are_eager_ones_and_resume_bit_for_bit(tmp_path, text_file, inductor, launcher, engine):
    logged = {"TORCH_LOGS": "graph_code,recompiles", **inductor}
    common = [*text(text_file), *COMMON, f"parallel.engine={engine}"]
    eager, whole, again = (tmp_path / name for name in ("eager", "whole", "again"))
    pretrain("two forked", eager, *common, "train.compile=false")
    outputs = [pretrain(launcher, whole, *common, "train.compile=true", environment=logged)]
    for step, row in metrics(eager).items():
        for key, near in NEAR.items():
            assert metrics(whole)[step][key] == pytest.approx(row[key], rel=near), (step, key)

    # As a run is left that was killed after its first checkpoint.
    shutil.copytree(whole, again)
    shutil.rmtree(again / f"checkpoints/step-{STEPS:08d}")
    outputs += [pretrain(launcher, again, *common, "train.compile=true", "--resume", environment=logged)]
    assert f"from step {HALF} of" in outputs[1]
    assert metric_problems(whole, again, STEPS) == []
    assert state_problems(*(run / f"checkpoints/step-{STEPS:08d}" for run in (whole, again))) == []
    for output in outputs:
        assert "Recompiling" not in output, output
        assert output.count("TRACED GRAPH") == 2, output  # one a rank
