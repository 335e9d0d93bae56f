"""A run that goes on, or starts from an export: the model of the folder, and a word on all else that differs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from same_runs import state_problems
from small_runs import MODEL, TINY, run

from launch import checkpoint
from mega_scale import export
from mega_scale.checkpoint.folder import read_manifest, read_state, write_manifest
from mega_scale.checkpoint.state import convert, open_weights
from mega_scale.config import load_config
from mega_scale.files import hash_file
from mega_scale.training.config import Schedule

# Each is a word that contradicts the model, most of them without another shape.
OTHERS = {
    "attention_activation": "softmax", "activation": "silu", "chunk_size": "32", "normalize_before_mega": "true",
    "truncation": "8", "use_chunking": "false", "normalize_before_ffn": "true", "scale_embeddings": "true",
    "normalization_type": "layernorm", "hidden_size": "32", "num_hidden_layers": "2", "vocab_size": "300",
    "tie_word_embeddings": "false", "final_norm": "true", "eos_token_id": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Words for the data; a run of four steps, `run`; and its export, `export`."""
    folder = tmp_path_factory.mktemp("continued")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {n} to train on and validate on"}) for n in range(200)))
    common = [*TINY, f"data.path={text}"]
    code, output = run(
        *common, *(f"model.{key}={value}" for key, value in MODEL.items()), f"run_dir={folder / 'run'}", "train.steps=4"
    )
    assert code == 0, output
    assert run(folder / "run", folder / "export", command=export.main)[0] == 0
    return folder, common


@pytest.fixture
def run_dir(trained, tmp_path):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def model_of(run_dir):
    return yaml.safe_load((run_dir / "config.yaml").read_text())["model"]


def test_a_resumed_run_has_the_model_of_its_checkpoint_without_a_word(trained, run_dir):
    code, output = run(*trained[1], f"run_dir={run_dir}", "--resume", "train.steps=6")
    assert code == 0 and "from step 4 of" in output, output
    assert MODEL.items() <= model_of(run_dir).items() and model_of(run_dir)["vocab_size"] == 259
    other = run_dir / "checkpoints" / "step-00000006" / "model" / "config.json"
    assert other.read_text() == (other.parents[2] / "step-00000004" / "model" / "config.json").read_text()


