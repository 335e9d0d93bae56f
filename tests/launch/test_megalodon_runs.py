"""A Megalodon from the command line: trained on the default corpus, sampled, resumed, evaluated, exported."""

import json
import math
import shutil

import pytest
import torch
import yaml
from commands import exit_code
from launching import ROOT, start
from same_runs import state_problems
from transformers import AutoModelForCausalLM

from launch import evaluate, generate
from launch.pretrain import main as pretrain
from mega_scale import MegalodonConfig, MegalodonForCausalLM, export

pytestmark = [pytest.mark.launch, pytest.mark.slow]

WORDS = [
    "model.hidden_size=16", "model.num_hidden_layers=2", "model.intermediate_size=24", "model.nffn_hidden_size=20",
    "model.shared_representation_size=8", "model.ema_projection_size=2", "model.chunk_size=16",
    "model.hidden_dropout_prob=0.1", "data.sequence_length=64", "train.global_batch_size=2",
    "train.micro_batch_size=2", "train.eval_batches=1", "train.eval_every=0", "train.sample_every=0",
    "train.log_every=1", "schedule.warmup_steps=1", "parallel.engine=fsdp", "parallel.self_test=false",
    "checkpoint.every=2", "checkpoint.keep=9",
]  # fmt: skip
OWN = ["model.type=megalodon", "model.num_attention_heads=2", "model.timestep_norm_groups=4", "model.swiglu=true"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of four steps, and what was printed."""
    folder = tmp_path_factory.mktemp("megalodon") / "run"
    words = [*WORDS, *OWN, f"run_dir={folder}", "train.steps=4", "train.sample_every=4", "train.sample_tokens=8"]
    code, output = start(["forked", "launch/pretrain.py"], [*words, "parallel.self_test=true"])
    assert code == 0, output
    return folder, output


def test_it_trains_tests_its_layout_evaluates_and_samples(run):
    folder, output = run
    assert "self-test: loss and" in output and "sample: 'def " in output, output
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["part"] == "train"]
    assert len(losses) == 4 and all(0 < loss < 2 * math.log(259) for loss in losses), losses
    resolved = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    assert set(resolved) == {"type", *MegalodonConfig.__annotations__}
    assert (resolved["type"], resolved["num_attention_heads"], resolved["swiglu"]) == ("megalodon", 2, True)


def test_a_resumed_run_is_bit_for_bit_the_whole_one(run, tmp_path):
    """Without a word on its type: it is the checkpoint's."""
    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    words = [*WORDS[7:], "model.num_attention_heads=2"]  # what agrees may be said
    code, output = start(
        ["forked", "launch/pretrain.py"], [*words, f"run_dir={tmp_path / 'run'}", "--resume", "train.steps=4"]
    )
    assert code == 0 and "resumed from" in output, output
    name = "checkpoints/step-00000004"
    assert not state_problems(tmp_path / "run" / name, run[0] / name)


def test_what_it_learned_is_evaluated_continued_and_exported(run, tmp_path, capsys):
    folder, out = run[0], tmp_path / "export"
    text = ROOT / "README.md"
    assert exit_code(export.main, folder, out) == 0
    for place in (folder, out):
        assert exit_code(evaluate.main, place, text, "--json", "--sequence-length", 64) == 0
        continued = ("--prompt", "def ", "--max-new-tokens", 20, "--temperature", 0)
        assert exit_code(generate.main, place, *continued) == 0
    assert exit_code(generate.main, place, *continued, "--cache", "static") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    scores = [json.loads(line)["loss"] for line in lines if line.startswith("{")]
    assert len(scores) == 2 and scores[0] == pytest.approx(scores[1], rel=1e-6) and scores[0] < 2 * math.log(259)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is MegalodonForCausalLM and model.config.num_attention_heads == 2
    ids = torch.arange(3, 33)[None]
    cached = model(ids, use_cache=True, logits_to_keep=1).logits
    torch.testing.assert_close(cached, model(ids, use_cache=False).logits[:, -1:], atol=1e-5, rtol=1e-5)
    words = [word for word in WORDS if not word.startswith("model.")]
    code, output = start(
        ["forked", "launch/pretrain.py"],
        [*words, f"run_dir={tmp_path / 'new'}", f"init_from={out}", "train.steps=1", "optimizer.decay=all"],
    )
    assert code == 0, output
    assert yaml.safe_load((tmp_path / "new/config.yaml").read_text())["model"]["type"] == "megalodon"


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ("model.type=mega", "model.type='mega' (there: 'megalodon')"),
        ("model.use_chunking=true", "is a key of model.type=mega, and the run has model.type=megalodon"),
        ("model.type=megalodon model.rope_base=2e4", "model.rope_base=20000.0 (there: 10000.0)"),
        ("model.num_attention_heads=1", "model.num_attention_heads=1 (there: 2)"),
    ],
)
@pytest.mark.parametrize("how", ["resume", "init_from"])
def test_another_model_than_the_folders_is_refused(run, how, words, fragment, tmp_path, capsys):
    if how == "init_from":
        given = [f"init_from={run[0] / 'checkpoints/step-00000004/model'}", f"run_dir={tmp_path}"]
    else:
        given = ["--resume", f"run_dir={run[0]}"]
    assert exit_code(pretrain, *given, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and fragment in error, error
