"""RunConfig: layers, refusals in one line, help, and files that run again as they are."""

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from launch.pretrain import main
from mega_scale.config import DEFAULT_CONFIG, RunConfig, load_config, model_config, parse, save_config, to_yaml
from mega_scale.config.keys import describe, known_keys
from mega_scale.model import MegaConfig
from mega_scale.training.checkpoint.manifest import Manifest, hash_file, write_manifest
from mega_scale.training.run_folder import to_go_on_from

KNOWN = known_keys(RunConfig)


class Tokenizer(SimpleNamespace):
    """What `model_config` asks of a tokenizer."""

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.size)}


TOKENIZER = Tokenizer(size=300, pad_token_id=256, bos_token_id=None, eos_token_id=257)


def _file(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def _refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


# Layers


def test_defaults_files_and_command_line_beat_each_other_in_this_order(tmp_path):
    first = _file(tmp_path, "train: {steps: 5, log_every: 6, seed: 7}\noptimizer: {lr: 5e-3}\n", "first.yaml")
    second = _file(tmp_path, "train: {log_every: 8, seed: 9}\n", "second.yaml")
    # The command line wins wherever it stands.
    config = parse(["train.seed=10", "--config", first, f"--config={second}"])
    assert (config.train.steps, config.train.log_every, config.train.seed) == (5, 8, 10)
    assert config.optimizer.lr == 5e-3
    assert config.optimizer.eps == RunConfig().optimizer.eps


@pytest.mark.parametrize(
    "words", ["train.log_every=3", "--train.log_every=3", "--train.log_every 3", "--train.log-every 3"]
)
def test_a_key_is_set_in_any_of_the_usual_ways(words):
    assert parse(words.split()).train.log_every == 3


def test_without_a_file_the_run_is_the_default_job():
    assert DEFAULT_CONFIG.parts[-2:] == ("configs", "debug.yaml")
    assert parse([]) == load_config(DEFAULT_CONFIG)
    assert parse([]) != RunConfig()


def test_empty_files_and_sections_change_nothing(tmp_path):
    assert load_config(_file(tmp_path, "")) == RunConfig()
    assert load_config(_file(tmp_path, "train:\nmodel: {}\n")) == RunConfig()


@pytest.mark.parametrize(
    ("words", "resume", "steps"),
    [
        ("--resume train.steps=4", "latest", 4),
        ("--resume --train.steps 4", "latest", 4),
        ("train.steps=4 --resume", "latest", 4),
        ("--resume runs/a/step=7 train.steps=4", "runs/a/step=7", 4),
        ("resume=runs/a train.steps=4", "runs/a", 4),
        ("train.steps=4", None, 4),
    ],
)
def test_resume_takes_a_folder_or_means_the_latest(words, resume, steps):
    config = parse(words.split())
    assert (config.resume, config.train.steps) == (resume, steps)


def test_what_launchers_add_is_ignored():
    assert parse(["--local_rank", "1"]) == parse(["--local-rank=0"]) == parse([])


def test_lists_and_mappings_on_the_command_line(tmp_path):
    assert parse(["data.path=a.txt"]).data.path == ["a.txt"]
    assert parse(["data.path=[a.txt, b.txt]"]).data.path == ["a.txt", "b.txt"]
    path = _file(tmp_path, "parallel: {ds_config: {zero_optimization: {overlap_comm: true}}}\n")
    argv = ["--config", path, "parallel.ds_config.zero_optimization.reduce_bucket_size=1e6", "parallel.ds_config.a=no"]
    expected = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1e6}, "a": False}
    assert parse(argv).parallel.ds_config == expected


# The model section


def test_model_section_is_what_megaconfig_declares():
    keys = {key.removeprefix("model.") for key in KNOWN if key.startswith("model.")}
    assert keys == set(MegaConfig.__annotations__)
    ours, reference = RunConfig().model, MegaConfig()
    differing = {key for key in keys if getattr(ours, key) != getattr(reference, key)}
    assert differing == {"is_decoder", "bidirectional", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}


