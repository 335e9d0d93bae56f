"""A streamed run sees the rows of the packed, unshuffled one, and continues where it stopped."""

import json

import numpy as np
import pytest
import torch

from mega_scale.data import DataConfig, Loader, load_datasets, load_tokenizer
from mega_scale.data.packing import MISSING, PackedDataset, StreamedDataset, cut_rows
from mega_scale.data.sources import Documents
from mega_scale.data.tokens import tokenise

TEXTS = [f"document {i} {'x' * (i * 7 % 40)}" for i in range(60)]


class Counted:
    """Documents that count how often they are read from their start."""

    def __init__(self, texts: list[str]) -> None:
        self.starts = 0
        self.texts = texts

    def read(self, order):
        self.starts += 1
        return iter(self.texts)


@pytest.mark.parametrize("length", [2, 3, 10])
@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [20], [3, 4, 21, 30, 59]])
def test_pieces_of_any_size_make_the_same_rows(cuts, length):
    rows = list(cut_rows(np.split(np.arange(60), cuts), length))
    assert len(rows) == -(-59 // length)
    for i, row in enumerate(rows):
        whole = list(range(i * length, min(i * length + length + 1, 60)))
        assert row.tolist() == whole + [MISSING] * (length + 1 - len(whole))


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_rows_are_the_packed_ones_over_many_epochs_and_in_any_order(packing, tmp_path):
    documents, tokenizer = of_texts(TEXTS), load_tokenizer("byte")
    packed = PackedDataset(tokenise(documents, tokenizer, DataConfig(cache_dir=str(tmp_path)), "name"), 16, packing)
    streamed = StreamedDataset(documents, tokenizer, 16, packing)
    n = len(packed)
    for indices in (np.arange(3 * n + 5), np.array([0]), np.array([7 * n + 2, 7 * n + 3]), np.array([n - 1, 1])):
        np.testing.assert_array_equal(streamed.rows(indices), packed.rows(indices % n))
    assert not streamed.holds(n + 1) and streamed.holds(n)


@pytest.mark.parametrize("start", [0, 3])
def test_text_is_read_once_an_epoch(start):
    counted = Counted(TEXTS)
    streamed = StreamedDataset(Documents(counted.read), load_tokenizer("byte"), 8)
    assert streamed.holds(10)
    streamed.rows(np.array([start]))
    before = counted.starts
    for index in range(start + 1, 100):
        streamed.rows(np.array([index]))
    assert counted.starts == before


@pytest.mark.parametrize("source", ["text", "json"])
def test_streamed_run_equals_the_unshuffled_one_and_resumes(source, tmp_path):
    if source == "json":
        path = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
        for file, texts in zip(path, (TEXTS[:25], TEXTS[25:]), strict=True):
            with open(file, "w") as out:
                out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    else:
        for i, text in enumerate(TEXTS):
            (tmp_path / f"{i:02}.txt").write_text(text)
        path = [str(tmp_path / "*.txt")]
    keys = {"source": source, "path": path, "sequence_length": 16, "shuffle": False, "validation_fraction": 0.1}
    keys |= {"cache_dir": str(tmp_path / "cache"), "validation_documents": 3}

    def loader(streaming: bool) -> Loader:
        train, validation = load_datasets(DataConfig(**keys, streaming=streaming), load_tokenizer("byte"))
        assert validation is not None
        validations.append(validation.fingerprint)
        sizes = {"global_batch_size": 8, "micro_batch_size": 2, "rank": 1, "world_size": 2}
        return Loader(train, **sizes, shuffle=False)

    validations: list[str] = []
    packed, streamed, resumed = loader(False), loader(True), loader(True)
    assert len(set(validations)) == 1
    steps = 3 * len(packed.dataset.datasets["text"]) // 8  # three epochs
    for step in range(steps):
        expected = packed.batches(step)
        found = streamed.batches(step)
        if step >= steps - 2:
            found += resumed.batches(step)
            expected += expected
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
            assert torch.equal(one["shift_labels"], other["shift_labels"])
    resumed.check(json.loads(json.dumps(streamed.state_dict(steps - 2))))
    with pytest.raises(ValueError, match="fingerprint"):
        resumed.check(packed.state_dict(0))


@pytest.mark.parametrize("shuffle", [False, True])
def test_several_workers_read_a_stream_like_the_process_itself(shuffle, tmp_path):
    """Forked from one process, they must not move each other's place in a file."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i} " * 300}) for i in range(600)))
    keys = {"source": "json", "path": [str(tmp_path / "a.jsonl")], "validation_fraction": 0.0, "sequence_length": 2048}
    config = DataConfig(**keys, streaming=True, shuffle=shuffle, shuffle_buffer=20)
    sizes = {"global_batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1, "shuffle": shuffle}
    plain, fed = (
        Loader(load_datasets(config, load_tokenizer("byte"))[0], **sizes, workers=workers) for workers in (0, 3)
    )
    for step in range(50):
        assert torch.equal(plain.batches(step)[0]["input_ids"], fed.batches(step)[0]["input_ids"])
    fed.close()


def of_texts(texts: list[str]) -> Documents:
    return Documents(lambda order: iter(texts))


def test_other_text_is_noticed():
    tokenizer = load_tokenizer("byte")
    one, same, other = (StreamedDataset(of_texts(texts), tokenizer, 8) for texts in (TEXTS, list(TEXTS), TEXTS[1:]))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_too_little_text_is_refused_before_the_first_step():
    tokenizer = load_tokenizer("byte")
    with pytest.raises(ValueError, match=r"less than one row of data.sequence_length=16"):
        StreamedDataset(of_texts(["short"]), tokenizer, 16)
    streamed = StreamedDataset(of_texts(["x" * 32]), tokenizer, 16)
    sizes = {"micro_batch_size": 1, "rank": 0, "world_size": 1, "shuffle": False}
    assert len(Loader(streamed, global_batch_size=2, **sizes).batches(5)) == 2
    with pytest.raises(ValueError, match=r"train.global_batch_size=3 .* fewer rows"):
        Loader(streamed, global_batch_size=3, **sizes)


def test_shuffled_stream_has_every_document_once_an_epoch_in_its_own_order(tmp_path):
    for i in range(12):
        lines = [json.dumps({"text": text}) for text in TEXTS[i * 5 : i * 5 + 5]]
        (tmp_path / f"{i:02}.jsonl").write_text("\n".join(lines) + "\n")
    keys = {"source": "json", "path": [str(tmp_path / "*.jsonl")], "validation_fraction": 0.0, "packing": "none"}
    config = DataConfig(**keys, sequence_length=64, streaming=True, shuffle_buffer=7, seed=3)
    tokenizer = load_tokenizer("byte")

    def epochs(config: DataConfig) -> list[list[str]]:
        stream, _ = load_datasets(config, tokenizer)
        rows = stream.rows(np.arange(3 * len(TEXTS)))
        texts = [tokenizer.decode(row[row > 2]) for row in rows]
        return [texts[i : i + len(TEXTS)] for i in range(0, len(texts), len(TEXTS))]

    found = epochs(config)
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in found)
    assert found == epochs(config)
    assert len({tuple(epoch) for epoch in found}) == 3 and TEXTS not in found
    # Files change places, so a first text comes from far behind the buffer.
    assert any(TEXTS.index(epoch[0]) >= 12 for epoch in found)
    config.seed = 4
    assert epochs(config) != found


def test_loader_and_stream_must_agree_on_the_order():
    streamed = StreamedDataset(of_texts(TEXTS), load_tokenizer("byte"), 8)
    with pytest.raises(ValueError, match=r"data.shuffle=True"):
        Loader(streamed, global_batch_size=1, micro_batch_size=1, rank=0, world_size=1, shuffle=True)
