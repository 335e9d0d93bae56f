"""From rows to batches: which rank reads which rows at which step, and where a resumed run continues.

Row g = step * G + i of a run (G global batch size) is the same whatever the ranks: laid side by side, micro-batch by
micro-batch and in each of them rank by rank, the rows of all ranks are the rows of the global batch in order.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mega_scale.data.boundaries import IGNORED, resets, separate_labels
from mega_scale.data.config import LengthSchedule
from mega_scale.data.mixture import Mixture
from mega_scale.data.packing import MISSING, PackedDataset
from mega_scale.data.streaming import StreamedDataset
from mega_scale.data.workers import Feed


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
        lengths: Of the rows of each step, of the same rows cut; none: all of the dataset's.

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
        _require_order(self.dataset, shuffle)
        _require_batch(self.dataset, global_batch_size)
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._world = rank, world_size
        self._seed, self._shuffle, self._pin, self._lengths = seed, shuffle, pin_memory, lengths
        self._packing = next(iter(self.dataset.datasets.values())).packing
        self._bad_rows = self.dataset.tally().figures()
        self._feed = Feed(self._read, workers, prefetch, pin_memory) if workers else None

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """Read this rank's share of one step.

        Args:
            step: Steps done before, 0 for the first.

        Returns:
            One micro-batch after the other: `input_ids` and `shift_labels`, the next tokens, (B, L) int64 each; where
            there is no token the input is 0 and the label -100. With packing "reset" also `document_starts`, (B, L)
            bool, and the label of a document's last token is -100. Where a schedule says length l, (B L / l, l).

        Raises:
            ValueError: The text cannot be read, or has too many bad rows.
            RuntimeError: A worker process ended.
        """
        if self._feed is not None:
            found, self._bad_rows = self._feed.take(step)
            return found
        found, self._bad_rows = self._read(step)
        if self._pin:
            return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in found]
        return found

    def document_starts(self, step: int) -> list[Tensor]:
        """Say where documents start in the batches of a step, for a model that keeps them apart.

        Args:
            step: Steps done before.

        Returns:
            For each of `batches(step)`, before a schedule cuts its rows, (B, L + 1) bool: True where the token at that
            place is a document's first. Places 0..L-1 are those of `input_ids`; place p + 1 is that of
            `shift_labels[:, p]`. A row that goes on with a document of the row before is False at place 0, and places
            without a token are False.

        Raises:
            ValueError: The text is a stream.
        """
        numbers = self._numbers(step)
        return [torch.from_numpy(self.dataset.document_starts(row, self._seed, self._shuffle)) for row in numbers]

    def report(self, step: int) -> dict[str, float]:
        """Say how far the run is; the same on all ranks, but for bad rows of a stream.

        Args:
            step: Steps done before.

        Returns:
            `tokens/NAME` and `epochs/NAME` for every source, see `Mixture.progress`; `padding`, the share of places
            from which nothing is predicted so far; `Tally.figures`; `sequence_length` of the step before, where it
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
        """Describe the position before a step, and the data.

        Args:
            step: Steps done before.

        Returns:
            Plain JSON, the same for all ranks and any number of them.
        """
        rows = step * self._global
        return {"step": step, "rows": rows, "sources": self.dataset.progress(rows), **self._identity()}

    def check(self, state: dict[str, Any]) -> None:
        """Refuse to continue a run on other data or in another order.

        Args:
            state: What `state_dict` gave.

        Raises:
            ValueError: Names what differs.
        """
        keys = {
            "sequence_length": "data.sequence_length",
            "packing": "data.packing",
            "packing_order": "data.packing_order",
            "document_alignment": "data.document_alignment",
            "global_batch_size": "train.global_batch_size",
            "shuffle": "data.shuffle",
            "seed": "data.seed",
        }
        here = self._identity()
        # What older checkpoints do not name.
        there = {"packing_order": "in_order", "document_alignment": 1} | state
        for name, key in keys.items():
            if there.get(name) != here[name]:
                raise ValueError(
                    f"{key}={here[name]!r}, but the checkpoint was trained with {there.get(name)!r}: set it so to "
                    "continue, or start a new run from the weights with init_from"
                )
        if state.get("fingerprint") != here["fingerprint"]:
            raise ValueError(
                f"the text to train on (fingerprint {here['fingerprint']}) is not the checkpoint's "
                f"({state.get('fingerprint')}): give the same data.* keys, files and Python, or start a new run from "
                "the weights with init_from"
            )

    def close(self) -> None:
        """End the worker processes."""
        if self._feed is not None:
            self._feed.close()

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
        found = []
        for numbers in self._numbers(step):
            order = (numbers, self._seed, self._shuffle)
            starts = self.dataset.document_starts(*order) if self._packing == "reset" else None
            batch = _batch(self.dataset.rows(*order), starts)
            found.append(batch if self._lengths is None else self._lengths.cut(batch, step))
        return found, self.dataset.tally().figures()

    def _numbers(self, step: int) -> list[range]:
        """Numbers in the run of this rank's rows of a step, by micro-batch."""
        first = step * self._global + self._rank * self._micro
        starts = range(first, first + self._global, self._micro * self._world)
        return [range(start, start + self._micro) for start in starts]


def validation_batches(
    dataset: PackedDataset, rows: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[dict[str, Tensor]]:
    """Split the first rows of a dataset over ranks, with as many batches of the same shape for each.

    What is missing in the last batches is filled with rows whose labels are all -100, which no loss counts.

    Args:
        dataset: Rows of tokens.
        rows: Number of rows; all where there are fewer.
        micro_batch_size: Rows a rank takes at once.
        rank: This rank, 0 to below world_size.
        world_size: Number of ranks.

    Returns:
        `input_ids` and `shift_labels`, (B, L) int64 each, and with packing "reset" `document_starts`, (B, L) bool.

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
    tokens = torch.from_numpy(rows)
    labels = tokens[:, 1:].clone()
    # All are new memory: of a single row, the two halves would else overlap.
    batch = {"input_ids": tokens[:, :-1].clamp(min=0), "shift_labels": labels.masked_fill_(labels == MISSING, IGNORED)}
    if starts is not None:
        marks = torch.from_numpy(starts)
        batch["shift_labels"] = separate_labels(batch["shift_labels"], marks)
        batch["document_starts"] = resets(marks).clone()
    return batch


def _require_rank(micro_batch_size: int, rank: int, world_size: int) -> None:
    if micro_batch_size < 1:
        raise ValueError(f"train.micro_batch_size={micro_batch_size}: give at least 1 row")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks: give 0 to {world_size - 1}")


def _require_order(mixture: Mixture, shuffle: bool) -> None:
    for dataset in mixture.datasets.values():
        if isinstance(dataset, StreamedDataset) and dataset.shuffle != shuffle:
            raise ValueError(f"data.shuffle={shuffle}, but the stream was opened with {dataset.shuffle}: open it so")


def _require_batch(mixture: Mixture, rows: int) -> None:
    """A dataset that is alone must have a batch; in a mixture, a small one may be read several times in a batch."""
    for name, dataset in mixture.datasets.items():
        needed = rows if len(mixture.datasets) == 1 else 1
        if isinstance(dataset, PackedDataset):
            enough, found = len(dataset) >= needed, str(len(dataset))
        else:
            enough, found = dataset.holds(needed), "fewer"
        if not enough:
            raise ValueError(
                f"train.global_batch_size={rows} is more than the text to train on has ({name}), {found} rows of "
                f"data.sequence_length={dataset.sequence_length} tokens: give more text, a smaller batch, or a shorter "
                "sequence_length"
            )
