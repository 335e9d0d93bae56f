"""The datasets of a run: every row of a mixture as often as it should be, and what is refused on the way."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from stores import store_of

from mega_scale.data import (
    DataConfig,
    Loader,
    Mixture,
    PackedDataset,
    StreamedDataset,
    load_datasets,
    load_tokenizer,
    load_whole,
)

L = 16
LENGTHS = np.random.default_rng(0).integers(2, 40, size=10_000)


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 1], [7, 3], [Fraction("0.7"), Fraction("0.2"), Fraction("0.1")], [1000, 1, 30, 30, 5], [1] * 9],
)
def test_every_source_has_its_share_at_any_time(weights):
    mixture, seen = weighted(weights), [0] * len(weights)
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    tokens, _ = mixture.read(0, 3000, 0, False)
    for row, source in enumerate(tokens[:, 0].tolist()):
        assert mixture.counts(row) == seen
        seen[source] += 1
        assert all(abs(count - (row + 1) * share) <= 2 for count, share in zip(seen, shares, strict=True))
    # As far as one likes, without having been there.
    far = 10**15 + 7
    (source,) = mixture.read(far, 1, 0, False)[0][:, 0]
    steps = [after - before for before, after in zip(mixture.counts(far), mixture.counts(far + 1), strict=True)]
    assert steps == [int(i == source) for i in range(len(weights))]


def test_whole_weights_are_met_exactly():
    weights = [311, 1, 4_000, 27]
    for times in (1, 2, 5):
        assert weighted(weights).counts(times * sum(weights)) == [times * weight for weight in weights]


def weighted(weights: list) -> Mixture:
    """Datasets of one row, whose tokens are the dataset's number."""
    datasets = {str(i): PackedDataset(store_of(np.full(L + 1, i)), L) for i in range(len(weights))}
    return Mixture(datasets, dict(zip(datasets, weights, strict=True)))


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    """10,000 documents in two sources, read once and twice in an epoch; a token is its document's number times 64 plus
    its offset."""
    tokens = np.concatenate([64 * i + np.arange(length) for i, length in enumerate(LENGTHS)])
    split, place = 7_000, int(LENGTHS[:7_000].sum())
    first = PackedDataset(store_of(tokens[:place], LENGTHS[:split], cuts=[1000, 1001, 6000]), L)
    second = PackedDataset(store_of(tokens[place:], LENGTHS[split:]), L, "none")
    return Mixture({"first": first, "second": second}, {"first": len(first), "second": 2 * len(second)})


GLOBAL = 120


def rows_of(mixture: Mixture, world: int, workers: int, steps: range, state: dict | None = None) -> torch.Tensor:
    """Inputs of all ranks, in the order of the global batch, (rows, L) with -1 behind the last token."""
    loaders = [
        Loader(
            mixture, global_batch_size=GLOBAL, micro_batch_size=GLOBAL // world, rank=rank, world_size=world, seed=5,
            workers=workers,
        )
        for rank in range(world)
    ]  # fmt: skip
    found = []
    for loader in loaders:
        if state is not None:
            loader.check(state)
    for step in steps:
        for loader in loaders:
            (batch,) = loader.batches(step)
            found.append(torch.where(batch["shift_labels"] == -100, -1, batch["input_ids"]))
    states = [json.dumps(loader.state_dict(steps.stop)) for loader in loaders]
    assert len(set(states)) == 1 and len(states[0]) < 1000
    for loader in loaders:
        loader.close()
    return torch.cat(found)