def test_a_run_from_an_export_has_its_model_without_a_word(trained, tmp_path):
    folder, common = trained
    words = [*common, f"run_dir={tmp_path}", f"init_from={folder / 'export'}", "train.steps=1"]
    code, printed = run(*words, "--print-config")
    assert code == 0 and MODEL.items() <= yaml.safe_load(printed)["model"].items()
    assert yaml.safe_load(printed)["data"]["tokenizer"] == str(folder / "export")
    code, output = run(*words)
    assert code == 0, output
    assert MODEL.items() <= model_of(tmp_path).items()
    (tmp_path / "again.yaml").write_text(printed)
    code, output = run("--config", tmp_path / "again.yaml", f"run_dir={tmp_path / 'again'}")
    assert code == 0, output
    assert (tmp_path / "again" / "metrics.jsonl").is_file()
    # The export may be gone when such a run goes on.
    code, output = run(*common, f"run_dir={tmp_path}", "--resume", f"init_from={tmp_path / 'gone'}", "train.steps=2")
    assert code == 0, output


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("how", ["resume", "init_from"])
def test_a_key_that_contradicts_the_folder_is_refused_in_one_line(trained, tmp_path, name, how):
    folder, common = trained
    source = f"--resume={folder / 'run'}" if how == "resume" else f"init_from={folder / 'export'}"
    code, output = run(*common, f"run_dir={tmp_path / 'new'}", source, f"model.{name}={OTHERS[name]}")
    there = json.loads((folder / "export" / "config.json").read_text())[name]
    assert code == 2 and output.count("\n") == 1 and output.startswith("error: "), output
    assert f"model.{name}=" in output and OTHERS[name] in output.lower()
    assert f"(there: {there!r})" in output and "leave those keys out" in output and how in output
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_given_counts_and_the_default_job_does_not(trained, run_dir, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {activation: relu, dropout_prob: 0.0}\n")
    words = [*trained[1], f"run_dir={run_dir}", "--resume", "train.steps=4"]
    code, output = run("--config", tmp_path / "mine.yaml", *words)
    assert code == 2 and "model.activation='relu' (there: 'gelu')" in output and "dropout" not in output
    code, output = run("--config", run_dir / "config.yaml", *words)
    assert code == 0 and "other keys" not in output, output


@pytest.mark.parametrize("how", ["resume", "init_from"])
def test_another_tokenizer_is_refused(trained, tmp_path, how):
    folder, common = trained
    shutil.copytree(folder / "export", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    source = f"--resume={folder / 'run'}" if how == "resume" else f"init_from={folder / 'export'}"
    code, output = run(*common, f"run_dir={tmp_path / 'new'}", source, f"data.tokenizer={tmp_path / 'other'}")
    assert code == 2 and output.count("error: ") == 1 and "another vocabulary" in output and how in output, output
    assert not list((tmp_path / "new").glob("checkpoints/*"))


def test_another_horizon_is_said_with_what_it_does_to_the_learning_rate(trained, run_dir):
    before = load_config(run_dir / "config.yaml")
    code, output = run(*trained[1], f"run_dir={run_dir}", "--resume", "train.steps=12")
    (line,) = [line for line in output.splitlines() if "other keys" in line]
    runs = (replace(before, train=replace(before.train, steps=steps)) for steps in (12, 4))
    now, then = (Schedule(run).lr(4) for run in runs)
    assert code == 0 and "train.steps=12 (was 4)" in line and then == 0
    assert "; the cosine fall now ends at step 12 (was 4); " in line
    assert line.endswith(f"the learning rate of step 5 is {now:.4g} (was {then:.4g})")
    assert "lr 0" not in output and "from step 4 of" in output


def test_a_stable_checkpoint_decays_later_as_in_the_run_that_planned_it(trained, tmp_path):
    """A wsd run keeps the checkpoint from which it falls, though keep=1; from there another end is bit for bit."""
    words = [*trained[1], *(f"model.{key}={value}" for key, value in MODEL.items()), "schedule.decay=wsd"]
    words += ["checkpoint.keep=1", "train.log_every=1", "data.validation_fraction=0"]
    planned = [*words, "train.steps=7", "schedule.decay_steps=4", "schedule.decay_shape=linear"]
    assert run(*planned, f"run_dir={tmp_path / 'planned'}")[0] == 0
    code, output = run(*words, f"run_dir={tmp_path / 'run'}", "train.steps=5", "schedule.decay_steps=2")
    assert code == 0, output
    stable, last = (f"checkpoints/step-{step:08d}" for step in (3, 7))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == [
        f"step-{step:08d}" for step in (3, 5)
    ]
    prune = ["prune", str(tmp_path / "run"), "--keep", "1"]
    planned_to_go = run(*prune, "--stable", "--dry-run", command=checkpoint.main)
    assert planned_to_go == (0, f"would delete {tmp_path / 'run' / stable}\n")
    code, output = run(*prune, command=checkpoint.main)
    assert code == 0 and output.startswith(f"kept {tmp_path / 'run' / stable}: ") and "--stable" in output
    code, output = run(*planned, f"run_dir={tmp_path / 'later'}", f"--resume={tmp_path / 'run' / stable}")
    assert code == 0 and "train.steps=7 (was 5)" in output, output
    assert state_problems(tmp_path / "planned" / last, tmp_path / "later" / last) == []
    rates = [float(line.split(" lr ")[1].split(" ")[0]) for line in output.splitlines() if " lr " in line]
    assert rates == pytest.approx([0.05, 0.0375, 0.025, 0.0125], rel=1e-2)


def test_the_average_of_the_weights_is_evaluated_saved_and_exported(trained, run_dir, tmp_path):
    """A run that goes on keeps it from there on; the other weights are what they are without it."""
    words = [*trained[1], f"run_dir={run_dir}", "--resume", "train.steps=8", "schedule.decay=constant"]
    code, output = run(*words, "train.weight_average=0.5")
    assert code == 0 and "train.weight_average=0.5 (was 0.0)" in output, output
    last = run_dir / "checkpoints" / "step-00000008"
    weights, average = dict(open_weights(last / "state")), dict(open_weights(last / "state", average=True))
    assert state_problems(last, convert(last, tmp_path / "converted", 3)) == []
    name = "lm_head.weight"
    assert not torch.equal(weights[name], average[name])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {row["part"]: row["loss"] for row in rows if row["step"] == 8}
    validation = read_state(last)["validation"]
    assert found["validation"] == validation["loss"] != found["validation_average"] == validation["average"]["loss"]
    assert f"averaged weights: validation loss {found['validation_average']:.4f}" in output
    assert run(run_dir, tmp_path / "averaged", "--average", command=export.main)[0] == 0
    exported = load_file(tmp_path / "averaged" / "model.safetensors")
    assert all(torch.equal(tensor, average[key]) for key, tensor in exported.items())
    card = (tmp_path / "averaged" / "README.md").read_text()
    assert "exponential average over the steps, decay 0.5" in card and f"{found['validation_average']:.4f}" in card
    code, output = run(trained[0] / "run", tmp_path / "none", "--average", command=export.main)
    assert code == 2 and "train.weight_average" in output and not (tmp_path / "none").exists()


def test_each_validation_set_has_figures_of_its_own(trained, tmp_path):
    """The sources of a mixture by themselves, with further texts by name; together they are the validation loss."""
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text(f"{name} is a text of its own, not as short as others. " * 40)
    common = [word for word in trained[1] if not word.startswith(("data.source", "data.path"))]
    common += [f"model.{key}={value}" for key, value in MODEL.items()] + ["train.steps=1", "data.validation_fraction=0"]
    text = trained[0] / "text.jsonl"
    json_source = f"{{source: json, path: [{text}], validation_fraction: 0.5, weight: 1}}"
    txt_source = (
        f"{{source: text, path: [{tmp_path / 'one.txt'}], validation_path: [{tmp_path / 'two.txt'}], weight: 1}}"
    )
    sets = f"data.validation={{three: {{source: text, path: [{tmp_path / 'three.txt'}]}}}}"
    mixture = f"data.mixture={{a: {json_source}, b: {txt_source}}}"
    code, output = run(*common, mixture, sets, f"run_dir={tmp_path / 'run'}", "train.eval_batches=0")
    assert code == 0, output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {row["part"]: row for row in rows if row["part"].startswith("validation")}
    assert set(found) == {"validation", "validation/a", "validation/b", "validation/three"}
    whole, parts = found.pop("validation"), list(found.values())
    assert whole["tokens"] == sum(part["tokens"] for part in parts)
    mean = sum(part["loss"] * part["tokens"] for part in parts) / whole["tokens"]
    assert whole["loss"] == pytest.approx(mean) and len({part["loss"] for part in parts}) == 3
    sizes = [part["loss"] * part["tokens"] / part["bits_per_byte"] for part in parts]
    assert whole["bits_per_byte"] == pytest.approx(mean * whole["tokens"] / sum(sizes))
    assert "validation three loss" in output
    saved = read_state(tmp_path / "run" / "checkpoints" / "step-00000001")["validation"]
    assert saved["loss"] == whole["loss"] and saved["sets"]["three"]["loss"] == found["validation/three"]["loss"]
    # Beside what is held out of a single text; a set alone is the whole.
    single = [*trained[1], *(f"model.{key}={value}" for key, value in MODEL.items()), sets, "train.steps=1"]
    for words, parts in (([], {"validation/held_out", "validation/three"}), (["data.validation_fraction=0"], set())):
        folder = tmp_path / f"single-{len(words)}"
        assert run(*single, *words, f"run_dir={folder}")[0] == 0
        rows = [json.loads(line)["part"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert {part for part in rows if part.startswith("validation")} == {"validation"} | parts


@pytest.mark.parametrize(
    "word,said",
    [
        ("optimizer.weight_decay=0.3", "optimizer.weight_decay=0.3 (was 0.1)"),
        ("optimizer.beta2=0.9", "optimizer.beta2=0.9 (was 0.98)"),
        ("model.dropout_prob=0", "model.dropout_prob=0.0 (was 0.1)"),
        ("train.dtype=bf16", "train.dtype=bf16 (was fp32)"),
        ("train.seed=7", "train.seed=7 (was 0)"),
        ("schedule.decay=constant", "the learning rate of step 3 is 0.05 (was 0.025)"),
        ("data.max_bad_share=0.5", "data.max_bad_share=0.5 (was 0.01)"),
    ],
)
def test_other_keys_that_decide_the_numbers_are_said_in_one_line(trained, run_dir, word, said):
    folder = run_dir / "checkpoints" / "step-00000002"
    code, output = run(*trained[1], f"run_dir={run_dir}", f"--resume={folder}", "train.steps=4", word)
    (line,) = [line for line in output.splitlines() if "other keys" in line]
    assert code == 0 and said in line and line.count("(was") == (2 if "rate" in said else 1)


def test_the_same_keys_need_no_word(trained, run_dir):
    words = ["train.log_every=1", "checkpoint.keep=3", "data.prefetch=5"]
    code, output = run(*trained[1], f"run_dir={run_dir}", "--resume=auto", "train.steps=4", *words)
    assert code == 0 and "other keys" not in output
    (line,) = [line for line in output.splitlines() if "nothing to do" in line]
    assert "4 steps are done" in line and "raise train.steps" in line


def test_what_the_checkpoint_does_not_say_is_not_compared(trained, run_dir):
    """Keys come and go with versions."""
    folder = run_dir / "checkpoints" / "step-00000004"
    manifest, settings = read_manifest(folder, None), yaml.safe_load((folder / "config.yaml").read_text())
    del settings["train"]["seed"]
    settings["train"]["key_of_another_version"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    files = {name: hash_file(folder / name, None) for name in manifest.files}
    write_manifest(folder, manifest._replace(files=files), None)
    code, output = run(*trained[1], f"run_dir={run_dir}", "--resume", "train.steps=4", "train.seed=3")
    assert code == 0 and "other keys" not in output, output


def test_a_checkpoint_of_another_model_that_is_fallen_back_to_is_not_taken(trained, run_dir, tmp_path):
    """A folder whose newest checkpoint is of one model, and an older one, taken in its place, of another."""
    other = tmp_path / "other"
    words = [f"model.{key}={value}" for key, value in (MODEL | {"activation": "silu"}).items()]
    assert run(*trained[1], *words, f"run_dir={other}", "train.steps=2")[0] == 0
    mixed = run_dir / "checkpoints"
    shutil.rmtree(mixed / "step-00000002")
    shutil.copytree(other / "checkpoints" / "step-00000002", mixed / "step-00000002")
    part = mixed / "step-00000004" / "state" / "part-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-9] ^= 4
    part.write_bytes(content)
    code, output = run(*trained[1], f"run_dir={run_dir}", "--resume", "train.steps=6")
    assert code == 2 and "holds another model than the run describes: model.activation='gelu'" in output, output
    assert Path(mixed / "step-00000002").is_dir() and not (mixed / "step-00000006").exists()
