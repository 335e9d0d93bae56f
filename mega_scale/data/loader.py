"""From rows to batches: which rank reads which rows at which step, and where a resumed run continues.

Row g = step * G + i of a run (G global batch size) is the same whatever the ranks: laid side by side, micro-batch by
micro-batch and in each of them rank by rank, the rows of all ranks are the rows of the global batch in order.

Shapes: B rows of a micro-batch, L sequence length.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mega_scale.data.config import LengthSchedule
from mega_scale.data.mixture import Mixture
from mega_scale.data.packing import MISSING, PackedDataset
from mega_scale.data.streaming import StreamedDataset

_IGNORED = -100  # a label that no loss counts


class Loader:
    """Batches of one rank, a pure function of the step; epochs follow each other without end.

    Args:
        dataset: Rows of tokens.
        global_batch_size: G, rows a step over all ranks.
        micro_batch_size: Rows a rank takes at once.
        rank: This rank, 0 to below world_size; ranks that share a sequence or a layer have the same.
        world_size: Number of ranks that read different rows.
        seed: Chooses the orders of the epochs.
        shuffle: Order every epoch anew.
        workers: Processes that read ahead; 0 reads when a step asks for it.
        prefetch: Steps that each of them reads ahead.
        pin_memory: Put batches in page-locked memory, from which they are copied to a GPU in the background.
        lengths: Cut the rows of each step to its length; None: all have the dataset's.

    Raises:
        ValueError: The sizes do not fit each other, or there are fewer rows than one global batch.
    """

    def __init__(
        self,
        dataset: PackedDataset | StreamedDataset | Mixture,
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
        _require_rank(micro_batch_size, rank, world_size)
        at_once = micro_batch_size * world_size
        if global_batch_size < 1 or global_batch_size % at_once:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is not a multiple of {world_size} ranks x "
                f"train.micro_batch_size={micro_batch_size}: use a multiple of {at_once}"
            )
        self.dataset = dataset if isinstance(dataset, Mixture) else Mixture({"text": dataset})
        _require_rows(self.dataset, global_batch_size, shuffle)
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._world = rank, world_size
        self._seed, self._shuffle, self._pin, self._lengths = seed, shuffle, pin_memory, lengths
        self._packing = next(iter(self.dataset.datasets.values())).packing
        self._bad_rows = self.dataset.tally().figures()
        self._ahead = ReadAhead(self._read, workers, prefetch, pin_memory) if workers else None

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """Read this rank's share of a step, after `step` steps done before.

        Returns:
            One micro-batch after the other: `input_ids` and `shift_labels`, the next tokens, (B, L) int64 each; where
            there is no token the input is 0 and the label -100. With packing "reset" also `document_starts`, (B, L)
            bool, True at a document's first token, and the label of a document's last token is -100. Where a schedule
            says length l, (B L / l, l).

        Raises:
            ValueError: The text cannot be read, or has too many bad rows.
            RuntimeError: A worker process ended.
        """
        if self._ahead is not None:
            found, self._bad_rows = self._ahead.take(step)
            return found
        found, self._bad_rows = self._read(step)
        if self._pin:
            return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in found]
        return found

    def report(self, step: int) -> dict[str, float]:
        """Say how far the run is after `step` steps; the same on all ranks, but for bad rows of a stream.

        Returns:
            `tokens/NAME` and `epochs/NAME` for every source, see `Mixture.progress`; `padding`, the share of places
            from which nothing is predicted so far; `Tally.figures`; `sequence_length` of the step before, if it
            follows a schedule. What is not known of a stream is left out.
        """
        found: dict[str, float] = {}
        progress = self.dataset.progress(step * self._global)
        for name, figures in progress.items():
            found |= {f"{key}/{name}": figures[key] for key in ("tokens", "epochs") if figures[key] is not None}
        places = step * self._global * self.dataset.sequence_length
        tokens = [figures["tokens"] for figures in progress.values()]
        if places and None not in tokens:
            found["padding"] = 1 - sum(tokens) / places
        if self._lengths is not None:
            found["sequence_length"] = self._lengths.at(max(step - 1, 0))
        return found | self._bad_rows

    def state_dict(self, step: int) -> dict[str, Any]:
        """Describe the position after `step` steps, and the data: plain JSON, the same for any number of ranks."""
        rows = step * self._global
        return {"step": step, "rows": rows, "sources": self.dataset.progress(rows), **self._identity()}

    def check(self, state: dict[str, Any]) -> None:
        """Refuse to continue a run, whose `state_dict` is given, on other data or in another order.

        Raises:
            ValueError: Names what differs.
        """
        here = self._identity()
        # What older checkpoints do not name.
        there = {"packing_order": "in_order", "document_alignment": 1} | state
        for name, value in here.items():
            if name == "fingerprint" or there.get(name) == value:
                continue
            key = f"{'train' if name == 'global_batch_size' else 'data'}.{name}"
            raise ValueError(
                f"{key}={value!r}, but the checkpoint was trained with {there.get(name)!r}: set it so to continue, or "
                "start a new run from the weights with init_from"
            )
        if state.get("fingerprint") != here["fingerprint"]:
            raise ValueError(
                f"the text to train on (fingerprint {here['fingerprint']}) is not the checkpoint's "
                f"({state.get('fingerprint')}): give the same data.* keys, files and Python, or start a new run from "
                "the weights with init_from"
            )

    def close(self) -> None:
        """End the worker processes."""
        if self._ahead is not None:
            self._ahead.close()

    def _identity(self) -> dict[str, Any]:
        dataset = next(iter(self.dataset.datasets.values()))
        order, alignment = (dataset.order, dataset.alignment) if isinstance(dataset, PackedDataset) else ("in_order", 1)
        return {
            "sequence_length": self.dataset.sequence_length,
            "packing": self._packing,
            "packing_order": order,
            "document_alignment": alignment,
            "global_batch_size": self._global,
            "shuffle": self._shuffle,
            "seed": self._seed if self._shuffle else None,
            "fingerprint": self.dataset.fingerprint,
        }

    def _read(self, step: int) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
        """This rank's batches of a step, and the bad rows found so far."""
        first = step * self._global + self._rank * self._micro
        found = []
        for start in range(first, first + self._global, self._micro * self._world):
            order = (range(start, start + self._micro), self._seed, self._shuffle)
            starts = self.dataset.document_starts(*order) if self._packing == "reset" else None
            batch = _batch(self.dataset.rows(*order), starts)
            found.append(batch if self._lengths is None else self._lengths.cut(batch, step))
        return found, self.dataset.tally().figures()


