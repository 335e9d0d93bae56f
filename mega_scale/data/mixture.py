"""The datasets of a run: one source or several by weight, and what is held out to validate on.

Which source has a row of the run, and which of its rows it is, is computed from the number of the row alone, in exact
arithmetic. Sources are the leaves of a binary tree; of the first n rows of a node, its left child has
floor(n w_left / w + 1/2). So after any number of rows every source is within a few rows of its share, and after as many
rows as the (whole) weights add up to, exactly at it.
"""

import functools
import hashlib
import heapq
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from mega_scale.data.config import FILE_SOURCES, DataConfig, cache_folder, expand_paths, mixture_entries
from mega_scale.data.packing import PackedDataset
from mega_scale.data.rows import Tally
from mega_scale.data.sources import Documents, load_corpus, load_documents, shuffled
from mega_scale.data.streaming import StreamedDataset
from mega_scale.data.tokenizer import tokenizer_digest
from mega_scale.data.tokens import TokenStore, open_part, read_manifest, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Dataset = PackedDataset | StreamedDataset
Log = Callable[[str], None]


class _Node(NamedTuple):
    weight: int
    source: int = -1  # of a leaf
    children: "tuple[_Node, ...]" = ()  # two, or none

    def left(self, rows: int) -> int:
        """How many of the node's first rows its left child has."""
        return (2 * rows * self.children[0].weight + self.weight) // (2 * self.weight)


class Schedule:
    """Which source each row comes from, by shares above 0 of the rows, which need not add up to 1."""

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        shares = [Fraction(weight) for weight in weights]
        whole = math.lcm(*(share.denominator for share in shares))
        # Light sources are joined first, as in a Huffman code: no source is far from the root for its weight.
        heap = [(int(share * whole), i, _Node(int(share * whole), i)) for i, share in enumerate(shares)]
        heapq.heapify(heap)
        while len(heap) > 1:
            light, order, right = heapq.heappop(heap)
            heavy, _, left = heapq.heappop(heap)
            heapq.heappush(heap, (light + heavy, order, _Node(light + heavy, children=(left, right))))
        self._root, self._sources = heap[0][2], len(shares)

    def locate(self, row: int) -> tuple[int, int]:
        """Find a row of the run: the number of its source, and how many rows of that source come before it."""
        node = self._root
        while node.children:
            before = node.left(row)
            if node.left(row + 1) > before:
                node, row = node.children[0], before
            else:
                node, row = node.children[1], row - before
        return node.source, row

    def counts(self, rows: int) -> list[int]:
        """Count how many of the first rows each source has."""
        found = [0] * self._sources
        waiting = [(self._root, rows)]
        while waiting:
            node, count = waiting.pop()
            if not node.children:
                found[node.source] = count
            else:
                left = node.left(count)
                waiting += zip(node.children, (left, count - left), strict=True)
        return found


class Mixture:
    """Rows of one or more datasets, numbered over all epochs without end; each dataset has epochs of its own.

    Args:
        datasets: By name; all of the same sequence length.
        weights: Share of the rows by name; None for one dataset.

    Attributes:
        sequence_length: L, tokens.
        tokens: Tokens of an epoch of all datasets; None with a stream.
        fingerprint: Hash of all datasets and their weights; a single dataset's own.
    """

    def __init__(self, datasets: Mapping[str, Dataset], weights: Mapping[str, Fraction | int] | None = None) -> None:
        self.datasets = dict(datasets)
        shares = [1 if weights is None else weights[name] for name in self.datasets]
        self._schedule = Schedule(shares)
        found = list(self.datasets.values())
        self.sequence_length = found[0].sequence_length
        sizes = [dataset.tokens for dataset in found]
        self.tokens = None if None in sizes else sum(size for size in sizes if size is not None)
        self.fingerprint = found[0].fingerprint
        if len(found) > 1:
            named = zip(self.datasets.items(), shares, strict=True)
            described = " ".join(f"{name} {share} {dataset.fingerprint}" for (name, dataset), share in named)
            self.fingerprint = f"mixture-{xxhash.xxh3_128_hexdigest(described.encode())}"

    def rows(self, numbers: Sequence[int], seed: int, shuffle: bool) -> np.ndarray:
        """Read rows (n,) of the run, ascending: (n, L + 1) int64 tokens, and MISSING where there is none.

        Every epoch of a dataset has an order of its own, chosen by `seed`, unless `shuffle` is false; a stream has its
        own order.
        """
        found = np.empty((len(numbers), self.sequence_length + 1), np.int64)
        for dataset, at, indices in self._by_dataset(numbers, seed, shuffle):
            found[at] = dataset.rows(indices)
        return found

    def document_starts(self, numbers: Sequence[int], seed: int, shuffle: bool) -> np.ndarray:
        """Say where documents start in rows (n,) of the run: (n, L + 1) bool, see `PackedDataset.document_starts`.

        Raises:
            ValueError: A dataset is a stream, which does not know them.
        """
        found = np.empty((len(numbers), self.sequence_length + 1), bool)
        for dataset, at, indices in self._by_dataset(numbers, seed, shuffle):
            if isinstance(dataset, StreamedDataset):
                raise ValueError("data.streaming=True: a stream does not keep where documents start; prepare the data")
            found[at] = dataset.document_starts(indices)
        return found

    def progress(self, rows: int) -> dict[str, dict[str, Any]]:
        """Say how far a run has read each dataset after so many rows.

        By name: `rows`, `epochs` (a fraction; None for a stream) and `tokens` predicted, which is exact when an epoch
        ends and else that share of an epoch (None for a stream whose rows are not full).
        """
        found: dict[str, dict[str, Any]] = {}
        for (name, dataset), count in zip(self.datasets.items(), self._schedule.counts(rows), strict=True):
            if isinstance(dataset, StreamedDataset):
                tokens = count * self.sequence_length if dataset.packing == "concat" else None
                found[name] = {"rows": count, "epochs": None, "tokens": tokens}
            else:
                exact = Fraction(count * dataset.labels, len(dataset))
                found[name] = {"rows": count, "epochs": count / len(dataset), "tokens": round(exact)}
        return found

    def tally(self) -> Tally:
        """Count the rows of text that were read, and the bad ones, as far as the text has been read."""
        total = Tally()
        for dataset in self.datasets.values():
            total.merge(dataset.tally)
        return total

    def _by_dataset(
        self, numbers: Sequence[int], seed: int, shuffle: bool
    ) -> list[tuple[Dataset, list[int], np.ndarray]]:
        """Which of the rows each dataset has, and where they stand there."""
        located = [self._schedule.locate(number) for number in numbers]
        found = []
        for i, dataset in enumerate(self.datasets.values()):
            at = [k for k, (source, _) in enumerate(located) if source == i]
            if at:
                found.append((dataset, at, _places(dataset, np.array([located[k][1] for k in at]), seed, shuffle)))
        return found