def test_vocabulary_and_special_tokens_follow_the_tokenizer_unless_set():
    config = model_config(parse(["model.eos_token_id=[1, 2]"]).model, TOKENIZER)
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id) == (300, 256, None)
    assert config.eos_token_id == [1, 2]
    assert model_config(parse(["model.vocab_size=320"]).model, TOKENIZER).vocab_size == 320
    with pytest.raises(ValueError, match=r"model\.vocab_size=299 is less than the 300 ids of the tokenizer"):
        model_config(parse(["model.vocab_size=299"]).model, TOKENIZER)


# Refusals of keys and types


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("train.stepz=5", ["train.stepz is not a key", "train.steps"]),
        ("steps=5", ["steps is not a key", "train.steps"]),
        ("--optim.lr 1e-3", ["optim.lr is not a key", "optimizer.lr"]),
        ("model.dropout=0", ["model.dropout is not a key", "model.dropout_prob"]),
        ("--train.stepz", ["train.stepz is not a key", "train.steps"]),
        ("train.steps=many", ["train.steps='many'", "an integer"]),
        ("train.steps=1.5", ["train.steps='1.5'", "an integer"]),
        ("train.steps=null", ["train.steps=null", "an integer"]),
        ("train.steps=", ["train.steps=''", "an integer"]),
        ("--train.steps", ["train.steps has no value", "train.steps=VALUE"]),
        ("optimizer.lr=fast", ["optimizer.lr='fast'", "a number"]),
        ("train.tensorboard=3", ["train.tensorboard='3'", "true or false"]),
        ("train.dtype=fp8", ["train.dtype='fp8'", "one of fp32, bf16"]),
        ("parallel.engine=megatron", ["parallel.engine='megatron'", "fsdp, deepspeed"]),
        ("model.truncation=some", ["model.truncation='some'", "an integer or null"]),
        ("model.eos_token_id=end", ["model.eos_token_id='end'", "an integer or a list of integer items or null"]),
        ("train={steps:3}", ["train={steps:3}", "section", "train.KEY=VALUE"]),
        ("parallel.ds_config.a=1 parallel.ds_config.a.b=2", ["parallel.ds_config.a.b=2", "already holds"]),
        ("parallel.ds_config.a=[", ["parallel.ds_config.a=[", "not YAML"]),
        ("nonsense", ["'nonsense'", "KEY=VALUE"]),
        ("-v", ["'-v'", "KEY=VALUE"]),
        ("--config no/such.yaml", ["no/such.yaml", "no such file"]),
        ("--config", ["config has no value"]),
    ],
)
def test_command_line_is_refused_in_one_line(words, fragments, capsys):
    message = _refusal(shlex.split(words), capsys)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("train:\n  stepz: 5\n", ["train.stepz is not a key", "train.steps"]),
        ("trian:\n  steps: 5\n", ["trian is not a key", "one is train;"]),
        ("train:\n  steps: many\n", ["train.steps='many'", "an integer"]),
        ("train:\n  steps: null\n", ["train.steps=null", "an integer"]),
        ("train:\n  steps: 5.0\n", ["train.steps=5.0", "an integer"]),
        ("run_dir: 5\n", ["run_dir=5", "text"]),
        ("data:\n  path: [1, 2]\n", ["data.path", "a list of text items"]),
        ("train: 5\n", ["train=5", "section"]),
        ("train: {steps: 5}\ntrain: {seed: 1}\n", ["line 2", "train is given twice"]),
        ("train.steps: 6\ntrain: {steps: 5}\n", ["train.steps is given twice", "keep one"]),
        ("train: {steps: 5}\ntrain.steps: 6\n", ["train.steps is given twice", "keep one"]),
        ("- 5\n", ["holds a list", "sections and keys"]),
        ("train: [\n", ["is not YAML"]),
        ("run_dir: \x80\n", ["is not YAML"]),
    ],
)
def test_file_is_refused_in_one_line_that_names_it(text, fragments, tmp_path, capsys):
    path = _file(tmp_path, text)
    message = _refusal(["--config", path], capsys)
    assert all(fragment in message for fragment in [path, *fragments]), message


