"""Named validation sets: what they may say, and what is read of them."""

import pytest

from mega_scale.data import DataConfig, load_datasets
from mega_scale.data.config import validation_sets
from mega_scale.data.tokenizer import load_tokenizer


@pytest.fixture
def texts(tmp_path):
    for name in ("train", "one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} text, again and again. " * 30)
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def config(texts, **changes) -> DataConfig:
    settings = {"source": "text", "path": [str(texts / "train.txt")], "validation_fraction": 0.0, "sequence_length": 32}
    return DataConfig(**(settings | {"cache_dir": str(texts / "cache")} | changes))


def one_set(texts, name: str, **keys) -> dict:
    return {"source": "text", "path": [str(texts / f"{name}.txt")], **keys}


def test_sets_are_read_whole_and_by_name(texts):
    sets = {"first": one_set(texts, "one"), "second.2": one_set(texts, "two")}
    given = config(texts, validation=sets, hub_split="train")
    given.validate()
    assert given.validates
    _, validation = load_datasets(given, load_tokenizer("byte"))
    assert list(validation.parts) == ["first", "second.2"]
    sizes = [len((texts / f"{name}.txt").read_bytes()) for name in ("one", "two")]
    assert [part.bytes for part in validation.parts.values()] == sizes
    assert validation.bytes == sum(sizes)
    _, alone = load_datasets(config(texts, validation={"first": sets["first"]}), load_tokenizer("byte"))
    assert alone.parts == {} and alone.bytes == sizes[0]


def test_a_mixture_has_a_set_for_each_source_that_holds_something_out(texts):
    mixture = {
        "a": one_set(texts, "one", validation_path=[str(texts / "two.txt")]),
        "b": one_set(texts, "two", validation_path=[str(texts / "one.txt")]),
        "c": one_set(texts, "train"),
    }
    base = DataConfig(mixture=mixture, validation_fraction=0.0, sequence_length=32, cache_dir=str(texts / "cache"))
    _, validation = load_datasets(base, load_tokenizer("byte"))
    assert list(validation.parts) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "entry", "fragments"),
    [
        ("x", {"path": ["one.txt"]}, ["data.validation.x", "give its source"]),
        ("x", "one.txt", ["data.validation.x='one.txt'", "give its source"]),
        ("x", {"source": "text"}, ["data.validation.x: data.path=None", "files or globs"]),
        ("x", {"source": "text", "path": ["gone.txt"]}, ["data.validation.x", "gone.txt", "no such file"]),
        ("x", {"source": "text", "path": [], "weight": 2}, ["data.validation.x.weight"]),
        ("x", {"source": "text", "path": [], "validation_fraction": 0.5}, ["data.validation.x.validation_fraction"]),
        ("x", {"source": "books"}, ["data.validation.x.source='books'"]),
        ("a/b", {"source": "python-stdlib"}, ["data.validation.a/b", "another name"]),
        ("held_out", {"source": "python-stdlib"}, ["data.validation.held_out", "another name"]),
    ],
)
def test_what_a_set_cannot_say_is_refused(texts, name, entry, fragments):
    with pytest.raises(ValueError) as refused:
        config(texts, validation={name: entry}).validate()
    assert all(fragment in str(refused.value) for fragment in fragments), refused.value


def test_names_of_sources_are_taken_and_empty_texts_refused(texts):
    mixture = {"a": one_set(texts, "one")}
    with pytest.raises(ValueError, match=r"data\.validation\.a: .*another name"):
        validation_sets(DataConfig(mixture=mixture, validation={"a": one_set(texts, "two")}))
    with pytest.raises(ValueError, match=r"data\.validation\.none: .*1 empty"):
        load_datasets(config(texts, validation={"none": one_set(texts, "empty")}), load_tokenizer("byte"))
