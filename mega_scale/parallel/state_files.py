"""The canonical form of model and optimizer as files: one safetensors file a rank, and an index of who wrote what.

    index.json              what the parameters are, their shapes, and which range of which one lies in which file
    part-00000.safetensors  `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`, each a range of numbers, fp32

Ranks that hold the same share the work of writing it. Any number of ranks in any mesh reads what it needs: ranges that
overlap with its own, or whole parameters where `tp` differs, one at a time.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.parallel.collectives import ALONE, Axis
from mega_scale.parallel.pieces import Piece
from mega_scale.parallel.state import MOMENTS, WEIGHT, EngineState, Names
from mega_scale.parallel.stored_parts import BUFFER, Span, StoredParts

INDEX = "index.json"
FORMAT = 1
_MOST_STEPS = 2**53  # what every kind of number that counts steps can hold


def own_part(state: EngineState, rank: int, tp_rank: int) -> tuple[dict[str, Tensor], dict[str, Span]]:
    """What a rank has to write.

    Args:
        state: of its engine.
        rank: its number; rank 0 writes the buffers.
        tp_rank: its place along tp.

    Returns:
        1-D tensors by their name in the file, views of the engine's memory, which only a step changes; buffers are
        copies, since a forward pass may change them; and the range of each parameter.
    """
    tensors: dict[str, Tensor] = {}
    spans: dict[str, Span] = {}
    for name, held in state.held.items():
        length = len(held.tensors[WEIGHT])
        first, last = (length * number // held.copies for number in (held.copy, held.copy + 1))
        if last > first:
            cut = state.names.table[name].dim is not None
            spans[name] = (tp_rank if cut else 0, held.start + first, held.start + last)
            tensors |= {f"{kind}/{name}": tensor[first:last] for kind, tensor in held.tensors.items()}
    if rank == 0:
        tensors |= {f"{BUFFER}/{name}": buffer.clone() for name, buffer in state.buffers.items()}
    return tensors, spans


def index_of(state: EngineState, spans: list[dict[str, Span]]) -> dict[str, Any]:
    """What `index.json` holds.

    Args:
        state: of any rank's engine.
        spans: what each rank wrote, in their order.
    """
    shapes = {name: held.shape for name, held in state.held.items()}
    trained = [name for name, held in state.held.items() if len(held.tensors) > 1]
    return _index(state.names, int(state.steps[0]) if state.steps else 0, shapes, trained, state.buffers, spans)


def _index(
    names: Names,
    optimizer_steps: int,
    shapes: Mapping[str, torch.Size],
    trained: Iterable[str],
    buffers: Iterable[str],
    spans: list[dict[str, Span]],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "optimizer_steps": optimizer_steps,
        **names._asdict(),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "trained": sorted(trained),
        "buffers": list(buffers),
        "parts": spans,
    }


class Part(NamedTuple):
    """What one of several files has to hold.

    Args:
        like: tensors by their name in the file, on the meta device.
        spans: the range of each parameter.
        read: gives a tensor of that name.
    """

    like: dict[str, Tensor]
    spans: dict[str, Span]
    read: Callable[[str], Tensor]


class StateReader:
    """Reads the files; needs no process group, and memory for one parameter.

    Args:
        folder: of `index.json`.

    Raises:
        ValueError: the index cannot be read, or is of another format.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"it has format {found['format']}, this version reads {FORMAT}")
            table = {
                name: Piece(source, None if rows is None else tuple(rows), *cut)
                for name, (source, rows, *cut) in found["table"].items()
            }
            self.names = Names(table, found["ties"], found["tp"])
            self.optimizer_steps = found["optimizer_steps"]
            self.shapes = {name: torch.Size(shape) for name, shape in found["shapes"].items()}
            self.trained, self.buffers = set(found["trained"]), list(found["buffers"])
            self._stored = StoredParts(folder, found["parts"])
            self._require_sense()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
            raise ValueError(f"{folder / INDEX} cannot be read ({error!r}): choose another checkpoint") from None

    def load(self, state: EngineState, tp: Axis) -> None:
        """Write what the files hold into an engine's memory.

        Args:
            state: of the engine, see `Engine.state`; it is changed only if all of it fits.
            tp: the ranks that share every layer.

        Raises:
            ValueError: the files hold another model; nothing was changed.
        """
        self._require(state)
        wanted = [
            (tensor, (name, kind, held.start, held.start + len(tensor), state.names.table[name].dim, tp))
            for name, held in state.held.items()
            for kind, tensor in held.tensors.items()
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

    def read(self, name: str, kind: str, start: int, stop: int, dim: int | None = None, tp: Axis = ALONE) -> Tensor:
        """Some numbers of a parameter or moment.

        Args:
            name: of the parameter.
            kind: weight, exp_avg or exp_avg_sq.
            start: first number, in the flattened part that this rank of `tp` has.
            stop: the one after the last.
            dim: dimension along which `tp` cuts the parameter; none where it does not.
            tp: the ranks that share every layer.

        Returns:
            (stop - start,) on the CPU.
        """
        if self._is_cut_so(name, dim, tp):
            return self._range(name, kind, 0 if dim is None else tp.rank, start, stop)
        whole = self.whole(name, kind)
        return Piece(name, None, dim).of(whole, tp.rank, tp.size).reshape(-1)[start:stop]

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole parameter or moment, on the CPU."""
        found = [
            self._range(name, kind, tp_rank, 0, shape.numel()).view(shape)
            for tp_rank, shape in enumerate(self._parts(name))
        ]
        return self.names.table[name].join(found)

    def part_of(self, part: int, parts: int) -> Part:
        """What one of `parts` files has to hold, if each has its share of every parameter, whole along tp."""
        like: dict[str, Tensor] = {}
        spans: dict[str, Span] = {}
        for name, shape in self.shapes.items():
            first, last = (shape.numel() * number // parts for number in (part, part + 1))
            if last > first:
                spans[name] = (0, first, last)
                kinds = (WEIGHT, *MOMENTS) if name in self.trained else (WEIGHT,)
                like |= {f"{kind}/{name}": torch.empty(last - first, device="meta") for kind in kinds}
        if part == 0:
            like |= {f"{BUFFER}/{name}": self.buffer(name).to("meta") for name in self.buffers}

        def read(stored: str) -> Tensor:
            kind, name = stored.split("/", 1)
            if kind == BUFFER:
                return self.buffer(name)
            _, first, last = spans[name]
            return self.whole(name, kind).view(-1)[first:last]

        return Part(like, spans, read)

    def index(self, spans: list[dict[str, Span]]) -> dict[str, Any]:
        """What `index.json` holds if the same state lies in other files, whole along tp."""
        table = {name: piece._replace(dim=None, length=None) for name, piece in self.names.table.items()}
        return _index(
            Names(table, self.names.ties, 1), self.optimizer_steps, self.shapes, self.trained, self.buffers, spans
        )

    def buffer(self, name: str) -> Tensor:
        """A buffer, on the CPU.

        Raises:
            ValueError: there is none of that name.
        """
        return self._stored.buffer(name)

    def _look_for(self, name: str, kind: str, start: int, stop: int, dim: int | None, tp: Axis) -> None:
        """Do what `read` does, without reading."""
        if self._is_cut_so(name, dim, tp):
            self._stored.find(name, kind, 0 if dim is None else tp.rank, start, stop)
        else:
            for tp_rank, shape in enumerate(self._parts(name)):
                self._stored.find(name, kind, tp_rank, 0, shape.numel())

    def _is_cut_so(self, name: str, dim: int | None, tp: Axis) -> bool:
        return dim == self.names.table[name].dim and (dim is None or tp.size == self.names.tp)

    def _parts(self, name: str) -> list[torch.Size]:
        """Shapes of the parts along tp in which a parameter is stored."""
        piece, size = self.names.table[name], self.names.tp
        return [piece.part_shape(self.shapes[name], rank, size) for rank in range(1 if piece.dim is None else size)]

    def _range(self, name: str, kind: str, tp_rank: int, start: int, stop: int) -> Tensor:
        pieces = [stored[numbers] for stored, numbers in self._stored.find(name, kind, tp_rank, start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _require_sense(self) -> None:
        """See that counts are counts, so that nothing is looped over that no model has."""
        steps, tp = self.optimizer_steps, self.names.tp
        if type(steps) is not int or not 0 <= steps < _MOST_STEPS:
            raise ValueError(f"it says that the optimizer has done {steps!r} steps")
        if type(tp) is not int or tp < 1:
            raise ValueError(f"it says that layers are cut in {tp!r}")
        if missing := self.names.table.keys() - self.shapes.keys():
            raise ValueError(f"it has no shape of {min(missing)}")
        for name, piece in self.names.table.items():
            if piece.dim is None:
                continue
            length = self.shapes[name][piece.dim]
            if piece.length not in (None, length) or (piece.length is None and length % tp):
                raise ValueError(f"{name} cannot be cut in {tp}")

    def _require(self, state: EngineState) -> None:
        wanted = {name: held.shape for name, held in state.held.items()}
        found = {name: self.shapes.get(name) for name in self.names.table}
        if wanted != found:
            names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            first = names[0]
            raise ValueError(
                f"{self._folder} holds another model: {first} is {_text(found.get(first))} there and "
                f"{_text(wanted.get(first))} here ({len(names)} such parameters): set the checkpoint's model.* keys"
            )
        trained = {name for name, held in state.held.items() if len(held.tensors) > 1}
        if trained - self.trained:
            raise ValueError(
                f"{self._folder} has no moments of {sorted(trained - self.trained)[0]}, which is trained here"
            )


def _text(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