@pytest.fixture(scope="module")
def reference(mixture) -> torch.Tensor:
    steps = 2 * (len(mixture.datasets["first"]) + 2 * len(mixture.datasets["second"]))
    return rows_of(mixture, 1, 0, range(-(-steps // GLOBAL)))


def test_two_epochs_have_every_document_and_offset_as_often_as_weighted(mixture, reference):
    epoch = len(mixture.datasets["first"]) + 2 * len(mixture.datasets["second"])
    for epochs in (1, 2):
        rows = reference[: epochs * epoch]
        seen = Counter(rows[rows >= 0].tolist())
        # The token that ends a corpus, or a document that stands alone, is predicted and never read.
        expected = Counter()
        for i, length in enumerate(LENGTHS.tolist()):
            last = length - 1 if i >= 7_000 or i == 6_999 else length
            expected.update(dict.fromkeys(range(64 * i, 64 * i + last), epochs * (1 if i < 7_000 else 2)))
        assert seen == expected


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_ranks_and_workers_do_not_change_the_order(world, workers, mixture, reference):
    steps = range(len(reference) // GLOBAL)
    assert torch.equal(rows_of(mixture, world, workers, steps), reference)


@pytest.mark.slow
def test_three_resumes_on_other_numbers_of_ranks_go_on_with_the_next_row(mixture, reference):
    steps, found, state = len(reference) // GLOBAL, [], None
    borders = [0, steps // 5, steps // 2, steps // 2 + 1, steps]
    for world, workers, start, stop in zip((2, 4, 1, 3), (0, 2, 0, 0), borders, borders[1:], strict=False):
        found.append(rows_of(mixture, world, workers, range(start, stop), state))
        loader = Loader(mixture, global_batch_size=GLOBAL, micro_batch_size=GLOBAL, rank=0, world_size=1, seed=5)
        state = json.loads(json.dumps(loader.state_dict(stop)))
    assert torch.equal(torch.cat(found), reference)


def test_progress_by_source_is_exact_at_the_end_of_an_epoch(mixture):
    first, second = mixture.datasets["first"], mixture.datasets["second"]
    loader = Loader(mixture, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1)
    report = loader.report(2 * (len(first) + 2 * len(second)))
    places = L * 2 * (len(first) + 2 * len(second))
    assert report.pop("padding") == pytest.approx(1 - (2 * first.labels + 4 * second.labels) / places)
    assert report == {
        "tokens/first": 2 * first.labels, "epochs/first": 2.0, "tokens/second": 4 * second.labels, "epochs/second": 4.0,
    }  # fmt: skip


def test_mixture_from_a_configuration(tmp_path):
    for name, count in (("code", 40), ("prose", 10)):
        lines = [json.dumps({"body": f"{name} {i} {'x' * 30}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    entries = {
        name: {"source": "json", "path": str(tmp_path / f"{name}.jsonl"), "text_column": "body", "epochs": epochs}
        for name, epochs in (("code", 1), ("prose", 2.5))
    }
    config = DataConfig(mixture=entries, sequence_length=32, validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    config.validate()
    train, validation = load_datasets(config, load_tokenizer("byte"))
    assert isinstance(train, Mixture) and validation is not None and config.validates
    rows = {name: len(dataset) for name, dataset in train.datasets.items()}
    one = Loader(train, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1)
    progress = one.state_dict(10 * (2 * rows["code"] + 5 * rows["prose"]))["sources"]
    assert (progress["code"]["epochs"], progress["prose"]["epochs"]) == (20, 50)
    text = load_tokenizer("byte").decode(
        [t for row in validation.rows(np.arange(len(validation))) for t in row if t > 2]
    )
    assert "code" in text and "prose" in text
    loader = Loader(train, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1)
    entries["prose"]["epochs"] = 2
    other, _ = load_datasets(config, load_tokenizer("byte"))
    with pytest.raises(ValueError, match="fingerprint"):
        Loader(other, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1).check(loader.state_dict(3))
    entries["prose"] |= {"streaming": True, "validation_documents": 2}
    with pytest.raises(ValueError, match=r"data.mixture.prose.validation_documents is not a key"):
        load_datasets(config, load_tokenizer("byte"))


def test_stream_in_a_mixture_needs_weights(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {i}" * 9}) for i in range(30)))
    entry = {"source": "json", "path": str(tmp_path / "a.jsonl"), "streaming": True, "validation_fraction": 0}
    keys = {"sequence_length": 32, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"data.mixture.web.*weight"):
        load_datasets(DataConfig(mixture={"web": entry}, **keys), load_tokenizer("byte"))
    mixture = {"web": entry | {"weight": 0.25}, "again": entry | {"streaming": False, "weight": 0.75}}
    train, validation = load_datasets(DataConfig(mixture=mixture, **keys), load_tokenizer("byte"))
    assert validation is None
    loader = Loader(train, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1)
    assert loader.batches(0)[0]["input_ids"].shape == (8, 32)
    assert loader.report(1)["tokens/web"] == 64 and "epochs/web" not in loader.report(1)


def text_config(folder, texts: dict[str, str], **keys) -> DataConfig:
    for name, text in texts.items():
        (folder / name).write_text(text)
    keys = {"validation_path": [str(folder / "valid.txt")]} | keys
    path = [str(folder / "train*.txt")]
    return DataConfig(source="text", path=path, sequence_length=16, cache_dir=str(folder / "cache"), **keys)


def test_default_corpus_is_split_and_packed(tmp_path):
    train, validation = load_datasets(DataConfig(cache_dir=str(tmp_path)), load_tokenizer("byte"))
    assert isinstance(train, PackedDataset) and validation is not None
    assert len(train) > 5_000 and len(validation) > 100
    assert 0.01 < validation.tokens / train.tokens < 0.15
    # One token a byte, and one a document.
    assert 0 < train.tokens - train.bytes < 1000
    first = load_tokenizer("byte").decode(train.rows(np.array([0]))[0])
    assert first.isprintable() or "\n" in first


def test_training_and_validation_text(tmp_path):
    config = text_config(tmp_path, {"train1.txt": "one " * 20, "train2.txt": "two " * 20, "valid.txt": "held " * 10})
    tokenizer = load_tokenizer("byte")
    train, validation = load_datasets(config, tokenizer)
    assert (train.tokens, train.bytes) == (162, 160)
    assert validation is not None and (validation.tokens, validation.bytes) == (51, 50)
    assert tokenizer.decode(validation.rows(np.array([0]))[0]) == ("held " * 10)[:17]
    config.streaming, config.shuffle = True, False
    train, _ = load_datasets(config, tokenizer)
    assert isinstance(train, StreamedDataset)
    config.validation_path, config.validation_fraction = None, 0.0
    assert load_datasets(config, tokenizer)[1] is None


def test_whole_text_holds_nothing_out(tmp_path):
    config = text_config(tmp_path, {"train1.txt": "one " * 20}, validation_path=None, validation_fraction=0.9)
    whole = load_whole(config, load_tokenizer("byte"))
    assert (whole.tokens, whole.bytes, len(whole)) == (81, 80, 5)
    (tmp_path / "train1.txt").write_text("short")
    whole = load_whole(config, load_tokenizer("byte"))
    assert (len(whole), whole.tokens) == (1, 6)


@pytest.mark.parametrize(
    ("texts", "keys", "named"),
    [
        ({"train.txt": "", "valid.txt": "x" * 99}, {}, ["1 of 1 rows", "1 empty", "train.txt, line 1"]),
        ({"train.txt": "short", "valid.txt": "x" * 99}, {}, ["to train on", "6 tokens", "data.path="]),
        ({"train.txt": "x" * 99, "valid.txt": "short"}, {}, ["to validate on", "6 tokens", "more validation text"]),
        (
            {"train.txt": "x" * 99},
            {"validation_path": None},
            ["to validate on", "0 tokens", "data.validation_fraction=0.05", "data.validation_path"],
        ),
        (
            {"train.txt": "x" * 99},
            {"validation_path": None, "validation_fraction": 0.999},
            ["to train on", "0 tokens", "data.validation_fraction=0.999"],
        ),
        ({}, {}, ["data.path=", "matches no file"]),
    ],
)
def test_too_little_text_is_refused(texts, keys, named, tmp_path):
    with pytest.raises(ValueError) as refusal:
        load_datasets(text_config(tmp_path, texts, **keys), load_tokenizer("byte"))
    for words in named:
        assert words in str(refusal.value)


def test_no_text_at_all_cannot_be_evaluated_on(tmp_path):
    config = text_config(tmp_path, {"train.txt": ""}, validation_path=None, max_bad_share=1.0)
    with pytest.raises(ValueError, match="holds no text"):
        load_whole(config, load_tokenizer("byte"))


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_file_of_json_is_refused(streaming, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    config = DataConfig(
        source="json",
        path=[str(tmp_path / "a.jsonl")],
        cache_dir=str(tmp_path / "cache"),
        streaming=streaming,
        shuffle=False,
        validation_fraction=0.0,
    )
    with pytest.raises(ValueError, match=r"the text to train on.* less than one row"):
        load_datasets(config, load_tokenizer("byte"))
