"""launch/pretrain.py under every launcher: same losses, exact resume, and what comes out."""

import json

import pytest
import torch
import yaml
from launching import ROOT, metrics, pretrain, pretrain_until, start, text
from transformers import AutoModelForCausalLM, AutoTokenizer

from mega_scale.checkpoint.state import open_weights

pytestmark = pytest.mark.launch

STEPS = 10  # of the runs that are compared
NO_DROPOUT = [f"model.{name}=0" for name in (
    "dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob", "nffn_activation_dropout_prob",
)]  # fmt: skip


def losses(run_dir):
    return [row["loss"] for row in metrics(run_dir).values()]


def same_tensors(one, other, where=""):
    """Every tensor in two nested structures is equal, bit for bit; returns how many there were."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
        return 1
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        return sum(same_tensors(one[key], other[key], f"{where}.{key}") for key in one)
    if isinstance(one, list | tuple):
        assert len(one) == len(other), where
        return sum(same_tensors(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
    return 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_file):
    """The run in one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    pretrain("forked", run_dir, *text(text_file), *NO_DROPOUT, f"train.steps={STEPS}", "parallel.engine=fsdp")
    return run_dir


@pytest.mark.parametrize(
    "launcher,engine,stage,more",
    [
        ("deepspeed", "deepspeed", 3, ["parallel.activation_checkpoint_segment=32"]),
        # Compiling takes as long as the machine is busy.
        pytest.param("torchrun", "fsdp", 3, ["train.compile=true", "parallel.timeout_s=600"], marks=pytest.mark.slow),
        pytest.param(
            "accelerate", "fsdp", 2, ["parallel.activation_checkpoint_policy=save_matmuls"], marks=pytest.mark.slow
        ),
        pytest.param("python", "deepspeed", 1, [], marks=pytest.mark.slow),
    ],
)
def test_every_launcher_and_engine_gives_the_losses_of_one_process(
    tmp_path, text_file, alone, launcher, engine, stage, more
):
    pretrain(
        launcher, tmp_path, *text(text_file), *NO_DROPOUT, f"train.steps={STEPS}", f"parallel.engine={engine}",
        f"parallel.zero_stage={stage}", "parallel.activation_checkpoint=1", "parallel.self_test=true", *more,
    )  # fmt: skip
    got, want = metrics(tmp_path), metrics(alone)
    assert len(got) == STEPS
    for step, row in want.items():
        assert got[step]["loss"] == pytest.approx(row["loss"], rel=1e-5), step
        assert got[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4), step
        assert got[step]["tokens"] == row["tokens"]
    weights, reference = (open_weights(run / f"checkpoints/step-{STEPS:08d}/state") for run in (tmp_path, alone))
    assert set(weights) == set(reference)
    for name in reference:
        torch.testing.assert_close(weights[name], reference[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_run_killed_half_way_resumes_bit_for_bit(tmp_path, text_file, engine):
    """By launchers: test_killed_ranks.py."""
    common = [*text(text_file), f"parallel.engine={engine}", "train.steps=24", "checkpoint.every=12"]
    common += ["train.sample_every=10"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    pretrain("two forked", whole, *common)
    pretrain_until("step 12 | saved", halves, *common)
    assert [folder.name for folder in (halves / "checkpoints").glob("step-*[0-9]")] == ["step-00000012"]
    output = pretrain("two forked", halves, *common, "--resume")
    assert "from step 12 of" in output
    first, second = metrics(whole), metrics(halves)
    assert list(second) == list(range(1, 25))
    for step in range(13, 25):
        for key in ("loss", "grad_norm", "lr", "tokens"):
            assert second[step][key] == first[step][key], (step, key)
    folders = [run / "checkpoints/step-00000024" for run in (whole, halves)]
    states = [json.loads((folder / "trainer.json").read_text()) for folder in folders]
    assert states[0] == states[1]
    weights = [dict(open_weights(folder / "state")) for folder in folders]
    assert same_tensors(*weights) > 20
    parts = [sorted((folder / "state").glob("part-*")) for folder in folders]
    assert [len(files) for files in parts] == [2, 2]
    for one, other in zip(*parts, strict=True):
        assert one.read_bytes() == other.read_bytes()  # moments included


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    """A run with everything on, by the main command's engine."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    output = pretrain(
        "two forked", run_dir, *text(text_file), "train.steps=30", "checkpoint.every=10", "checkpoint.keep=2",
        "train.eval_every=10", "train.sample_every=15", "train.micro_batch_size=4",
    )  # fmt: skip
    return run_dir, output


@pytest.mark.slow
def test_a_run_reports_and_leaves_what_it_should(trained):
    run_dir, output = trained
    assert output.count(" | validation loss") == 3 and output.count("sample:") == 2
    assert "tok/s" in output and "eta" in output
    assert [folder.name for folder in sorted((run_dir / "checkpoints").glob("step-*"))] == [
        "step-00000020",
        "step-00000030",
    ]
    rows = metrics(run_dir, "validation")
    assert rows[30]["loss"] < rows[10]["loss"] < 6
    assert rows[30]["bits_per_byte"] == pytest.approx(rows[30]["loss"] / 0.6931472, rel=0.02)  # bytes, and a few eos
    assert list((run_dir / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_the_saved_configuration_runs_again_as_it_is(trained, tmp_path):
    run_dir, _ = trained
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert settings["train"]["steps"] == 30 and settings["run_dir"] == str(run_dir)
    code, output = start(
        ["forked", "launch/pretrain.py"],
        ["--config", str(run_dir / "config.yaml"), f"run_dir={tmp_path}", "train.steps=4", "train.eval_every=0"],
    )
    assert code == 0, output
    # Dropout differs between one and two ranks.
    assert losses(tmp_path)[0] == pytest.approx(losses(run_dir)[0], rel=0.01)


@pytest.mark.slow
def test_export_generate_evaluate_and_start_again_from_the_export(trained, tmp_path):
    run_dir, _ = trained
    export = tmp_path / "export"
    code, output = start(["forked", "launch/export.py"], [str(run_dir), str(export)])
    assert code == 0, output
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    weights = open_weights(run_dir / "checkpoints/step-00000030/state")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert tokenizer.decode(tokenizer("def é\n", add_special_tokens=False)["input_ids"]) == "def é\n"

    texts = []
    for source in (run_dir, export):
        code, output = start(
            ["forked", "launch/generate.py"], [str(source), "--prompt", "def ", "--max-new-tokens", "40"]
        )
        assert code == 0 and "def " in output and str(source) in output, output
        texts.append([line for line in output.splitlines() if "text by" not in line])
    assert texts[0] == texts[1]

    figures = []
    for source in (run_dir, export):
        code, output = start(["forked", "launch/evaluate.py"], [str(source), str(ROOT / "README.md"), "--json"])
        assert code == 0, output
        figures.append(json.loads(output.splitlines()[-1]))
        assert figures[-1].pop("model").startswith(str(source))
    assert figures[0] == figures[1] and 2 < figures[0]["bits_per_byte"] < 8

    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    again = ["--config", str(run_dir / "config.yaml"), f"init_from={export}", f"run_dir={tmp_path / 'again'}"]
    again += ["train.steps=1", "optimizer.lr=1e-9", "schedule.warmup_steps=0"]
    code, output = start(["forked", "launch/pretrain.py"], again)
    assert code == 0, output
    last = metrics(run_dir, "validation")[settings["train"]["steps"]]["loss"]
    assert metrics(tmp_path / "again", "validation")[1]["loss"] == pytest.approx(last, rel=1e-4)


@pytest.mark.slow
def test_bf16_trains_like_fp32(tmp_path, text_file, alone):
    for engine in ("deepspeed", "fsdp"):
        run_dir = tmp_path / engine
        pretrain(
            "forked", run_dir, *text(text_file), *NO_DROPOUT, f"train.steps={STEPS}", f"parallel.engine={engine}",
            "train.dtype=bf16",
        )  # fmt: skip
        assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-2)
