"""From a configuration to batches: the datasets of a run, and which rank reads which of their rows at which step.

Row g = step * G + i of a run (G global batch size) is the same whatever the ranks: laid side by side, micro-batch by
micro-batch and in each of them rank by rank, the rows of all ranks are the rows of the global batch in order.
"""

import copy
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from mega_scale.data.config import HELD_OUT, DataConfig, LengthSchedule, mixture_entries, of_source, validation_sets
from mega_scale.data.packing import MISSING, Dataset, Mixture, PackedDataset, StreamedDataset
from mega_scale.data.sources import Documents, Tally, load_corpus, load_documents
from mega_scale.data.tokenizer import tokenizer_digest
from mega_scale.data.tokens import TokenStore, open_part, read_manifest, tokenise

_IGNORED = -100  # a label that no loss counts
_Log = Callable[[str], None]


# Datasets of a configuration


def load_datasets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, log: _Log = lambda _: None
) -> tuple[Dataset | Mixture, PackedDataset | None]:
    """Make what a run trains on and what it validates on, None if the configuration has nothing of it.

    What is validated on has `parts`, by name, where there are several: what is held out of each source, and the sets
    of `data.validation`.
    `log` is given one line if this process waits for another one that tokenises the same text. Raises ValueError where
    a key cannot work, the text cannot be read, a part has less than one row, or prepared data has another tokenizer.
    """
    config.validate()
    datasets, weights = dict[str, Dataset](), dict[str, Fraction]()
    validation, left_out = dict[str, TokenStore](), Tally()
    for name, (source, share, by_epochs) in mixture_entries(config).items():
        try:
            dataset, held_out, tally = _load_source(source, tokenizer, log)
            datasets[name], weights[name] = dataset, share
            if by_epochs:
                if isinstance(dataset, StreamedDataset):
                    raise ValueError("how long a stream is is not known; give it and all others a weight")
                weights[name] *= len(dataset)
        except ValueError as error:
            raise of_source(name, error) from None
        if held_out is not None:
            validation[name or HELD_OUT] = held_out
            left_out.merge(tally)
    for name, source in validation_sets(config).items():
        try:
            validation[name], tally = _load_set(source, tokenizer, log)
        except ValueError as error:
            raise ValueError(f"data.validation.{name}: {error}") from None
        left_out.merge(tally)
    train = Mixture(datasets, weights) if config.mixture is not None else datasets[""]
    if not validation:
        return train, None
    remedy = "give more validation text, or shorter sequences"
    if not config.separate_validation:
        own = f"name text of its own (data.{'validation_split' if config.source == 'hub' else 'validation_path'})"
        remedy = f"raise data.validation_fraction={config.validation_fraction}, set it to 0, or {own}"
    stores = list(validation.values())
    joined = _packed(config, TokenStore.joined(stores), left_out, "the text to validate on", remedy)
    if len(stores) > 1:
        # Of one token, nothing is predicted.
        joined.parts = {name: _packed(config, store, Tally()) for name, store in validation.items() if store.tokens > 1}
    return train, joined


def _load_set(config: DataConfig, tokenizer: PreTrainedTokenizerBase, log: _Log) -> tuple[TokenStore, Tally]:
    """All documents of a set of `data.validation`, which are enough to predict one; and what was left out of them."""
    if config.source == "prepared":
        store, _, tally = _open_prepared(config, tokenizer)
        folder = config.prepared
        store = TokenStore.joined([store, open_part(folder, read_manifest(folder), "validation")])
    else:
        documents = load_documents(config)
        store = tokenise(documents, tokenizer, config, "whole", log)
        tally = copy.deepcopy(documents.tally)
    if store.tokens < 2:
        raise ValueError(f"{_source(config)} has {store.tokens} tokens, of which none can be predicted: give more text")
    return store, tally


