"""The datasets of a run, from its configuration."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mega_scale.data.config import FILE_SOURCES, DataConfig, cache_folder, expand_paths, mixture_entries
from mega_scale.data.mixture import Dataset, Mixture
from mega_scale.data.packing import PackedDataset
from mega_scale.data.prepared import open_part, read_manifest, require_tokenizer
from mega_scale.data.rows import Tally
from mega_scale.data.sources import Documents, load_corpus, load_documents
from mega_scale.data.streaming import StreamedDataset
from mega_scale.data.token_store import TokenStore
from mega_scale.data.tokenise import tokenise
from mega_scale.data.tokenizer import tokenizer_digest

Say = Callable[[str], None]


def load_datasets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, say: Say = lambda _: None
) -> tuple[Dataset | Mixture, PackedDataset | None]:
    """Make what a run trains on and what it validates on.

    Args:
        config: The keys under `data:`.
        tokenizer: As `load_tokenizer` gives it.
        say: Called with one line, if this process waits for another one that tokenises the same text.

    Returns:
        The rows to train on, and those to validate on, None where the configuration holds out nothing.

    Raises:
        ValueError: A key cannot work, the text cannot be read, a part has less than one row, or prepared data has
            another tokenizer.
    """
    config.validate()
    if config.mixture is not None:
        return _load_mixture(config, tokenizer, say)
    train, held_out = _load_source(config, tokenizer, say)
    return train, None if held_out is None else _validation_dataset(config, *held_out)


def _load_mixture(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, say: Say
) -> tuple[Mixture, PackedDataset | None]:
    datasets: dict[str, Dataset] = {}
    weights: dict[str, Fraction] = {}
    validation: list[TokenStore] = []
    tally = Tally()
    for name, entry in mixture_entries(config).items():
        try:
            datasets[name], held_out = _load_source(entry.config, tokenizer, say)
        except ValueError as error:
            raise ValueError(f"data.mixture.{name}: {error}") from None
        if held_out is not None:
            validation.append(held_out[0])
            tally.merge(held_out[1])
        if entry.weight is not None:
            weights[name] = entry.weight
            continue
        dataset = datasets[name]
        if isinstance(dataset, StreamedDataset):
            raise ValueError(f"data.mixture.{name}: how long a stream is is not known; give it and all others a weight")
        assert entry.epochs is not None
        weights[name] = entry.epochs * len(dataset)
    mixture = Mixture(datasets, weights)
    return mixture, _validation_dataset(config, TokenStore.joined(validation), tally) if validation else None


def _load_source(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, say: Say
) -> tuple[Dataset, tuple[TokenStore, Tally] | None]:
    """What to train on, and the documents to validate on with what was left out of a text of their own."""
    if config.source == "prepared":
        train, held_out, tally = _open_prepared(config, tokenizer)
        return _training_dataset(config, train, tally), None if held_out is None else (held_out, Tally())
    corpus = load_corpus(config)
    cache = cache_folder(config.cache_dir)
    dataset: Dataset
    if config.streaming:
        dataset = StreamedDataset(
            corpus.train,
            tokenizer,
            config.sequence_length,
            config.packing,
            shuffle=config.shuffle,
            seed=config.seed,
            buffer=config.shuffle_buffer,
            add_bos=config.add_bos,
        )
    else:
        store = tokenise(corpus.train, tokenizer, cache, config.add_bos, _name(config, tokenizer, "train"), say)
        # What the reading found, before the next one begins.
        dataset = _training_dataset(config, store, corpus.train.tally.copy())
    if corpus.validation is None:
        return dataset, None
    texts = corpus.validation
    if config.streaming:  # hashing and tokenising would each read the stream, so its few documents are kept meanwhile
        kept = functools.cache(lambda: list(corpus.validation or []))
        texts = Documents(lambda order: iter(kept()), corpus.validation.tally)
    store = tokenise(texts, tokenizer, cache, config.add_bos, _name(config, tokenizer, "validation"), say)
    return dataset, (store, texts.tally.copy() if _separate(config) else Tally())


def _open_prepared(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenStore, TokenStore | None, Tally]:
    assert config.path is not None
    folder = Path(config.path[0]).expanduser()
    manifest = read_manifest(folder)
    if manifest.add_bos != config.add_bos:
        raise ValueError(
            f"data.add_bos={config.add_bos}: the data in {str(folder)!r} was prepared with data.add_bos="
            f"{manifest.add_bos}; set it so, or prepare the data again"
        )
    require_tokenizer(folder, manifest, tokenizer_digest(tokenizer, config.add_bos), config.tokenizer)
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
    length = config.sequence_length
    if store.tokens <= _least_tokens(config):
        raise ValueError(
            f"the text to train on ({_source(config)}) has {store.tokens} tokens, less than one row of "
            f"data.sequence_length={length} + 1: give more text{_held_out_hint(config)}, or shorter sequences"
        )
    return _packed(config, store, tally)


def _validation_dataset(config: DataConfig, store: TokenStore, tally: Tally) -> PackedDataset:
    length = config.sequence_length
    if store.tokens <= _least_tokens(config):
        raise ValueError(
            f"the text to validate on has {store.tokens} tokens, less than one row of data.sequence_length="
            f"{length} + 1: {_validation_remedy(config)}"
        )
    return _packed(config, store, tally)


def _least_tokens(config: DataConfig) -> int:
    """More than so many make a row: a full one, or one of whole documents."""
    return 1 if config.packing == "none" or config.packing_order == "best_fit" else config.sequence_length


def _packed(config: DataConfig, store: TokenStore, tally: Tally | None = None) -> PackedDataset:
    order, alignment = config.packing_order, config.document_alignment
    return PackedDataset(store, config.sequence_length, config.packing, tally, order=order, alignment=alignment)


def load_whole(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PackedDataset:
    """Make one dataset of all of a configuration's text, none held out, to evaluate on.

    Args:
        config: The keys under `data:`, of text that is not prepared; what concerns validation is not used.
        tokenizer: As `load_tokenizer` gives it.

    Returns:
        The rows; a text that is shorter than one makes one that is not full.

    Raises:
        ValueError: A key cannot work, the text cannot be read, or there is none.
    """
    config.validate()
    documents, cache = load_documents(config), cache_folder(config.cache_dir)
    store = tokenise(documents, tokenizer, cache, config.add_bos, _name(config, tokenizer, "whole"))
    if not store.tokens:
        raise ValueError(f"{_source(config)} holds no text: give some")
    return _packed(config, store, documents.tally)


def _name(config: DataConfig, tokenizer: PreTrainedTokenizerBase, part: str) -> str:
    """What processes that want the same tokens agree on without reading text: settings, tokenizer and files."""
    paths = [*(config.path or []), *(config.validation_path or [])] if config.source in FILE_SOURCES else []
    files = [(file, *_state(file)) for file in expand_paths(paths, "path")]
    described = json.dumps([part, asdict(config), tokenizer_digest(tokenizer), files])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _state(file: str) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def _source(config: DataConfig) -> str:
    if config.source == "hub":
        return f"data.hub_name={config.hub_name!r}, data.hub_split={config.hub_split!r}"
    return f"data.source={config.source!r}" if config.path is None else f"data.path={config.path!r}"


def _separate(config: DataConfig) -> bool:
    return bool(config.validation_path or config.validation_split)


def _held_out_hint(config: DataConfig) -> str:
    if _separate(config) or not config.validation_fraction:
        return ""
    return f" (data.validation_fraction={config.validation_fraction} of the documents is held out)"


def _validation_remedy(config: DataConfig) -> str:
    if _separate(config):
        return "give more validation text, or a shorter sequence_length"
    own = "data.validation_split" if config.source == "hub" else "data.validation_path"
    return (
        f"whole documents are held out, data.validation_fraction={config.validation_fraction} of them; raise it, give "
        f"text of its own with {own}, set it to 0, or give a shorter sequence_length"
    )