def _places(dataset: Dataset, indices: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
    """Where rows that are numbered over all epochs stand in a dataset; a stream numbers its own without end."""
    if isinstance(dataset, StreamedDataset):
        return indices
    epochs, found = np.divmod(indices, len(dataset))
    if shuffle:
        for epoch in np.unique(epochs).tolist():
            found[epochs == epoch] = shuffled(found[epochs == epoch], len(dataset), seed, epoch)
    return found


def load_datasets(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", log: Log = lambda _: None
) -> tuple[Dataset | Mixture, PackedDataset | None]:
    """Make what a run trains on and what it validates on, None if the configuration holds out nothing.

    Args:
        config: The keys under `data:`.
        tokenizer: Of `load_tokenizer`.
        log: Is given one line if this process waits for another one that tokenises the same text.

    Raises:
        ValueError: A key cannot work, the text cannot be read, a part has less than one row, or prepared data has
            another tokenizer.
    """
    config.validate()
    if config.mixture is not None:
        return _load_mixture(config, tokenizer, log)
    train, held_out = _load_source(config, tokenizer, log)
    return train, None if held_out is None else _validation_dataset(config, *held_out)


def load_whole(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> PackedDataset:
    """Make one dataset of all of a configuration's text, which is not prepared, to evaluate on.

    None is held out. A text that is shorter than a row makes one that is not full.

    Raises:
        ValueError: A key cannot work, the text cannot be read, or there is none.
    """
    config.validate()
    documents, cache = load_documents(config), cache_folder(config.cache_dir)
    store = tokenise(documents, tokenizer, cache, config.add_bos, _tokens_name(config, tokenizer, "whole"))
    if not store.tokens:
        raise ValueError(f"{_source(config)} holds no text: give some")
    return _packed(config, store, documents.tally)


def _load_mixture(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", log: Log
) -> tuple[Mixture, PackedDataset | None]:
    datasets: dict[str, Dataset] = {}
    weights: dict[str, Fraction] = {}
    validation: list[TokenStore] = []
    tally = Tally()
    for name, entry in mixture_entries(config).items():
        try:
            dataset, held_out = _load_source(entry.config, tokenizer, log)
        except ValueError as error:
            raise ValueError(f"data.mixture.{name}: {error}") from None
        datasets[name] = dataset
        if held_out is not None:
            validation.append(held_out[0])
            tally.merge(held_out[1])
        if entry.weight is not None:
            weights[name] = entry.weight
        elif isinstance(dataset, StreamedDataset):
            raise ValueError(f"data.mixture.{name}: how long a stream is is not known; give it and all others a weight")
        else:
            assert entry.epochs is not None
            weights[name] = entry.epochs * len(dataset)
    mixture = Mixture(datasets, weights)
    return mixture, _validation_dataset(config, TokenStore.joined(validation), tally) if validation else None


def _load_source(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", log: Log
) -> tuple[Dataset, tuple[TokenStore, Tally] | None]:
    """What to train on, and the documents to validate on with what was left out of a text of their own."""
    if config.source == "prepared":
        train, validation, tally = _open_prepared(config, tokenizer)
        return _training_dataset(config, train, tally), None if validation is None else (validation, Tally())
    corpus, cache = load_corpus(config), cache_folder(config.cache_dir)
    dataset: Dataset
    if config.streaming:
        order: dict[str, Any] = {"shuffle": config.shuffle, "seed": config.seed, "buffer": config.shuffle_buffer}
        length, packing = config.sequence_length, config.packing
        dataset = StreamedDataset(corpus.train, tokenizer, length, packing, add_bos=config.add_bos, **order)
    else:
        name = _tokens_name(config, tokenizer, "train")
        store = tokenise(corpus.train, tokenizer, cache, config.add_bos, name, log)
        # What the reading found, before the next one begins.
        dataset = _training_dataset(config, store, corpus.train.tally.copy())
    if corpus.validation is None:
        return dataset, None
    texts = corpus.validation
    if config.streaming:  # hashing and tokenising would each read the stream, so its few documents are kept meanwhile
        kept = functools.cache(lambda: list(corpus.validation or []))
        texts = Documents(lambda order: iter(kept()), corpus.validation.tally)
    store = tokenise(texts, tokenizer, cache, config.add_bos, _tokens_name(config, tokenizer, "validation"), log)
    return dataset, (store, texts.tally.copy() if config.separate_validation else Tally())


def _open_prepared(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[TokenStore, TokenStore | None, Tally]:
    """Documents to train on, to validate on, and what was left out when they were prepared."""
    assert config.path is not None
    folder = Path(config.path[0]).expanduser()
    manifest = read_manifest(folder)
    if manifest.add_bos != config.add_bos:
        raise ValueError(
            f"data.add_bos={config.add_bos}: the data in {str(folder)!r} was prepared with data.add_bos="
            f"{manifest.add_bos}; set it so, or prepare the data again"
        )
    if manifest.tokenizer != (digest := tokenizer_digest(tokenizer, config.add_bos)):
        raise ValueError(
            f"data.tokenizer={config.tokenizer!r} (hash {digest}) is not the tokenizer of the data in {str(folder)!r}, "
            f"{manifest.tokenizer_name!r} (hash {manifest.tokenizer}): set "
            f"data.tokenizer={str(folder / 'tokenizer')!r}, or prepare the data again"
        )
    train = open_part(folder, manifest, "train").first_documents(config.max_documents)
    if not config.validation_fraction:
        return train, None, manifest.tally
    validation = open_part(folder, manifest, "validation").first_documents(config.validation_documents)
    if not validation.tokens:
        raise ValueError(
            f"data.path={str(folder)!r} was prepared without a validation part, but data.validation_fraction="
            f"{config.validation_fraction}: set it to 0, or prepare the data again"
        )
    return train, validation, manifest.tally


def _training_dataset(config: DataConfig, store: TokenStore, tally: Tally) -> PackedDataset:
    fraction = config.validation_fraction
    held_out = f" (data.validation_fraction={fraction} of the documents is held out)"
    if config.separate_validation or not fraction:
        held_out = ""
    remedy = f"give more text{held_out}, or shorter sequences"
    return _packed(config, store, tally, f"the text to train on ({_source(config)})", remedy)


def _validation_dataset(config: DataConfig, store: TokenStore, tally: Tally) -> PackedDataset:
    own = "data.validation_split" if config.source == "hub" else "data.validation_path"
    remedy = (
        f"whole documents are held out, data.validation_fraction={config.validation_fraction} of them; raise it, give "
        f"text of its own with {own}, set it to 0, or give a shorter sequence_length"
    )
    if config.separate_validation:
        remedy = "give more validation text, or a shorter sequence_length"
    return _packed(config, store, tally, "the text to validate on", remedy)


def _packed(
    config: DataConfig, store: TokenStore, tally: Tally, words: str | None = None, remedy: str = ""
) -> PackedDataset:
    """Rows of a store; refused if it must make a whole row, and does not. Whole documents make one of two tokens."""
    length, order = config.sequence_length, config.packing_order
    least = 1 if config.packing == "none" or order == "best_fit" else length
    if words is not None and store.tokens <= least:
        raise ValueError(
            f"{words} has {store.tokens} tokens, less than one row of data.sequence_length={length} + 1: {remedy}"
        )
    return PackedDataset(store, length, config.packing, tally, order=order, alignment=config.document_alignment)


def _tokens_name(config: DataConfig, tokenizer: "PreTrainedTokenizerBase", part: str) -> str:
    """What processes that want the same tokens agree on without reading text: settings, tokenizer and files."""
    paths = [*(config.path or []), *(config.validation_path or [])] if config.source in FILE_SOURCES else []
    files = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in expand_paths(paths, "path")]
    described = json.dumps([part, asdict(config), tokenizer_digest(tokenizer), files])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _source(config: DataConfig) -> str:
    if config.source == "hub":
        return f"data.hub_name={config.hub_name!r}, data.hub_split={config.hub_split!r}"
    return f"data.source={config.source!r}" if config.path is None else f"data.path={config.path!r}"
