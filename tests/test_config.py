"""RunConfig: layers, refusals in one line, help, and files that run again as they are."""

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from launch.pretrain import main
from mega_scale.checkpoint.folder import Manifest, write_manifest
from mega_scale.checkpoint.run_folder import resume_path
from mega_scale.config import DEFAULT_CONFIG, RunConfig, load_config, model_config, parse, to_yaml
from mega_scale.files import hash_file
from mega_scale.model import MegaConfig, MegalodonConfig
from mega_scale.settings import describe, known_keys

KNOWN = known_keys(RunConfig)


class Tokenizer(SimpleNamespace):
    """What `model_config` asks of a tokenizer."""

    sep_token_id = None

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


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "010", 10),
        ("train.seed", "0x10", 16),
        ("train.seed", "1_000", 1000),
        ("optimizer.lr", "010.5", 10.5),
        ("optimizer.lr", "1e-3", 1e-3),
        ("train.max_time", "1:30", "1:30"),
        ("train.max_time", "1:30:00", "1:30:00"),
        ("model.eos_token_id", "[010, 8]", [10, 8]),
        ("parallel.ds_config", "{a: 010, b: 1:30, c: .5, d: 1.5e3}", {"a": 10, "b": "1:30", "c": 0.5, "d": 1500.0}),
    ],
)
def test_numbers_are_read_as_they_are_written(key, text, value, tmp_path):
    """And not as YAML 1.1 has them, for which 010 is eight and 1:30 is ninety."""
    section, name = key.split(".")
    for argv in ([f"{key}={text}"], ["--config", _file(tmp_path, f"{section}: {{{name}: {text}}}\n")]):
        found = getattr(getattr(parse(argv), section), name)
        assert found == value and type(found) is type(value), argv


@pytest.mark.parametrize("text", ["1:30", "1:30.5", "0o10"])
def test_what_is_no_number_to_people_is_none_to_us(text, tmp_path, capsys):
    for argv in ([f"train.steps={text}"], ["--config", _file(tmp_path, f"train: {{steps: {text}}}\n")]):
        assert f"train.steps={text!r} is not allowed: expected an integer" in _refusal(argv, capsys)


# The model section


def test_model_section_has_the_keys_and_defaults_of_each_configuration():
    ids = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
    ours = {"mega": RunConfig().model, "megalodon": parse(["--config", os.devnull, "model.type=megalodon"]).model}
    differing = {"mega": ids | {"is_decoder", "bidirectional"}, "megalodon": ids}
    for configuration in (MegaConfig, MegalodonConfig):
        name, reference = configuration.model_type, configuration()
        keys = {field.name for field in dataclasses.fields(ours[name])}
        assert keys == {"type", *configuration.__annotations__} and ours[name].type == name
        assert {key for key in keys - {"type"} if getattr(ours[name], key) != getattr(reference, key)} == differing[
            name
        ]
        assert {f"model.{key}" for key in keys} <= set(KNOWN)
        assert type(model_config(ours[name], TOKENIZER)) is configuration