def test_folder_or_binary_as_a_file_is_refused(tmp_path, capsys):
    assert "cannot be read" in _refusal(["--config", str(tmp_path)], capsys)
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in _refusal(["--config", str(tmp_path / "model.bin")], capsys)


def test_quiet_ranks_say_nothing(capsys):
    for argv, code in ((["train.stepz=5"], 2), (["--help"], 0), (["--print-config"], 0)):
        with pytest.raises(SystemExit) as ended:
            parse(argv, quiet=True)
        assert ended.value.code == code
    assert capsys.readouterr() == ("", "")


def test_a_refusal_ends_the_program_without_a_traceback():
    program = "import sys; from mega_scale.config import parse; parse(sys.argv[1:])"
    run = subprocess.run(
        [sys.executable, "-c", program, "a.b=1"], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: a.b is not a key")
    assert "Traceback" not in run.stderr and run.stdout == ""


# Refusals of combinations


def _blocked_run_dir(folder: Path) -> str:
    return _file(folder, "a file", "blocked")


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (
            "train.global_batch_size=30 train.micro_batch_size=8",
            ["train.global_batch_size=30", "2 data-parallel ranks", "train.micro_batch_size=8", "16 or 32", "3 or 5"],
        ),
        ("train.global_batch_size=7 train.micro_batch_size=8", ["train.global_batch_size=7", "of 16"]),
        ("model.use_chunking=true model.chunk_size=100", ["model.chunk_size=100", "sequence_length=512", "500 or 600"]),
        ("model.use_chunking=true model.chunk_size=-1", ["model.use_chunking=True", "chunk_size=-1"]),
        ("model.bidirectional=true", ["model.bidirectional=True", "set model.bidirectional=false"]),
        ("model.is_decoder=false", ["model.is_decoder=False", "set it to true"]),
        ("model.add_cross_attention=true", ["model.add_cross_attention=True", "set it to false"]),
        ("model.shared_representation_size=33", ["shared_representation_size=33", "even"]),
        ("model.normalization_type=batchnorm", ["model.normalization_type='batchnorm'", "layernorm"]),
        ("model.activation=tanh", ["model.activation='tanh'", "silu"]),
        ("model.dropout_prob=1.5", ["model.dropout_prob=1.5"]),
        ("model.hidden_size=0", ["model.hidden_size=0", "at least 1"]),
        (
            "model.relative_positional_bias=simple model.use_chunking=false model.max_positions=256",
            ["data.sequence_length=512", "model.max_positions=256", "rotary"],
        ),
        ("model.truncation=8 train.sample_every=5", ["model.truncation=8", "train.sample_every=5", "sample_every=0"]),
        ("schedule.warmup_steps=50 train.steps=40", ["schedule.warmup_steps=50", "train.steps=40", "at most 40"]),
        ("schedule.min_lr=1", ["schedule.min_lr=1.0", "optimizer.lr="]),
        ("schedule.warmup_init_lr=1", ["schedule.warmup_init_lr=1.0", "optimizer.lr="]),
        ("train.steps=0", ["train.steps=0", "above 0"]),
        ("train.micro_batch_size=-1", ["train.micro_batch_size=-1", "above 0"]),
        ("train.eval_batches=-1", ["train.eval_batches=-1", "0 or above"]),
        ("train.sample_tokens=0", ["train.sample_tokens=0", "above 0"]),
        ("data.sequence_length=0", ["data.sequence_length=0"]),
        ("optimizer.lr=-0.1", ["optimizer.lr=-0.1", "above 0"]),
        ("optimizer.lr=.inf", ["optimizer.lr=inf"]),
        ("optimizer.beta2=1", ["optimizer.beta2=1.0", "below 1"]),
        ("optimizer.max_grad_norm=-1", ["optimizer.max_grad_norm=-1.0", "0 or above"]),
        ("checkpoint.every=-5", ["checkpoint.every=-5", "0 or above"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage=4", "0, 1, 2 or 3"]),
        ("parallel.engine=fsdp parallel.ds_config.a=1", ["parallel.ds_config={'a': 1}", "deepspeed"]),
        ("parallel.engine=deepspeed parallel.ds_config.bf16.enabled=true", ["bf16.enabled", "train.dtype"]),
        ("data.validation_fraction=0 train.eval_every=5", ["data.validation_fraction=0", "train.eval_every=5"]),
        ("run_dir={tmp}/blocked", ["run_dir=", "blocked", "can be written"]),
        ("run_dir={tmp}/blocked/inside", ["run_dir=", "inside", "can be written"]),
        ("--resume", ["resume='latest'", "{tmp}/run", "checkpoint"]),
        ("--resume {tmp}/none", ["resume='{tmp}/none'", "checkpoint", "step-"]),
        ("--resume=3", ["resume='3'", "neither a checkpoint", "step-"]),
        ("init_from={tmp}/none", ["init_from=", "none", "config.json", "launch/export.py"]),
        ("checkpoint.key_file={tmp}/none", ["checkpoint.key_file='{tmp}/none'", "a readable file"]),
        ("run_dir={tmp}/file", ["run_dir=", "file", "can be written"]),
        ("run_dir={tmp}/saved", ["run_dir='{tmp}/saved'", "{tmp}/saved/checkpoints", "move it away"]),
        ("run_dir={tmp}/unmounted", ["run_dir='{tmp}/unmounted'", "{tmp}/unmounted/checkpoints", "move it away"]),
    ],
)
def test_impossible_combinations_are_refused_before_anything_starts(words, fragments, tmp_path):
    _blocked_run_dir(tmp_path)
    (tmp_path / "file").touch()
    for name in ("saved", "unmounted"):
        (tmp_path / name).mkdir()
    (tmp_path / "saved/checkpoints").touch()
    (tmp_path / "unmounted/checkpoints").symlink_to(tmp_path / "gone")
    config = parse([f"run_dir={tmp_path}/run", *(word.format(tmp=tmp_path) for word in words.split())])
    with pytest.raises(ValueError) as refused:
        config.validate(world_size=2)
    message = str(refused.value)
    assert all(fragment.replace("{tmp}", str(tmp_path)) in message for fragment in fragments), message
    assert "\n" not in message


def test_values_set_in_python_are_checked_too(tmp_path):
    config = dataclasses.replace(parse([]), run_dir=str(tmp_path))
    config.train.dtype = "fp16"
    with pytest.raises(ValueError, match=r"train\.dtype='fp16'"):
        config.validate(world_size=1)
    config.train.dtype, config.schedule.decay = "bf16", "step"
    with pytest.raises(ValueError, match=r"schedule\.decay='step'"):
        config.validate(world_size=1)


def test_compilation_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"train\.compile=True needs a C\+\+ compiler"):
        parse([f"run_dir={tmp_path}", "parallel.device=cpu", "train.compile=true"]).validate(1)


