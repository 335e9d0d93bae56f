"""Documents of every source are what was written, in an order that is fixed, and the held-out part shares no text."""

import gzip
import json
import os
import re
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mega_scale.data.config import DataConfig, find_on_hub
from mega_scale.data.sources import is_held_out, load_corpus, load_documents, shuffled, stdlib_documents

TEXTS = [f"document {i}: ünïcode 😀 {'x' * i}\nsecond line" for i in range(200)]


def write(folder: Path, source: str) -> list[str]:
    """Write TEXTS in one of the formats; the globs to read them by."""
    if source == "text":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:03}[x].txt").write_text(text, encoding="utf-8")
        return [str(folder / "*.txt")]
    if source == "json":
        rows = [json.dumps({"text": text, "number": i}) for i, text in enumerate(TEXTS)]
        (folder / "a.jsonl").write_text("\n".join(rows[:50]) + "\n", encoding="utf-8")
        with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(rows[50:]) + "\n")
        return [str(folder / "a.jsonl"), str(folder / "b.jsonl.gz")]
    pq.write_table(pa.table({"text": TEXTS, "number": list(range(len(TEXTS)))}), folder / "a.parquet")
    return [str(folder / "a.parquet")]


def config_of(folder: Path, source: str, **keys) -> DataConfig:
    return DataConfig(source=source, path=write(folder, source), cache_dir=str(folder / "cache"), **keys)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", ["text", "json", "parquet"])
def test_documents_come_back_in_order_and_again(source, streaming, tmp_path):
    config = config_of(tmp_path, source, streaming=streaming, shuffle=False, validation_documents=5)
    documents = load_documents(config)
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS
    config.max_documents = 7
    assert list(load_documents(config)) == TEXTS[:7]


def test_a_hub_data_set_is_read_by_name_config_and_splits(tmp_path):
    folder = tmp_path / "owner-name"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"body": f"the {split} text"}) + "\n")
    keys = {"source": "hub", "hub_name": str(folder), "text_column": "body", "cache_dir": str(tmp_path / "cache")}
    corpus = load_corpus(DataConfig(**keys, validation_split="test"))
    assert list(corpus.train) == ["the train text"]
    assert corpus.validation is not None and list(corpus.validation) == ["the test text"]
    with pytest.raises(ValueError, match=r"data.hub_split='nowhere'.*cannot be loaded"):
        load_corpus(DataConfig(**keys, hub_split="nowhere"))


def test_held_out_part_is_disjoint_even_where_texts_repeat(tmp_path):
    rows = [{"text": text} for text in TEXTS + TEXTS[::-1] + TEXTS[:30]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    keys = {"source": "json", "path": [str(tmp_path / "a.jsonl")], "cache_dir": str(tmp_path / "cache")}
    corpus = load_corpus(DataConfig(**keys, validation_fraction=0.2))
    train, validation = list(corpus.train), list(corpus.validation or [])
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(row["text"] for row in rows)
    assert 0.1 < len(validation) / len(rows) < 0.3
    # Order and company do not matter: the text alone decides.
    assert set(validation) == {text for text in TEXTS if is_held_out(text, 0.2)}
    # A larger share holds out more, never other texts.
    assert {text for text in TEXTS if is_held_out(text, 0.1)} < set(validation)


def test_size_of_the_held_out_part_can_be_bounded_and_training_never_sees_the_rest(tmp_path):
    config = config_of(tmp_path, "parquet", validation_fraction=0.3, validation_documents=4)
    corpus = load_corpus(config)
    held_out = [text for text in TEXTS if is_held_out(text, 0.3)]
    assert list(corpus.validation or []) == held_out[:4]
    assert not set(corpus.train) & set(held_out)


def test_validation_text_of_its_own_or_none(tmp_path):
    (tmp_path / "valid.txt").write_text("held out")
    config = config_of(tmp_path, "text", validation_path=[str(tmp_path / "valid.txt")])
    config.path = [str(tmp_path / "0*.txt")]
    corpus = load_corpus(config)
    assert list(corpus.train) == TEXTS[:100]
    assert list(corpus.validation or []) == ["held out"]
    assert load_corpus(config_of(tmp_path, "parquet", validation_fraction=0.0)).validation is None


def test_empty_texts_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": " "}\n')
    config = DataConfig(source="json", path=[str(tmp_path / "a.jsonl")], max_bad_share=0.5)
    documents = load_documents(config)
    assert list(documents) == list(documents) == ["one", " "]
    assert documents.tally.to_json()["bad"] == {str(tmp_path / "a.jsonl"): {"empty": 2}}


def test_changed_file_is_read_anew(tmp_path):
    file = tmp_path / "a.txt"
    config = DataConfig(source="text", path=[str(file)], cache_dir=str(tmp_path / "cache"))
    file.write_text("before")
    assert list(load_documents(config)) == ["before"]
    file.write_text("after it")
    assert list(load_documents(config)) == ["after it"]


def test_digest_depends_on_texts_and_order(tmp_path):
    def digest(*texts: str) -> str:
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        config = DataConfig(source="json", path=[str(tmp_path / "a.jsonl")], cache_dir=str(tmp_path / "cache"))
        return load_documents(config).digest()

    assert digest("ab", "c") == digest("ab", "c")
    assert len({digest("ab", "c"), digest("c", "ab"), digest("a", "bc"), digest("abc")}) == 4


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "source", "keys", "named"),
    [
        ("a.jsonl", b'{"body": "x", "n": 1}\n', "json", {}, ["data.text_column='text'", "body, n"]),
        ("a.jsonl", b'{"text": 5}\n', "json", {}, ["data.text_column='text'", "int, not text"]),
        ("a.jsonl", b'{"text": "x"\n{"te', "json", {}, ["a.jsonl, line 2", "cannot be used", "JSON"]),
        ("a.txt", b"\xff\xfe\x00", "text", {}, ["a.txt, line 1", "cannot be used", "utf-8"]),
        ("a.parquet", b"no parquet", "parquet", {}, ["a.parquet", "cannot be read"]),
    ],
)
def test_unreadable_sources_are_refused(name, content, source, keys, named, streaming, tmp_path):
    (tmp_path / name).write_bytes(content)
    config = DataConfig(
        source=source, path=[str(tmp_path / name)], cache_dir=str(tmp_path / "cache"), streaming=streaming, **keys
    )
    with pytest.raises(ValueError) as refusal:
        list(load_documents(config))
    for words in named:
        assert words in str(refusal.value)


