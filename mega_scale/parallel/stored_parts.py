"""The files `part-00000.safetensors` and on: which numbers of which parameter lie where, read when asked for."""

from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

Span = tuple[int, int, int]
"""Rank of tp (0 where the parameter is not cut), first number, and the one after the last."""

BUFFER = "buffer"
_OPEN_FILES = 64
_DTYPE = "F32"


def part_file(rank: int) -> str:
    """Name of the file that a rank wrote."""
    return f"part-{rank:05d}.safetensors"


class _Source(NamedTuple):
    part: int
    start: int
    stop: int


class StoredParts:
    """Finds numbers in the files of a folder, of which it keeps some open.

    Args:
        folder: of the files.
        spans: the range of each parameter that each file holds, in their order.

    Raises:
        ValueError: a range is none.
    """

    def __init__(self, folder: Path, spans: list[dict[str, Span]]) -> None:
        self._folder = folder
        self._sources: dict[tuple[str, int], list[_Source]] = {}
        for part, of_part in enumerate(spans):
            for name, (tp_rank, start, stop) in of_part.items():
                if not all(type(number) is int for number in (tp_rank, start, stop)) or not 0 <= start <= stop:
                    raise ValueError(f"part {part} has {(tp_rank, start, stop)} as its range of {name}")
                self._sources.setdefault((name, tp_rank), []).append(_Source(part, start, stop))
        for sources in self._sources.values():
            sources.sort(key=lambda source: source.start)
        self._files: OrderedDict[int, Any] = OrderedDict()

    def find(self, name: str, kind: str, tp_rank: int, start: int, stop: int) -> list[tuple[Any, slice]]:
        """Where some numbers lie, without reading them.

        Args:
            name: of the parameter.
            kind: weight, exp_avg or exp_avg_sq.
            tp_rank: whose part of the parameter; 0 where it is not cut.
            start: first number of the flattened part.
            stop: the one after the last.

        Returns:
            Stored tensors, in order, and which of their numbers.

        Raises:
            ValueError: not all of them are there, or as the index says.
        """
        found: list[tuple[Any, slice]] = []
        at = start
        for source in self._sources.get((name, tp_rank), []):
            first, last = max(source.start, at), min(source.stop, stop)
            if first == at and last > first:
                found.append((self._stored(source, f"{kind}/{name}"), slice(first - source.start, last - source.start)))
                at = last
        if at < stop:
            raise ValueError(f"{self._folder} lacks numbers {at} to {stop} of {kind} {name}: choose another checkpoint")
        return found

    def buffer(self, name: str) -> Tensor:
        """A buffer, on the CPU.

        Raises:
            ValueError: there is none of that name.
        """
        try:
            return self._file(0).get_tensor(f"{BUFFER}/{name}")
        except SafetensorError as error:
            raise self._lacks(0, f"{BUFFER}/{name}", error) from None

    def _stored(self, source: _Source, name: str) -> Any:
        try:
            stored = self._file(source.part).get_slice(name)
        except SafetensorError as error:
            raise self._lacks(source.part, name, error) from None
        found, expected = (stored.get_dtype(), stored.get_shape()), (_DTYPE, [source.stop - source.start])
        if found != expected:
            raise self._lacks(source.part, name, f"it is {found}, the index says {expected}")
        return stored

    def _lacks(self, part: int, name: str, reason: object) -> ValueError:
        return ValueError(f"{self._folder / part_file(part)} lacks {name} ({reason}): choose another checkpoint")

    def _file(self, part: int) -> Any:
        if part in self._files:
            self._files.move_to_end(part)
        else:
            path = self._folder / part_file(part)
            try:
                self._files[part] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error}): choose another checkpoint") from None
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return self._files[part]
