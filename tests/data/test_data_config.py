"""DataConfig refuses what cannot work, by key, value and remedy."""

import time
from pathlib import Path

import pytest

from mega_scale.data.config import DataConfig, expand_paths


def test_defaults_are_valid():
    config = DataConfig()
    config.validate()
    assert config.source == "python-stdlib" and config.validates


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"source": "csv"}, ["data.source='csv'", "python-stdlib, text, json, parquet, arrow, hub, prepared"]),
        ({"source": "text"}, ["data.path=None", "files or globs"]),
        ({"source": "text", "path": []}, ["data.path=[]"]),
        ({"source": "text", "path": ["missing.txt"]}, ["data.path='missing.txt'", "no such file"]),
        ({"source": "text", "path": ["a.txt", "*.md"]}, ["data.path='*.md'", "matches no file"]),
        ({"source": "text", "path": ["."]}, ["data.path='.'", "folder"]),
        ({"source": "text", "path": ["a.txt"], "validation_path": ["b.txt"]}, ["data.validation_path='b.txt'"]),
        ({"source": "text", "path": ["a.txt"], "validation_path": []}, ["data.validation_path=[]"]),
        ({"source": "text", "path": ["a.txt"], "hub_name": "x/y"}, ["data.hub_name='x/y'", "null"]),
        ({"path": ["a.txt"]}, ["data.path=['a.txt']", "python-stdlib"]),
        ({"validation_path": ["a.txt"]}, ["data.validation_path=['a.txt']"]),
        ({"validation_split": "test"}, ["data.validation_split='test'", "hub"]),
        ({"source": "hub"}, ["data.hub_name=None"]),
        ({"source": "hub", "hub_name": "a/b/c"}, ["data.hub_name='a/b/c'"]),
        ({"source": "hub", "hub_name": "a/b", "hub_split": ""}, ["data.hub_split=''"]),
        ({"source": "hub", "hub_name": "a/b", "validation_split": "train"}, ["data.validation_split='train'"]),
        ({"source": "json", "path": ["a.txt"], "text_column": ""}, ["data.text_column=''"]),
        ({"validation_fraction": 1.0}, ["data.validation_fraction=1.0"]),
        ({"validation_fraction": -0.1}, ["data.validation_fraction=-0.1"]),
        ({"validation_fraction": float("nan")}, ["data.validation_fraction=nan"]),
        ({"validation_documents": 0}, ["data.validation_documents=0"]),
        ({"max_documents": 0}, ["data.max_documents=0"]),
        ({"sequence_length": 1}, ["data.sequence_length=1", "at least 2"]),
        ({"seed": -1}, ["data.seed=-1"]),
        ({"streaming": True, "shuffle": False}, ["data.streaming=True", "python-stdlib"]),
        ({"source": "json", "path": ["a.txt"], "max_bad_share": 1.5}, ["data.max_bad_share=1.5"]),
        ({"max_document_bytes": 0}, ["data.max_document_bytes=0"]),
        ({"workers": -1}, ["data.workers=-1"]),
        ({"prefetch": 0}, ["data.prefetch=0"]),
        ({"shuffle_buffer": 0}, ["data.shuffle_buffer=0"]),
        ({"packing": "resets"}, ["data.packing='resets'", "none, concat, reset"]),
        ({"packing_order": "first_fit"}, ["data.packing_order='first_fit'", "in_order, best_fit"]),
        ({"packing_order": "best_fit"}, ["data.packing_order='best_fit'", "data.packing='concat'", "packing=reset"]),
        ({"packing": "reset", "document_alignment": 8}, ["data.document_alignment=8", "data.packing_order=best_fit"]),
        (
            {"packing": "reset", "packing_order": "best_fit", "document_alignment": 48},
            ["data.document_alignment=48", "data.sequence_length=512"],
        ),
        ({"packing": "reset", "packing_order": "best_fit", "document_alignment": 0}, ["data.document_alignment=0"]),
        (
            {"source": "text", "path": ["a.txt"], "streaming": True, "validation_fraction": 0.0, "packing": "reset"},
            ["data.packing='reset'", "data.streaming=false"],
        ),
        ({"length_schedule": []}, ["data.length_schedule=[]", "[[0, 512], [1000, 1024]]"]),
        ({"length_schedule": [[0, 64, 1]]}, ["data.length_schedule=[[0, 64, 1]]", "pairs"]),
        ({"length_schedule": [[5, 64]]}, ["data.length_schedule=[[5, 64]]", "begin at 0"]),
        ({"length_schedule": [[0, 64], [9, 128], [9, 256]]}, ["[0, 9, 9]", "ascend"]),
        ({"length_schedule": [[0, 100]]}, ["100", "data.sequence_length=512", "64, 128"]),
        ({"length_schedule": [[0, 1]]}, ["a length of 1", "data.sequence_length=512", "2, 4, 8"]),
        ({"length_schedule": [[0, 1024]]}, ["a length of 1024", "512"]),
        ({"source": "prepared"}, ["data.path=None", "one folder"]),
        ({"source": "prepared", "path": ["a", "b"]}, ["data.path=['a', 'b']", "data.mixture"]),
        ({"source": "prepared", "path": ["."]}, ["data.path=['.']", "manifest.json", "launch/prepare.py"]),
        ({"mixture": {}}, ["data.mixture={}"]),
        ({"mixture": {"a": "b"}}, ["data.mixture.a='b'"]),
        ({"mixture": {"a": {"paht": "a.txt"}}}, ["data.mixture.a.paht is not a key", "data.mixture.a.path"]),
        ({"mixture": {"a": {"path": 5}}}, ["data.mixture.a.path=5", "a list of text"]),
        ({"mixture": {"a": {"max_documents": "3"}}}, ["data.mixture.a.max_documents='3'", "an integer or null"]),
        ({"mixture": {"a": {"weight": True}}}, ["data.mixture.a.weight=True", "a number"]),
        ({"mixture": {"a": {"weight": 0}}}, ["data.mixture.a.weight=0", "above 0"]),
        ({"mixture": {"a": {"weight": 1, "epochs": 1}}}, ["data.mixture.a", "one of them"]),
        ({"mixture": {"a": {"weight": 1}, "b": {"epochs": 1}}}, ["data.mixture", "the same"]),
        ({"mixture": {"a": {"source": "text", "path": "b.txt"}}}, ["data.mixture.a: data.path='b.txt'"]),
        ({"mixture": {"a": {}}, "source": "json"}, ["data.source='json'", "data.mixture"]),
        (
            {"source": "text", "path": ["a.txt"], "streaming": True, "shuffle": False},
            ["data.validation_documents=None", "validation_fraction=0"],
        ),
        ({"tokenizer": "./nowhere"}, ["data.tokenizer='./nowhere'", "no such folder"]),
        ({"tokenizer": "a/b/c"}, ["data.tokenizer='a/b/c'"]),
        ({"cache_dir": "a.txt"}, ["data.cache_dir='a.txt'", "file"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(keys, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    with pytest.raises(ValueError) as refusal:
        DataConfig(**keys).validate()
    assert "\n" not in str(refusal.value)
    for words in named:
        assert words in str(refusal.value)


def test_validation_reads_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff" * 10)  # reading it as UTF-8 would fail
    started = time.perf_counter()
    DataConfig(source="text", path=[str(tmp_path / "*.txt")], validation_path=[str(tmp_path / "a.txt")]).validate()
    assert time.perf_counter() - started < 1


def test_globs_are_sorted_and_every_file_is_named_once(tmp_path):
    for name in ("b.txt", "a.txt", "c[1].txt", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = expand_paths([str(tmp_path / "c[1].txt"), str(tmp_path / "**" / "*.txt"), str(tmp_path / "a.txt")], "path")
    assert [Path(file).relative_to(tmp_path).as_posix() for file in found] == [
        "c[1].txt",
        "a.txt",
        "b.txt",
        "sub/d.txt",
    ]