def load_whole(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PackedDataset:
    """Make one dataset of all of a configuration's text, which is not prepared, to evaluate on; holds out nothing."""
    config.validate()
    documents = load_documents(config)
    store = tokenise(documents, tokenizer, config, "whole")
    if not store.tokens:
        raise ValueError(f"{_source(config)} holds no text: give some")
    return _packed(config, store, documents.tally)


def _load_source(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, log: _Log
) -> tuple[Dataset, TokenStore | None, Tally]:
    """What to train on, and the documents to validate on with what was left out of a text of their own."""
    share, validation, left_out = config.validation_fraction, None, Tally()
    held_out = f" (data.validation_fraction={share} is held out)" if share and not config.separate_validation else ""
    words, remedy = f"the text to train on ({_source(config)})", f"give more text{held_out}, or shorter sequences"
    if config.source == "prepared":
        store, validation, tally = _open_prepared(config, tokenizer)
        return _packed(config, store, tally, words, remedy), validation, left_out
    corpus = load_corpus(config)
    dataset: Dataset
    if config.streaming:
        order: dict[str, Any] = {"shuffle": config.shuffle, "seed": config.seed, "buffer": config.shuffle_buffer}
        length, packing = config.sequence_length, config.packing
        dataset = StreamedDataset(corpus.train, tokenizer, length, packing, add_bos=config.add_bos, **order)
    else:
        store = tokenise(corpus.train, tokenizer, config, "train", log)
        # What the reading found, before the next one begins.
        dataset = _packed(config, store, copy.deepcopy(corpus.train.tally), words, remedy)
    if (texts := corpus.validation) is not None:
        if config.streaming:  # hashing and tokenising would each read it, so its few documents are kept meanwhile
            kept = functools.cache(lambda: list(corpus.validation or []))
            texts = Documents(lambda order: iter(kept()), texts.tally)
        validation = tokenise(texts, tokenizer, config, "validation", log)
        if config.separate_validation:
            left_out = copy.deepcopy(texts.tally)
    return dataset, validation, left_out


def _open_prepared(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenStore, TokenStore | None, Tally]:
    """Documents to train on, to validate on, and what was left out when they were prepared."""
    path, folder, fraction = (config.path or [""])[0], config.prepared, config.validation_fraction
    manifest = read_manifest(folder)
    if manifest.add_bos != config.add_bos:
        raise ValueError(
            f"data.add_bos={config.add_bos}: the data in {path!r} was prepared with data.add_bos={manifest.add_bos}; "
            "set it so, or prepare the data again"
        )
    if manifest.tokenizer != (digest := tokenizer_digest(tokenizer, config.add_bos)):
        raise ValueError(
            f"data.tokenizer={config.tokenizer!r} (hash {digest}) is not the tokenizer of the data in {path!r}, "
            f"{manifest.tokenizer_name!r} (hash {manifest.tokenizer}): set "
            f"data.tokenizer={str(folder / 'tokenizer')!r}, or prepare the data again"
        )
    train = open_part(folder, manifest, "train").first_documents(config.max_documents)
    if not fraction:
        return train, None, manifest.tally
    validation = open_part(folder, manifest, "validation").first_documents(config.validation_documents)
    if not validation.tokens:
        raise ValueError(
            f"data.validation_fraction={fraction}, but data.path={path!r} was prepared without a validation part: set "
            "it to 0, or prepare the data again"
        )
    return train, validation, manifest.tally


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


def _source(config: DataConfig) -> str:
    given = {key: getattr(config, key) for key in ("source", "path", "hub_name")}
    return ", ".join(f"data.{key}={value!r}" for key, value in given.items() if value)


# Batches


class Loader:
    """Batches of one rank, a pure function of the step; epochs follow each other without end.

    A step has `global_batch_size` rows over `world_size` ranks that read different ones (ranks that share a sequence or
    a layer have the same `rank`), `micro_batch_size` of them at once. `seed` orders every epoch anew. `workers`
    processes read `prefetch` steps ahead each; 0 reads when a step asks for it. `lengths` cuts the rows of each step.
    Raises ValueError where sizes do not fit each other, or there are fewer rows than one global batch.
    """

    def __init__(
        self,
        dataset: Dataset | Mixture,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        lengths: LengthSchedule | None = None,
    ) -> None:
        if micro_batch_size < 1:
            raise ValueError(f"train.micro_batch_size={micro_batch_size}: give at least 1 row")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks: give 0 to {world_size - 1}")
        at_once = micro_batch_size * world_size
        if global_batch_size < 1 or global_batch_size % at_once:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is not a multiple of {world_size} ranks x "
                f"train.micro_batch_size={micro_batch_size}: use a multiple of {at_once}"
            )
        self.dataset = dataset if isinstance(dataset, Mixture) else Mixture({"text": dataset})
        self.lengths = lengths
        self._global, self._micro, self._rank, self._world = global_batch_size, micro_batch_size, rank, world_size
        self._order, self._pin = (seed, shuffle), pin_memory
        for name, source in self.dataset.datasets.items():
            # In a mixture, a small one may be read several times in a batch.
            needed = global_batch_size if len(self.dataset.datasets) == 1 else 1
            if isinstance(source, PackedDataset):
                enough, found = len(source) >= needed, str(len(source))
            elif source.shuffle != shuffle:
                raise ValueError(f"data.shuffle={shuffle}, but the stream was opened with {source.shuffle}: open it so")
            else:
                enough, found = source.holds(needed), "fewer"
            if not enough:
                raise ValueError(
                    f"train.global_batch_size={global_batch_size} is more than the text to train on has ({name}), "
                    f"{found} rows of data.sequence_length={source.sequence_length} tokens: give more text, a smaller "
                    "batch, or a shorter sequence_length"
                )
        first = next(iter(self.dataset.datasets.values()))
        self._kept = {  # to the end of a run
            "sequence_length": first.sequence_length,
            "packing": first.packing,
            "packing_order": first.order,
            "document_alignment": first.alignment,
            "global_batch_size": global_batch_size,
            "shuffle": shuffle,
            "seed": seed if shuffle else None,
            "fingerprint": self.dataset.fingerprint,
        }
        self._bad_rows = self.dataset.tally().figures()
        self._ahead = ReadAhead(self._read, workers, prefetch, pin_memory) if workers else None

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """Read this rank's micro-batches of B rows of a step, after `step` steps done before.

        Each has `input_ids` and `shift_labels`, the next tokens, (B, L) int64; where there is no token the input is 0
        and the label -100. With packing "reset" also `document_starts`, (B, L) bool, True at a document's first token,
        and the label of a document's last token is -100. Where a schedule says length l, (B L / l, l). Raises
        ValueError where the text cannot be read, or has too many bad rows, RuntimeError where a worker ended.
        """
        found, self._bad_rows = self._read(step) if self._ahead is None else self._ahead.take(step)
        if self._pin and self._ahead is None:
            return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in found]
        return found

    def report(self, step: int) -> dict[str, float]:
        """Say how far the run is after `step` steps; the same on all ranks, but for bad rows of a stream.

        `tokens/NAME` and `epochs/NAME` of every source, see `state_dict`; `padding`, the share of places from which
        nothing is predicted so far; bad rows; the last step's `sequence_length`, if it follows a schedule.
        """
        sources, found = self.state_dict(step)["sources"], dict[str, float]()
        for name, figures in sources.items():
            found |= {f"{key}/{name}": figures[key] for key in ("tokens", "epochs") if figures[key] is not None}
        tokens = [figures["tokens"] for figures in sources.values()]
        if step and None not in tokens:
            found["padding"] = 1 - sum(tokens) / (step * self._global * self.dataset.sequence_length)
        if self.lengths is not None:
            found["sequence_length"] = self.lengths.at(max(step - 1, 0))
        return found | self._bad_rows

    def state_dict(self, step: int) -> dict[str, Any]:
        """Describe the position after `step` steps, and the data: plain JSON, the same for any number of ranks.

        `sources` has by name `rows`, `epochs` (a fraction; None for a stream) and `tokens` predicted, which is exact
        when an epoch ends and else that share of an epoch (None for a stream whose rows are not full).
        """
        rows, sources = step * self._global, {}
        for (name, dataset), done in zip(self.dataset.datasets.items(), self.dataset.counts(rows), strict=True):
            figures = {"rows": done, "epochs": None, "tokens": None}
            if isinstance(dataset, PackedDataset):
                length = self.dataset.lengths[name]
                figures |= {"epochs": done / length, "tokens": round(Fraction(done * dataset.labels, length))}
            elif dataset.packing == "concat":
                figures["tokens"] = done * dataset.sequence_length
            sources[name] = figures
        return {"step": step, "rows": rows, "sources": sources, **self._kept}

    def check(self, state: dict[str, Any]) -> None:
        """Refuse to continue a run, whose `state_dict` is given, on other data or in another order."""
        there = {"packing_order": "in_order", "document_alignment": 1} | state  # older ones do not name them
        keys = {"global_batch_size": "train.global_batch_size", "fingerprint": "the text's fingerprint"}
        for name, value in self._kept.items():
            if there.get(name) != value:
                remedy = "set it so" if name != "fingerprint" else "give the same data.* keys, files and Python"
                raise ValueError(
                    f"{keys.get(name, f'data.{name}')}={value!r}, but the checkpoint was trained with "
                    f"{there.get(name)!r}: {remedy} to continue, or start a new run from the weights with init_from"
                )

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def _read(self, step: int) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
        """This rank's batches of a step, and the bad rows found so far."""
        first = step * self._global + self._rank * self._micro
        places = range(first, first + self._global, self._micro * self._world)
        found = [_batch(*self.dataset.read(place, self._micro, *self._order)) for place in places]
        if self.lengths is not None:  # the same memory, as shorter rows
            length = self.lengths.at(step)
            found = [{name: tensor.view(-1, length) for name, tensor in batch.items()} for batch in found]
        return found, self.dataset.tally().figures() if self.dataset.tokens is None else self._bad_rows