def test_a_run_is_not_begun_anew_while_its_checkpoints_are_links_to_a_disk_that_is_gone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000030").symlink_to(tmp_path / "gone")
    assert to_go_on_from(tmp_path, "auto") == tmp_path
    with pytest.raises(ValueError, match=r"resume='latest': none of the 1 checkpoints .* is valid"):
        parse([f"run_dir={tmp_path}", "--resume"]).validate(1)


@pytest.mark.parametrize(
    "key", ["run_dir", "run_dir=x --resume", "--resume auto run_dir", "init_from", "data.tokenizer", "data.cache_dir",
            "data.source=hub data.hub_name", "data.source=prepared data.path"],
)  # fmt: skip
def test_names_that_no_file_can_have_are_refused_in_one_line(key, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *words, last = key.split()
    given = f"{last}={'./x' * 2000}" if not last.startswith("--") else f"{last}={'x' * 300}"
    with pytest.raises(SystemExit):
        main(["train.steps=1", *words, given])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


def test_a_mapping_of_a_file_takes_more_keys_whatever_it_holds(tmp_path):
    path = _file(tmp_path, "parallel: {ds_config: {zero_optimization: {sub_group_size: 2020-01-01}}}\n")
    config = parse(["--config", path, "parallel.ds_config.steps_per_print=3", f"run_dir={tmp_path}"])
    with pytest.raises(ValueError, match=r"sub_group_size=datetime.* is not allowed: expected a whole number"):
        config.validate(1)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_unwritable_run_dir_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    config = dataclasses.replace(parse([]), run_dir=str(tmp_path))
    with pytest.raises(ValueError, match="can be written"):
        config.validate(world_size=1)


def test_the_values_that_a_refusal_names_do_work(tmp_path):
    for words in ("train.micro_batch_size=3", "train.micro_batch_size=5", "train.global_batch_size=32"):
        argv = ["train.global_batch_size=30", "train.micro_batch_size=8", words, f"run_dir={tmp_path}"]
        config = parse(argv)
        config.validate(world_size=2)
        assert config.train.global_batch_size % (2 * config.train.micro_batch_size) == 0


def test_a_checkpoint_is_accepted_by_name_and_as_the_latest(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000030"
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text("{}")
    write_manifest(folder, Manifest(30, 1, {"trainer.json": hash_file(folder / "trainer.json", None)}), None)
    for resume in ("latest", folder, tmp_path):
        config = parse([f"run_dir={tmp_path}", f"resume={resume}"])
        config.validate(world_size=2)
        assert config.resume == str(resume)


# Help and files


def test_help_documents_every_key(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    entries: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        if line.startswith("  --"):
            key = line.split()[0].removeprefix("--").rstrip(",")
        entries[key] = f"{entries.get(key, '')} {line.strip()}"
    assert set(KNOWN) <= set(entries)
    for key in KNOWN:
        documented = " ".join(entries[key].split())
        before, _, after = documented.partition("(type: ")
        assert len(before.split()) > 5, f"{key} has no sentence: {documented}"
        assert "default: " in after, f"{key} has no default: {documented}"
    for option in ("--config", "--print-config", "--help"):
        assert option in text


def test_help_gives_a_unit_for_what_has_one():
    units = ("steps", "sequences", "tokens", "seconds", "channels", "absolute", "batches", "blocks")
    program = [sys.executable, "-c", "from mega_scale.config import parse; parse(['--help'])"]
    text = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(unit in text for unit in units)


def test_printed_config_runs_again_as_it_is(tmp_path, capsys):
    argv = [
        "optimizer.lr=1e-5",
        "train.sample_prompt=1e3: 'x' # y",
        "data.path=['0x1', 'true', 'ü']",
        "run_dir=2020-01-01",
    ]
    with pytest.raises(SystemExit) as ended:
        parse([*argv, "--print-config"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text).keys() == {field.name for field in dataclasses.fields(RunConfig)}
    assert parse(["--config", _file(tmp_path, text)]) == parse(argv)


@pytest.mark.parametrize(
    "prompt", ["", " ", "null", "1e5", "-", "0x10", "1_000", "~", "yes", "a: b", "two\nlines", ".5", "é"]
)
def test_saved_config_is_read_back_exactly(prompt, tmp_path):
    config = parse(["train.steps=7", "optimizer.eps=1.2345678901234567e-09", "parallel.ds_config.a.b=[1, 2.5, x]"])
    config.train.sample_prompt = prompt
    config.model.eos_token_id = [1, 2]
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_every_type_has_words():
    assert all("<class" not in describe(hint) and "typing" not in describe(hint) for hint in KNOWN.values())