def test_a_megalodon_takes_from_the_default_job_what_it_has(tmp_path, capsys):
    """Files that were asked for are its user's: a key of another family in one is refused."""
    found = parse(["model.type=megalodon", "model.num_attention_heads=2"])
    default = load_config(DEFAULT_CONFIG)
    assert (found.model.type, found.model.num_attention_heads, found.model.rope_base) == ("megalodon", 2, 1e4)
    assert found.model.hidden_size == default.model.hidden_size and found.model.chunk_size == default.model.chunk_size
    assert not hasattr(found.model, "use_chunking") and found.train == default.train
    dataclasses.replace(found, run_dir=str(tmp_path)).validate(world_size=1)
    message = _refusal(["--config", str(DEFAULT_CONFIG), "model.type=megalodon"], capsys)
    assert "model.use_chunking=true, model.normalization_type=" in message and "are keys of model.type=mega" in message


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (
            "model.num_attention_heads=2",
            [
                "model.num_attention_heads=2 is a key of model.type=megalodon",
                "has model.type=mega:",
                "leave it out, or set model.type=megalodon",
            ],
        ),
        ("model.type=mega model.swiglu=true", ["model.swiglu=true is a key of model.type=megalodon"]),
        (
            "model.type=megalodon model.use_chunking=false",
            ["model.use_chunking=false is a key of model.type=mega,", "leave it out, or set model.type=mega"],
        ),
        (
            "model.type=megalodon model.truncation=null model.is_decoder=true",
            ["model.truncation=null, model.is_decoder=true are keys of model.type=mega,", "leave them out"],
        ),
        ("model.type=llama", ["model.type='llama'", "one of mega, megalodon"]),
        ("model.type=megalodon model.rope=1", ["model.rope is not a key", "model.rope_base"]),
        ("model.type=megalodon model.swiglu=3", ["model.swiglu='3'", "true or false"]),
    ],
)
def test_keys_of_the_other_family_are_refused_by_name(words, fragments, tmp_path, capsys):
    tree: dict[str, str] = dict(word.removeprefix("model.").split("=") for word in words.split())
    text = "model:\n" + "".join(f"  {key}: {value}\n" for key, value in tree.items())
    for argv in (words.split(), ["--config", _file(tmp_path, text)]):
        message = _refusal(argv, capsys).replace("model.swiglu=3 ", "model.swiglu='3' ")
        assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("model.timestep_norm_groups=48", ["model.timestep_norm_groups=48", "hidden_size=128"]),
        ("model.num_attention_heads=3", ["shared_representation_size=64", "num_attention_heads=3"]),
        ("model.init_mode=zero", ["model.init_mode='zero'", "gaussian"]),
        ("model.chunk_size=100", ["model.chunk_size=100", "sequence_length=512", "500 or 600"]),
        ("model.vocab_size=0", ["model.vocab_size=0"]),
    ],
)
def test_a_megalodon_that_cannot_be_is_refused(words, fragments, tmp_path):
    config = parse(["model.type=megalodon", *words.split(), f"run_dir={tmp_path}"])
    with pytest.raises(ValueError) as refused:
        config.validate(world_size=1)
    assert all(fragment in str(refused.value) for fragment in fragments), refused.value


def test_vocabulary_and_special_tokens_follow_the_tokenizer_unless_set():
    config = model_config(parse(["model.eos_token_id=[1, 2]"]).model, TOKENIZER)
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id) == (300, 256, None)
    assert config.eos_token_id == [1, 2]
    assert model_config(parse(["model.vocab_size=320"]).model, TOKENIZER).vocab_size == 320
    with pytest.raises(ValueError, match=r"model\.vocab_size=299 .* less than the 300 ids of the tokenizer"):
        model_config(parse(["model.vocab_size=299"]).model, TOKENIZER)


# Refusals of keys and types


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


# Refusals of combinations: see tests/test_refusals.py


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
    with pytest.raises(ValueError, match=r"train\.compile=True .* a C\+\+ compiler"):
        parse([f"run_dir={tmp_path}", "parallel.device=cpu", "train.compile=true"]).validate(1)


def test_a_run_is_not_begun_anew_while_its_checkpoints_are_links_to_a_disk_that_is_gone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000030").symlink_to(tmp_path / "gone")
    assert resume_path(tmp_path, "auto") == tmp_path
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