def validation_batches(
    dataset: PackedDataset, rows: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[dict[str, Tensor]]:
    """Split the first rows of a dataset over ranks, with as many batches of the same shape for each.

    What is missing in the last batches is filled with rows whose labels are all -100, which no loss counts. Batches are
    as those of `Loader.batches`.

    Raises:
        ValueError: There is nothing to predict.
    """
    _require_rank(micro_batch_size, rank, world_size)
    total = min(rows, len(dataset))
    if total < 1:
        raise ValueError(
            f"the text to validate on has {dataset.tokens} tokens, of which none can be predicted: give more text, or "
            "a larger data.validation_fraction"
        )
    at_once = micro_batch_size * world_size
    starts = range(rank * micro_batch_size, -(-total // at_once) * at_once, at_once)
    return (_validation_batch(dataset, start + np.arange(micro_batch_size), total) for start in starts)


def _validation_batch(dataset: PackedDataset, indices: np.ndarray, total: int) -> dict[str, Tensor]:
    rows = np.full((len(indices), dataset.sequence_length + 1), MISSING)
    there = indices < total
    rows[there] = dataset.rows(indices[there])
    if dataset.packing != "reset":
        return _batch(rows, None)
    starts = np.zeros(rows.shape, bool)
    starts[there] = dataset.document_starts(indices[there])
    return _batch(rows, starts)


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


def _require_rank(micro_batch_size: int, rank: int, world_size: int) -> None:
    if micro_batch_size < 1:
        raise ValueError(f"train.micro_batch_size={micro_batch_size}: give at least 1 row")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks: give 0 to {world_size - 1}")


def _require_rows(mixture: Mixture, rows: int, shuffle: bool) -> None:
    """A dataset that is alone must have a batch; in a mixture, a small one may be read several times in a batch."""
    for name, dataset in mixture.datasets.items():
        needed = rows if len(mixture.datasets) == 1 else 1
        if isinstance(dataset, PackedDataset):
            enough, found = len(dataset) >= needed, str(len(dataset))
        elif dataset.shuffle != shuffle:
            raise ValueError(f"data.shuffle={shuffle}, but the stream was opened with {dataset.shuffle}: open it so")
        else:
            enough, found = dataset.holds(needed), "fewer"
        if not enough:
            raise ValueError(
                f"train.global_batch_size={rows} is more than the text to train on has ({name}), {found} rows of "
                f"data.sequence_length={dataset.sequence_length} tokens: give more text, a smaller batch, or a shorter "
                "sequence_length"
            )


class ReadAhead:
    """Results of a function of the step, computed ahead by worker processes and delivered in order.

    Steps are dealt out in turns. Which worker computes a step changes nothing, so neither does their number.

    Args:
        read: Computes a step; forked workers have a copy of everything that it refers to.
        workers: Number of processes, at least 1.
        prefetch: Steps that each computes ahead.
        pin_memory: Put tensors in page-locked memory.
    """

    def __init__(self, read: Callable[[int], Any], workers: int, prefetch: int, pin_memory: bool) -> None:
        self._steps = _Steps(read)
        self._workers, self._prefetch, self._pin = workers, prefetch, pin_memory
        self._results: Any = None
        self._next = 0

    def take(self, step: int) -> Any:
        """Wait for the result of a step; any but the one after the last starts the workers anew.

        Raises:
            ValueError: The function refused the step.
            RuntimeError: The function failed, or a worker ended; says how.
        """
        if self._results is None or step != self._next:
            self.close()
            self._results = self._start(step)
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
        """End the workers."""
        if self._results is not None:
            # Torch ends them when nobody refers to them any more, but an error's traceback may.
            self._results._shutdown_workers()
        self._results = None

    def _start(self, step: int) -> Any:
        loader: DataLoader[Any] = DataLoader(
            self._steps,
            batch_size=None,
            sampler=count(step),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin,
            prefetch_factor=self._prefetch,
            # It draws a seed for its workers, which draw nothing: not from the random state that checkpoints hold.
            generator=torch.Generator(),
            # Forked, they share the mapped files and the tokenizer, and start at once.
            multiprocessing_context="fork",
            worker_init_fn=_leave_signals_to_the_run,
        )
        return iter(loader)


class _Steps(Dataset[Any]):
    """The function, as torch's workers call it."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self._read = read

    def __getitem__(self, step: int) -> Any:
        try:
            return self._read(step)
        except ValueError as error:  # what is refused is said by the run, in one sentence
            return error


def _as_it_is(found: Any) -> Any:
    return found


def _leave_signals_to_the_run(worker: int) -> None:
    """Survive the signals that the run itself answers: a terminal, launchers and Slurm send them to all of a job.

    A worker that they killed would take the run with it, in the middle of what it does to end well. The run still ends
    its workers by SIGTERM; that one is told from others by its sender.
    """
    for number in signal.valid_signals() - {signal.SIGCHLD, signal.SIGTERM}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)
    if callable(signal.getsignal(signal.SIGTERM)):
        # Blocked before the first thread starts, it is blocked in all of them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent_only, args=(os.getppid(),), daemon=True).start()


def _end_by_parent_only(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