@pytest.mark.parametrize(("answer", "named"), [("absent", "correct the name"), ("unreachable", "cannot be reached")])
def test_hub_data_set_that_cannot_be_fetched_is_refused_at_once(answer, named, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("mega_scale.data.readers.find_on_hub", lambda name, kind: answer)
    with pytest.raises(ValueError, match=rf"data.hub_name='no/such'.*{named}"):
        load_documents(DataConfig(source="hub", hub_name="no/such"))


def test_hub_that_does_not_answer_is_unreachable(monkeypatch):
    def refuse(*arguments, **keys):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refuse)
    assert find_on_hub("owner/name", "dataset") == "unreachable"


def test_offline_hub_data_set_that_was_never_fetched_is_refused(tmp_path):
    config = DataConfig(source="hub", hub_name="no/such", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"data.hub_name='no/such'.*cannot be loaded"):
        load_documents(config)


DIGEST = """
import hashlib
from mega_scale.data.sources import stdlib_documents
print(hashlib.sha256("\\0".join(stdlib_documents()).encode()).hexdigest())
"""


def test_sources_and_built_in_documentation_are_there():
    documents = list(stdlib_documents())
    assert sum(len(text.encode()) for text in documents) > 5e6
    with tokenize.open(textwrap.__file__) as file:
        assert file.read() in documents
    documented = "\n".join(text for text in documents if text.startswith(("math\n", "itertools\n")))
    assert "math.hypot" in documented and "itertools.chain" in documented
    assert not any("site-packages" in text[:200] for text in documents)


@pytest.mark.slow
def test_every_process_sees_the_same():
    command = [sys.executable, "-c", DIGEST]
    found = [
        subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE)
        for seed in ("1", "2")
    ]
    one, other = (process.communicate()[0] for process in found)
    assert one == other and len(one) == 65


def test_documentation_shows_no_addresses():
    documented = [text for text in stdlib_documents() if re.match(r"\w+\n", text)]
    assert documented
    assert not any(re.search(r" at 0x[0-9a-f]{6,}>", text) for text in documented)


def test_split_is_disjoint():
    corpus = load_corpus(DataConfig())
    train, validation = set(corpus.train), set(corpus.validation or [])
    assert len(validation) > 10 and not train & validation
    assert train | validation == {text for text in stdlib_documents() if text}


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097, 100_003])
def test_every_row_occurs_once(length):
    found = shuffled(np.arange(length), length, seed=3, epoch=1)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(np.sort(found), np.arange(length))


def test_places_can_be_looked_up_on_their_own():
    whole = shuffled(np.arange(1000), 1000, seed=7, epoch=2)
    places = np.array([999, 0, 500, 500])
    np.testing.assert_array_equal(shuffled(places, 1000, seed=7, epoch=2), whole[places])


def test_order_is_fixed_for_ever():
    """Another order would make every checkpoint of before continue on other rows."""
    assert shuffled(np.arange(10), 10, seed=0, epoch=0).tolist() == [3, 7, 4, 6, 5, 2, 1, 0, 9, 8]


def test_seeds_and_epochs_differ():
    orders = [shuffled(np.arange(1000), 1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        for other in [np.arange(1000), *orders[:i]]:
            assert (order == other).mean() < 0.02  # one in a thousand by chance


def test_rows_go_everywhere():
    """Over many epochs each of 10 rows stands at each of 10 places about equally often."""
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        counts[np.arange(10), shuffled(np.arange(10), 10, seed=5, epoch=epoch)] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 130  # 81 degrees of freedom: above this once in 2,000 tries


def test_texts_of_a_function_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "def texts():\n    return [f'text {n}' for n in range(50)]\n\nbad, number = lambda: [1], 3\n"
    )
    config = DataConfig("own", reader="own.py:texts", validation_fraction=0.2)
    config.validate()
    corpus = load_corpus(config)
    assert sorted([*corpus.train, *corpus.validation], key=lambda text: int(text[5:])) == [
        f"text {n}" for n in range(50)
    ]
    assert [*load_documents(config)] == [f"text {n}" for n in range(50)]
    for reader, problem in {
        None: "name a function",
        "own.py": "name a function",
        "own.py:none": "has no none",
        "gone.py:x": "No such file",
    }.items():
        with pytest.raises(ValueError, match=problem):
            DataConfig("own", reader=reader).validate()
    with pytest.raises(ValueError, match="gives a int as text 0: give str"):
        list(load_documents(DataConfig("own", reader="own.py:bad")))
    with pytest.raises(ValueError, match=r"data\.reader.*only source own"):
        DataConfig(reader="own.py:texts").validate()