def helped(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        parse(list(words))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_the_groups_of_keys_on_a_page(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = helped(capsys, "--help")
    assert text == helped(capsys, "train.steps=3", "-h") and len(text.splitlines()) < 45
    for group in {key.partition(".")[0] for key in KNOWN if "." in key}:
        own = [key for key in KNOWN if key.startswith(f"{group}.")]
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {group} ")]
        assert f"({len(own)} keys)" in text[text.index(line) :]
    assert "--help [GROUP | KEY | all]" in text and "--config" in text and "train.log_every" not in text


@pytest.mark.parametrize(
    ("topic", "keys"),
    [
        ("train", [key for key in KNOWN if key.startswith("train.")]),
        ("run", [key for key in KNOWN if "." not in key]),
        ("train.steps", ["train.steps"]),
        ("--train.eval-every", ["train.eval_every"]),
        ("warmup", [key for key in KNOWN if "warmup" in key]),
    ],
)
def test_help_on_a_group_a_key_or_a_word_documents_those_keys(topic, keys, capsys):
    for words in (["--help", topic], [f"--help={topic}"]) if not topic.startswith("--") else ([f"--help={topic}"],):
        lines = [line.split()[0] for line in helped(capsys, *words).splitlines() if line.startswith("  --")]
        assert lines == [f"--{key}" for key in keys]


def test_help_on_what_there_is_not_is_refused_in_a_line(capsys):
    assert "no such group or key, the nearest one is optimizer" in _refusal(["--help", "optimiser"], capsys)
    assert "--help lists the groups" in _refusal(["--help", "zzz"], capsys)
    with pytest.raises(SystemExit) as ended:
        parse(["--help", "zzz"], quiet=True)  # all ranks end alike
    assert ended.value.code == 2 and capsys.readouterr() == ("", "")


def test_help_on_all_documents_every_key(capsys):
    text = helped(capsys, "--help", "all")
    entries: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        if line.startswith("  --"):
            key = line.split()[0].removeprefix("--").rstrip(",")
        entries[key] = f"{entries.get(key, '')} {line.strip()}"
    assert set(KNOWN) <= set(entries)
    for configuration in (MegaConfig, MegalodonConfig):
        for name in configuration.__annotations__:
            families = " ".join(entries[f"model.{name}"].split()).partition("default: ")[2]
            assert configuration.model_type in re.findall(r"\w+", families), f"model.{name}: {families}"
    assert "default: false (mega))" in " ".join(entries["model.use_chunking"].split())
    for key in KNOWN:
        documented = " ".join(entries[key].split())
        before, _, after = documented.partition("(type: ")
        assert len(before.split()) > 5, f"{key} has no sentence: {documented}"
        assert "default: " in after, f"{key} has no default: {documented}"
    for option in ("--config", "--print-config", "--help"):
        assert option in text
    for unit in ("steps", "sequences", "tokens", "seconds", "channels", "absolute", "batches", "blocks"):
        assert unit in text


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


def test_a_printed_megalodon_has_its_own_keys_and_runs_again_as_it_is(tmp_path, capsys):
    argv = ["model.type=megalodon", "model.swiglu=true", "optimizer.decay=all"]
    with pytest.raises(SystemExit):
        parse([*argv, "--print-config"])
    text = capsys.readouterr().out
    assert list(yaml.safe_load(text)["model"]) == ["type", *MegalodonConfig.__annotations__]
    assert parse(["--config", _file(tmp_path, text)]) == parse(argv)
    config = parse(argv)
    assert load_config(_file(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    "prompt", ["", " ", "null", "1e5", "-", "0x10", "1_000", "~", "yes", "a: b", "two\nlines", ".5", "é"]
)
def test_saved_config_is_read_back_exactly(prompt, tmp_path):
    config = parse(["train.steps=7", "optimizer.eps=1.2345678901234567e-09", "parallel.ds_config.a.b=[1, 2.5, x]"])
    config.train.sample_prompt = prompt
    config.model.eos_token_id = [1, 2]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_a_file_that_an_earlier_version_wrote_is_read_and_its_keys_are_refused_to_users(tmp_path, capsys):
    path = _file(tmp_path, "parallel: {engine: fsdp, activation_checkpoint_keeps: products}\n")
    assert load_config(path).parallel.activation_checkpoint_policy == "save_matmuls"
    for argv in (["--config", path], ["parallel.activation_checkpoint_keeps=products"]):
        assert "is now parallel.activation_checkpoint_policy: set that one" in _refusal(argv, capsys)


def test_every_type_has_words():
    assert all("<class" not in describe(hint) and "typing" not in describe(hint) for hint in KNOWN.values())