def validation_batches(
    dataset: PackedDataset, rows: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[dict[str, Tensor]]:
    """Split the first rows of a dataset over ranks, with as many batches, as those of `Loader.batches`, for each.

    The last ones are filled with rows whose labels are all -100. Raises ValueError where there is nothing to predict.
    """
    total = min(rows, len(dataset))
    if total < 1:
        raise ValueError(
            f"the text to validate on has {dataset.tokens} tokens, of which none can be predicted: give more text, or "
            "a larger data.validation_fraction"
        )

    def batch(first: int) -> dict[str, Tensor]:
        there = np.arange(first, min(first + micro_batch_size, total))
        filled = ((0, micro_batch_size - len(there)), (0, 0))
        starts = np.pad(dataset.document_starts(there), filled) if dataset.packing == "reset" else None
        return _batch(np.pad(dataset.rows(there), filled, constant_values=MISSING), starts)

    at_once = micro_batch_size * world_size
    return map(batch, range(rank * micro_batch_size, -(-total // at_once) * at_once, at_once))


def _batch(rows: np.ndarray, starts: np.ndarray | None) -> dict[str, Tensor]:
    """Inputs and labels of rows (B, L + 1); with `starts` (B, L + 1) bool, documents are kept apart."""
    tokens = torch.from_numpy(rows)
    labels = tokens[:, 1:].clone()
    # All are new memory: of a single row, the two halves would else overlap.
    batch = {"input_ids": tokens[:, :-1].clamp(min=0), "shift_labels": labels.masked_fill_(labels == MISSING, _IGNORED)}
    if starts is not None:
        marks = torch.from_numpy(starts)
        # No document's first token is predicted from the document before.
        batch["shift_labels"] = torch.where(marks[:, 1:], _IGNORED, batch["shift_labels"])
        batch["document_starts"] = marks[:, :-1].clone()
    return batch


# Reading ahead


class ReadAhead:
    """Results of a function of the step, in order, computed `prefetch` steps ahead by each of some forked workers."""

    def __init__(self, read: Callable[[int], Any], workers: int, prefetch: int, pin_memory: bool) -> None:
        def read_or_error(step: int) -> Any:
            try:
                return read(step)
            except ValueError as error:  # what is refused is said by the run, in one sentence
                return error

        self._options: dict[str, Any] = {
            "batch_size": None,
            "num_workers": workers,
            "prefetch_factor": prefetch,
            "pin_memory": pin_memory,
            "collate_fn": read_or_error,
            # Forked, they share the mapped files and the tokenizer, and start at once.
            "multiprocessing_context": "fork",
            "worker_init_fn": _leave_signals_to_the_run,
        }
        self._results: Any = None
        self._next = 0

    def take(self, step: int) -> Any:
        """Wait for the result of a step, or its error; any but the one after the last starts the workers anew."""
        if self._results is None or step != self._next:
            self.close()
            # It draws a seed for its workers, which draw nothing: not from the random state that checkpoints hold.
            steps: Any = range(sys.maxsize)
            self._results = iter(DataLoader(steps, sampler=count(step), generator=torch.Generator(), **self._options))
        try:
            found = next(self._results)
        except Exception as error:
            self.close()
            if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
                raise
            raise RuntimeError(
                f"a process that reads data ended before step {step} was read: {error}; one that was killed may have "
                "run out of memory, then lower data.workers or data.prefetch; data.workers=0 reads in the run itself"
            ) from error
        self._next = step + 1
        if isinstance(found, ValueError):
            self.close()
            raise found
        return found

    def close(self) -> None:
        if self._results is not None:
            # Torch ends them when nobody refers to them any more, but an error's traceback may.
            self._results._shutdown_workers()
        self._results = None


def _leave_signals_to_the_run(worker: int) -> None:
    """Survive the signals that the run itself answers: a terminal, launchers and Slurm send them to all of a job.

    A worker that they killed would take the run with it. The run's own SIGTERM is told from others by its sender.
    """
    parent, answered = os.getppid(), {n for n in signal.valid_signals() if callable(signal.getsignal(n))}

    def end_by_parent_only() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    for number in answered - {signal.SIGCHLD, signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGTERM in answered:
        # Blocked before the first thread starts, it is blocked in all of them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_by_parent_only, daemon=True).start()
