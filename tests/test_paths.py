"""Every path that a user gives is local, and `~` in it is a home folder: keys, lists, globs, mixtures and arguments."""

import importlib
import os
import pwd

import pytest
from commands import exit_code

from mega_scale import export
from mega_scale.config import parse
from mega_scale.data import DataConfig
from mega_scale.data.config import mixture_entries

KEYS = ("run_dir", "resume", "init_from", "data.cache_dir", "data.tokenizer", "data.hub_name", "checkpoint.key_file")
LISTS = ("data.path", "data.validation_path")
# What needs a package that is not installed here, of places in object stores.
REMOTE = {"GS://b/x": "gcsfs", "abfss://c@a.net/x": "adlfs"}
STORES = ("s3://b/x", "s3:/b/x", "GS://b/x", "file:///x", "hf://datasets/a/b", " hdfs://n/x", "abfss://c@a.net/x")


def refusal(capsys, act):
    assert exit_code(lambda _: act()) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize("key", [*KEYS, *LISTS])
def test_a_store_is_refused_in_every_key(key, capsys):
    takes = key in ("run_dir", "resume")  # in these, runs may lie in an object store
    for store in STORES if not takes else ("s3:/b/x", "file:///x", *REMOTE):
        line = refusal(capsys, lambda store=store: parse([f"{key}={store}"]))
        assert (REMOTE[store] if takes and store in REMOTE else f"{key}=") in line
        assert ("needs" if takes and store in REMOTE else "is no local path") in line
    if key in LISTS:
        assert "s3://b/*.txt" in refusal(capsys, lambda: parse([f"{key}=[a.txt, 's3://b/*.txt']"]))


@pytest.mark.parametrize("key", [*KEYS, *LISTS])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_path_does_not_mean_the_working_directory(key, value, capsys):
    assert f"{key}={value!r} names nothing" in refusal(capsys, lambda: parse([f"{key}={value}"]))


def test_a_store_is_refused_in_files_and_mixtures(tmp_path, capsys):
    assert "--config" in refusal(capsys, lambda: parse(["--config", "s3://b/run.yaml"]))
    (tmp_path / "run.yaml").write_text("data: {path: 's3://b/x'}\n")
    assert "data.path" in refusal(capsys, lambda: parse(["--config", str(tmp_path / "run.yaml")]))
    for path in ("s3://b/x", ["a", "s3:/b/x"]):
        with pytest.raises(ValueError, match=r"data\.mixture\.web: data\.path='s3:.*is no local path"):
            DataConfig(mixture={"web": {"source": "text", "path": path}}).validate()


@pytest.mark.parametrize("user", ["~", "~" + pwd.getpwuid(os.geteuid()).pw_name])
def test_home_folders_are_meant_in_every_key(user, capsys):
    home = os.path.expanduser(user)
    config = parse([f"{key}={user}/x" for key in KEYS] + [f"{key}=[{user}/*.txt, b]" for key in LISTS])
    found = (config.run_dir, config.resume, config.init_from, config.data.cache_dir, config.data.tokenizer)
    assert {*found, config.data.hub_name, config.checkpoint.key_file} == {f"{home}/x"}
    assert config.data.path == config.data.validation_path == [f"{home}/*.txt", "b"]
    [(source, *_)] = mixture_entries(DataConfig(mixture={"web": {"source": "text", "path": f"{user}/a"}})).values()
    assert source.path == [f"{home}/a"]
    assert "no such user" in refusal(capsys, lambda: parse(["run_dir=~nobody-of-this-name/x"]))


def test_a_home_folder_alone_is_no_null():
    for key in KEYS:
        section, _, name = key.rpartition(".")
        config = parse([f"{key}=~"])
        assert getattr(getattr(config, section) if section else config, name) == os.path.expanduser("~")
    assert parse(["data.cache_dir=null"]).data.cache_dir is None


def test_names_and_strange_local_names_stay():
    config = parse(["run_dir=./s3://b", "data.tokenizer=owner/name", "data.hub_name=owner/name", "resume=latest"])
    assert (config.run_dir, config.data.tokenizer, config.data.hub_name) == ("./s3://b", "owner/name", "owner/name")
    assert config.resume == "latest" and parse(["run_dir=a:b"]).run_dir == "a:b"


@pytest.mark.parametrize(
    "command,words",
    [
        ("prepare", "{} data.source=text data.path=x"),
        ("prepare", "out data.source=text data.path={}"),
        ("train_tokenizer", "{} data.source=text data.path=x"),
        ("export", "{} out"),
        ("export", "run {}"),
        ("export", "run out --key-file {}"),
        ("import_fairseq", "{} out"),
        ("import_fairseq", "model.pt {}"),
        ("import_fairseq", "model.pt out --dictionary {}"),
        ("import_fairseq", "model.pt out --tokenizer {}"),
        ("import_megalodon", "{} out"),
        ("import_megalodon", "in {}"),
        ("import_megalodon", "in out --tokenizer {}"),
        ("checkpoint", "list {}"),
        ("checkpoint", "convert run {}"),
        ("checkpoint", "convert run out --new-key-file {}"),
        ("plot", "{}"),
        ("plot", "run --output {}"),
        ("generate", "{}"),
        ("generate", "run --key-file {}"),
        ("evaluate", "{} text"),
        ("evaluate", "run {}"),
    ],
)
def test_commands_refuse_stores_too(command, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = export.main if command == "export" else importlib.import_module(f"launch.{command}").main
    for store in ("gs://b/x", "s3:/b/x", "~nobody-of-this-name/x"):
        line = refusal(capsys, lambda store=store: main(words.format(store).split()))
        assert "is no local path" in line or "no such user" in line or "'gs://b/x' needs gcsfs" in line
    assert not list(tmp_path.iterdir())
