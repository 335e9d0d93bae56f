"""Model and optimizer as files, in one canonical form for both engines: a safetensors file a rank, and an index.

    index.json              shape and sharding of every parameter, and which numbers of which one lie in which file
    part-00000.safetensors  `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`, each a range of numbers, fp32

Every engine keeps of each parameter, and of its moments, one contiguous range of the flattened shard that its rank of
`tp` has. Ranks that hold the same numbers share the work of writing them. Any number of ranks in any mesh reads what it
needs: the ranges that overlap with its own, or, where `tp` differs, whole parameters, one at a time.
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mega_scale.parallel.shard import MOMENTS, WEIGHT, EngineState, Shard, Sharding, assemble, by_source

INDEX = "index.json"
FORMAT = 1
_BUFFER = "buffer"
_MOST_STEPS = 2**53  # what every kind of number that counts steps can hold
_OPEN_FILES = 64
_DTYPE = "F32"

StoredRange = tuple[int, int, int]
"""Rank of tp whose shard it is (0 where a parameter is not sharded), first number in it, and the one after the last."""


def state_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"part-{rank:05d}.safetensors"


def rank_tensors(state: EngineState, rank: int) -> tuple[dict[str, Tensor], dict[str, StoredRange]]:
    """What a rank writes of its engine's state; rank 0 writes the buffers.

    Returns:
        1-D tensors by their name in the file, views of the engine's memory, which only a step changes; buffers are
        copies, since a forward pass may change them; and the range of each parameter.
    """
    tensors: dict[str, Tensor] = {}
    ranges: dict[str, StoredRange] = {}
    for name, local in state.tensors.items():
        length = len(local.tensors[WEIGHT])
        first, last = (length * number // local.copies for number in (local.copy, local.copy + 1))
        if last > first:
            sharded = state.shardings[name].dim is not None
            ranges[name] = (state.tp_rank if sharded else 0, local.start + first, local.start + last)
            tensors |= {f"{kind}/{name}": tensor[first:last] for kind, tensor in local.tensors.items()}
    if rank == 0:
        tensors |= {f"{_BUFFER}/{name}": buffer.clone() for name, buffer in state.buffers.items()}
    return tensors, ranges


def build_index(state: EngineState, ranges: list[dict[str, StoredRange]]) -> dict[str, Any]:
    """What `index.json` holds, from any rank's state and from what each rank wrote, in their order."""
    return {
        "format": FORMAT,
        "optimizer_steps": int(state.steps[0]) if state.steps else 0,
        "table": state.shardings,
        "ties": state.ties,
        "tp": state.tp,
        "shapes": {name: list(local.shape) for name, local in state.tensors.items()},
        "trained": sorted(name for name, local in state.tensors.items() if len(local.tensors) > 1),
        "buffers": list(state.buffers),
        "parts": ranges,
    }


class FileContents(NamedTuple):
    """What one file of a state that is rewritten has to hold."""

    like: dict[str, Tensor]  # by their name in the file, on the meta device
    ranges: dict[str, StoredRange]  # of each parameter
    read: Callable[[str], Tensor]  # gives a tensor of a name in the file


