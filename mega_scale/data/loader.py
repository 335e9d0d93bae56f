"""From rows to batches: which rank reads which rows at which step, and where a resumed run continues.

Row g = step * G + i of a run (G global batch size) is the same whatever the ranks: laid side by side, micro-batch by
micro-batch and in each of them rank by rank, the rows of all ranks are the rows of the global batch in order.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mega_scale.data.packing import PackedDataset
from mega_scale.data.permutation import shuffled
from mega_scale.data.streaming import StreamedDataset

_IGNORED = -100  # a label that no loss counts
_MISSING = -1  # no token


class Loader:
    """Batches of one rank, a pure function of the step; epochs follow each other without end.

    Args:
        dataset: Rows of tokens.
        global_batch_size: G, rows a step over all ranks.
        micro_batch_size: Rows a rank takes at once.
        rank: This rank, 0 to below world_size.
        world_size: Number of ranks.
        seed: Chooses the orders of the epochs.
        shuffle: Order every epoch anew; a stream cannot be.

    Raises:
        ValueError: The sizes do not fit each other, or there are fewer rows than one global batch.
    """

    def __init__(
        self,
        dataset: PackedDataset | StreamedDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        _require_rank(micro_batch_size, rank, world_size)
        at_once = micro_batch_size * world_size
        if global_batch_size < 1 or global_batch_size % at_once:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is not a multiple of {world_size} ranks x "
                f"train.micro_batch_size={micro_batch_size}: use a multiple of {at_once}"
            )
        if isinstance(dataset, StreamedDataset) and shuffle:
            raise ValueError("data.shuffle=True: a stream is read in its own order; set data.shuffle=false")
        _require_batch(dataset, global_batch_size)
        self.dataset = dataset
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._world = rank, world_size
        self._seed, self._shuffle = seed, shuffle

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """Read this rank's share of one step.

        Args:
            step: Steps done before, 0 for the first.

        Returns:
            One micro-batch after the other: `input_ids` and `shift_labels`, the next tokens, (B, L) int64 each.
        """
        first = step * self._global + self._rank * self._micro
        starts = range(first, first + self._global, self._micro * self._world)
        return [_batch(self.dataset.rows(self._places(start + np.arange(self._micro)))) for start in starts]

    def state_dict(self, step: int) -> dict[str, Any]:
        """Describe the position before a step, and the data.

        Args:
            step: Steps done before.

        Returns:
            Plain JSON.
        """
        rows = step * self._global
        length = len(self.dataset) if isinstance(self.dataset, PackedDataset) else None
        return {
            "step": step,
            "rows": rows,
            "epoch": None if length is None else rows // length,
            **self._identity(),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Refuse to continue a run on other data or in another order.

        Args:
            state: What `state_dict` gave.

        Raises:
            ValueError: Names what differs.
        """
        keys = {
            "sequence_length": "data.sequence_length",
            "global_batch_size": "train.global_batch_size",
            "shuffle": "data.shuffle",
            "seed": "data.seed",
        }
        here = self._identity()
        for name, key in keys.items():
            if state.get(name) != here[name]:
                raise ValueError(
                    f"{key}={here[name]!r}, but the checkpoint was trained with {state.get(name)!r}: set it so to "
                    "continue, or start a new run from the weights with init_from"
                )
        if state.get("fingerprint") != here["fingerprint"]:
            raise ValueError(
                f"the text to train on (fingerprint {here['fingerprint']}) is not the checkpoint's "
                f"({state.get('fingerprint')}): give the same data.* keys, files and Python, or start a new run from "
                "the weights with init_from"
            )

    def _identity(self) -> dict[str, Any]:
        return {
            "sequence_length": self.dataset.sequence_length,
            "global_batch_size": self._global,
            "shuffle": self._shuffle,
            "seed": self._seed if self._shuffle else None,
            "fingerprint": self.dataset.fingerprint,
        }

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Where the rows of a run stand in the dataset; a stream numbers its own rows without end."""
        if isinstance(self.dataset, StreamedDataset):
            return rows
        length = len(self.dataset)
        epochs, places = np.divmod(rows, length)
        if self._shuffle:
            for epoch in np.unique(epochs).tolist():
                places[epochs == epoch] = shuffled(places[epochs == epoch], length, self._seed, epoch)
        return places


def validation_batches(
    dataset: PackedDataset,
    rows: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    *,
    tail: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Split the first rows of a dataset over ranks, with as many batches of the same shape for each.

    What is missing in the last batches is filled with rows whose labels are all -100, which no loss counts.

    Args:
        dataset: Rows of tokens.
        rows: Number of rows; all where there are fewer.
        micro_batch_size: Rows a rank takes at once.
        rank: This rank, 0 to below world_size.
        world_size: Number of ranks.
        tail: Take the tokens after the last row too where `rows` reaches it, so that all but the first are predicted.

    Returns:
        `input_ids` and `shift_labels`, (B, L) int64 each.

    Raises:
        ValueError: There is nothing to predict.
    """
    _require_rank(micro_batch_size, rank, world_size)
    whole = min(rows, len(dataset))
    last = dataset.tail() if tail and rows >= len(dataset) else dataset.tail()[:0]
    total = whole + (len(last) > 1)
    if total < 1:
        raise ValueError(
            f"the text to validate on has {dataset.tokens} tokens, of which no row of data.sequence_length="
            f"{dataset.sequence_length} + 1 is asked for: give more text, a larger data.validation_fraction, or a "
            "shorter sequence_length"
        )
    at_once = micro_batch_size * world_size
    starts = range(rank * micro_batch_size, -(-total // at_once) * at_once, at_once)
    return (_validation_batch(dataset, start + np.arange(micro_batch_size), whole, last) for start in starts)


def _validation_batch(dataset: PackedDataset, indices: np.ndarray, whole: int, last: np.ndarray) -> dict[str, Tensor]:
    rows = np.full((len(indices), dataset.sequence_length + 1), _MISSING)
    rows[indices < whole] = dataset.rows(indices[indices < whole])
    if len(last) > 1:
        rows[indices == whole, : len(last)] = last
    batch = _batch(rows)
    batch["input_ids"].clamp_(min=0)
    batch["shift_labels"].masked_fill_(batch["shift_labels"] == _MISSING, _IGNORED)
    return batch


def _batch(rows: np.ndarray) -> dict[str, Tensor]:
    tokens = torch.from_numpy(rows)
    # Copies even of a single row, whose two halves would else share their memory.
    return {"input_ids": tokens[:, :-1].clone(), "shift_labels": tokens[:, 1:].clone()}


def _require_rank(micro_batch_size: int, rank: int, world_size: int) -> None:
    if micro_batch_size < 1:
        raise ValueError(f"train.micro_batch_size={micro_batch_size}: give at least 1 row")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks: give 0 to {world_size - 1}")


def _require_batch(dataset: PackedDataset | StreamedDataset, rows: int) -> None:
    if isinstance(dataset, PackedDataset):
        enough, found = len(dataset) >= rows, str(len(dataset))
    else:
        enough, found = dataset.holds(rows), "fewer"
    if not enough:
        raise ValueError(
            f"train.global_batch_size={rows} is more than the text to train on has, {found} rows of "
            f"data.sequence_length={dataset.sequence_length} tokens: give more text, a smaller batch, or a shorter "
            "sequence_length"
        )
