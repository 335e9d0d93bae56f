"""The weights of a checkpoint by their Hugging Face names, whole, without a process group and one tensor at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mega_scale.parallel.pieces import assemble, whole_tensors
from mega_scale.parallel.state_files import StateReader


class LazyWeights(Mapping[str, Tensor]):
    """Full CPU tensors by state-dict name, tied names and persistent buffers included, each read when asked for.

    Args:
        reader: of the files.
    """

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader
        self._stored = whole_tensors(reader.names.table) | {name: [name] for name in reader.buffers}
        self._stored |= {name: self._stored[owner] for name, owner in reader.names.ties.items()}

    def __getitem__(self, name: str) -> Tensor:
        return assemble(self._stored[name], self._read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def _read(self, name: str) -> Tensor:
        tensor = self._reader.whole(name) if name in self._reader.names.table else self._reader.buffer(name)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def open_weights(folder: Path) -> LazyWeights:
    """Open the weights of model and optimizer files; memory is bounded by one tensor.

    Args:
        folder: the folder of `index.json`, which a checkpoint has under `state`.

    Returns:
        A mapping from state-dict name to full tensor, floating ones in fp32.

    Raises:
        ValueError: the folder holds no such files, or not all of them.
    """
    return LazyWeights(StateReader(folder))