class StateReader:
    """Reads the files of a state; needs no process group, and memory for one parameter.

    Args:
        folder: of `index.json`.

    Raises:
        ValueError: the index cannot be read, or is of another format.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = _StateFiles(folder)
        try:
            found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self._index: dict[str, Any] = found
            if found["format"] != FORMAT:
                raise ValueError(f"it has format {found['format']}, this version reads {FORMAT}")
            self.shardings = {
                name: Sharding(source, None if rows is None else tuple(rows), *rest)
                for name, (source, rows, *rest) in found["table"].items()
            }
            self.ties: dict[str, str] = found["ties"]
            self.tp, self.optimizer_steps = found["tp"], found["optimizer_steps"]
            self.shapes = {name: torch.Size(shape) for name, shape in found["shapes"].items()}
            self.trained, self.buffers = set(found["trained"]), list(found["buffers"])
            self._require_sense()
            self._stored = self._stored_shards(found["parts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
            raise ValueError(f"{folder / INDEX} cannot be read ({error!r}): choose another checkpoint") from None

    def load(self, state: EngineState) -> None:
        """Write what the files hold into an engine's memory, which is changed only if all of it fits.

        Raises:
            ValueError: the files hold another model; nothing was changed.
        """
        self._require(state)
        wanted = [
            (tensor, (name, kind, local.shard, local.start, local.start + len(tensor)))
            for name, local in state.tensors.items()
            for kind, tensor in local.tensors.items()
        ]
        buffers = {name: self.buffer(name) for name in state.buffers}
        for name, buffer in state.buffers.items():
            if buffers[name].shape != buffer.shape:
                found, here = tuple(buffers[name].shape), tuple(buffer.shape)
                raise ValueError(f"{self._folder} holds another model: buffer {name} is {found} there and {here} here")
        for _, numbers in wanted:
            self._look_for(*numbers)
        for tensor, numbers in wanted:
            tensor.copy_(self.read(*numbers))
        for step in state.steps:
            step.fill_(self.optimizer_steps)
        for name, buffer in state.buffers.items():
            buffer.copy_(buffers[name])

    def read(self, name: str, kind: str, shard: Shard, start: int, stop: int) -> Tensor:
        """Some numbers of a parameter or moment.

        Args:
            name: of the parameter.
            kind: weight, exp_avg or exp_avg_sq.
            shard: of the whole parameter.
            start: first number, in the flattened shard.
            stop: the one after the last.

        Returns:
            (stop - start,) on the CPU.
        """
        if start == stop or (name, shard) in self._stored:
            return self._range(name, kind, shard, start, stop)
        return shard.of(self.whole(name, kind)).reshape(-1)[start:stop]

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole parameter or moment, on the CPU."""
        shards = self._shards(name)
        return self.shardings[name].join(
            [self._range(name, kind, shard, 0, shard.numel).view(shard.sizes) for shard in shards]
        )

    def buffer(self, name: str) -> Tensor:
        """A buffer, on the CPU; raises ValueError where there is none of that name."""
        return self._files.tensor(0, f"{_BUFFER}/{name}")

    def file_contents(self, file: int, files: int) -> FileContents:
        """What one of `files` files has to hold, if each has its share of every parameter, whole along tp."""
        like: dict[str, Tensor] = {}
        ranges: dict[str, StoredRange] = {}
        for name, shape in self.shapes.items():
            first, last = (shape.numel() * number // files for number in (file, file + 1))
            if last > first:
                ranges[name] = (0, first, last)
                kinds = (WEIGHT, *MOMENTS) if name in self.trained else (WEIGHT,)
                like |= {f"{kind}/{name}": torch.empty(last - first, device="meta") for kind in kinds}
        if file == 0:
            like |= {f"{_BUFFER}/{name}": self.buffer(name).to("meta") for name in self.buffers}

        def read(stored: str) -> Tensor:
            kind, name = stored.split("/", 1)
            if kind == _BUFFER:
                return self.buffer(name)
            _, first, last = ranges[name]
            return self.whole(name, kind).view(-1)[first:last]

        return FileContents(like, ranges, read)

    def index(self, ranges: list[dict[str, StoredRange]]) -> dict[str, Any]:
        """What `index.json` holds if the same state lies in other files, whole along tp."""
        whole = {name: sharding._replace(dim=None, length=None) for name, sharding in self.shardings.items()}
        return self._index | {"table": whole, "tp": 1, "parts": ranges}

    def _shards(self, name: str) -> list[Shard]:
        """The shards in which a parameter is stored."""
        sharding = self.shardings[name]
        ranks = 1 if sharding.dim is None else self.tp
        return [sharding.shard(self.shapes[name], rank, ranks) for rank in range(ranks)]

    def _stored_shards(self, files: list[dict[str, Any]]) -> dict[tuple[str, Shard], list[tuple[int, int, int]]]:
        """By parameter and shard, which ranges of its numbers lie where: file, first and end, in order."""
        found: dict[tuple[str, Shard], list[tuple[int, int, int]]] = {}
        for file, ranges in enumerate(files):
            for name, (tp_rank, start, stop) in ranges.items():
                integers = all(type(number) is int for number in (tp_rank, start, stop))
                if not integers or not 0 <= start <= stop or not 0 <= tp_rank < self.tp:
                    raise ValueError(f"part {file} has {(tp_rank, start, stop)} as its range of {name}")
                shard = self.shardings[name].shard(self.shapes[name], tp_rank, self.tp)
                found.setdefault((name, shard), []).append((file, start, stop))
        return {key: sorted(ranges, key=lambda one: one[1]) for key, ranges in found.items()}

    def _find(self, name: str, kind: str, shard: Shard, start: int, stop: int) -> list[tuple[Any, slice]]:
        """Stored tensors, in order, and which of their numbers make up a range of a stored shard; reads nothing."""
        found: list[tuple[Any, slice]] = []
        at = start
        for file, begin, end in self._stored.get((name, shard), []):
            first, last = max(begin, at), min(end, stop)
            if first == at and last > first:
                stored = self._files.slice(file, f"{kind}/{name}", end - begin)
                found.append((stored, slice(first - begin, last - begin)))
                at = last
        if at < stop:
            raise ValueError(f"{self._folder} lacks numbers {at} to {stop} of {kind} {name}: choose another checkpoint")
        return found

    def _look_for(self, name: str, kind: str, shard: Shard, start: int, stop: int) -> None:
        """Raise as `read` would, without reading."""
        if start == stop or (name, shard) in self._stored:
            self._find(name, kind, shard, start, stop)
        else:
            for other in self._shards(name):
                self._find(name, kind, other, 0, other.numel)

    def _range(self, name: str, kind: str, shard: Shard, start: int, stop: int) -> Tensor:
        parts = [stored[numbers] for stored, numbers in self._find(name, kind, shard, start, stop)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0)

    def _require_sense(self) -> None:
        """See that counts are counts, so that nothing is looped over that no model has."""
        if type(self.optimizer_steps) is not int or not 0 <= self.optimizer_steps < _MOST_STEPS:
            raise ValueError(f"it says that the optimizer has done {self.optimizer_steps!r} steps")
        if type(self.tp) is not int or self.tp < 1:
            raise ValueError(f"it says that layers are cut in {self.tp!r}")
        if missing := self.shardings.keys() - self.shapes.keys():
            raise ValueError(f"it has no shape of {min(missing)}")
        for name, sharding in self.shardings.items():
            if sharding.dim is None:
                continue
            length = self.shapes[name][sharding.dim]
            if sharding.length not in (None, length) or (sharding.length is None and length % self.tp):
                raise ValueError(f"{name} cannot be cut in {self.tp}")

    def _require(self, state: EngineState) -> None:
        wanted = {name: local.shape for name, local in state.tensors.items()}
        found = {name: self.shapes.get(name) for name in self.shardings}
        if wanted != found:
            names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            first = names[0]
            raise ValueError(
                f"{self._folder} holds another model: {first} is {_text(found.get(first))} there and "
                f"{_text(wanted.get(first))} here ({len(names)} such parameters): set the checkpoint's model.* keys"
            )
        trained = {name for name, local in state.tensors.items() if len(local.tensors) > 1}
        if trained - self.trained:
            raise ValueError(
                f"{self._folder} has no moments of {sorted(trained - self.trained)[0]}, which is trained here"
            )


def _text(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


class _StateFiles:
    """The safetensors files of a folder, of which some are kept open; tensors are read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, Any] = OrderedDict()

    def tensor(self, file: int, name: str) -> Tensor:
        """A tensor, read."""
        try:
            found: Tensor = self._file(file).get_tensor(name)
        except SafetensorError as error:
            raise self._lacks(file, name, error) from None
        return found

    def slice(self, file: int, name: str, length: int) -> Any:
        """A tensor (length,) of the format that states are stored in, of which slices can be read."""
        try:
            stored = self._file(file).get_slice(name)
        except SafetensorError as error:
            raise self._lacks(file, name, error) from None
        found, expected = (stored.get_dtype(), stored.get_shape()), (_DTYPE, [length])
        if found != expected:
            raise self._lacks(file, name, f"it is {found}, the index says {expected}")
        return stored

    def _lacks(self, file: int, name: str, reason: object) -> ValueError:
        return ValueError(f"{self._folder / state_file(file)} lacks {name} ({reason}): choose another checkpoint")

    def _file(self, file: int) -> Any:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            path = self._folder / state_file(file)
            try:
                self._open[file] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error}): choose another checkpoint") from None
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return self._open[file]


class LazyWeights(Mapping[str, Tensor]):
    """Full CPU tensors by state-dict name, tied names and persistent buffers included, each read when asked for."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader
        self._stored = by_source(reader.shardings) | {name: [name] for name in reader.buffers}
        self._stored |= {name: self._stored[owner] for name, owner in reader.ties.items()}

    def __getitem__(self, name: str) -> Tensor:
        return assemble(self._stored[name], self._read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def _read(self, name: str) -> Tensor:
        tensor = self._reader.whole(name) if name in self._reader.shardings else self._reader.buffer(name)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def open_weights(folder: Path) -> LazyWeights:
    """Open the weights of a state, the folder of `index.json`; memory is bounded by one tensor.

    Returns:
        A mapping from state-dict name to full tensor, floating ones in fp32.

    Raises:
        ValueError: the folder holds no such files, or not all of them.
    """
    return LazyWeights(StateReader(folder))


_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 16 * 2**20


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    update: Callable[[bytes | memoryview], None],
    read: Callable[[str], Tensor] | None = None,
) -> int:
    """Write tensors as a safetensors file, hashing on the way, and have the disk keep them.

    Tensors are copied from their device one at a time. The interpreter's lock is free while the system writes.

    Args:
        path: file to create.
        tensors: by name, of any device and shape, contiguous.
        update: is given every byte of the file, in order.
        read: gives each tensor when it is its turn, where `tensors` has only their shapes, on the meta device.

    Returns:
        Size of the file, bytes.

    Raises:
        OSError: the file cannot be written.
    """
    header = _header(tensors)
    with open(path, "wb", buffering=0) as file:
        total = _write(file.fileno(), memoryview(header), update)
        for name, like in tensors.items():
            if like.numel():
                tensor = like if read is None else read(name)
                total += _write(file.fileno(), as_bytes(tensor.cpu()).numpy().data, update)
        os.fsync(file.fileno())
    return total


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8 (bytes,), a view."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _write(file: int, content: memoryview, update: Callable[[bytes | memoryview], None]) -> int:
    # In chunks, which are still in the processor's cache when they are hashed.
    for start in range(0, len(content), _CHUNK_BYTES):
        chunk = content[start : start + _CHUNK_BYTES]
        update(chunk)
        while chunk:
            chunk = chunk[os.write(file, chunk) :]
    return len(content)


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON that stand before the numbers: https://github.com/huggingface/safetensors#format."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
