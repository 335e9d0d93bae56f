"""Which part of which tensor of the Hugging Face state dict a parameter of a spread model is."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mega_scale.parallel.shards import TensorParallel, shard_dimension, share
from mega_scale.parallel.tensor_layers import SegmentedLinear


class Piece(NamedTuple):
    """A parameter as part of a tensor of the Hugging Face state dict.

    Args:
        source: that tensor's name.
        rows: which of its rows; none means all.
        dim: dimension along which they are cut over the ranks of `tp`; none where every rank has them whole.
        length: of that dimension, 0, in the whole, where the last ranks' parts are filled up with rows of zeros, which
            get no gradient and are in no checkpoint; none where ranks divide it.
    """

    source: str
    rows: tuple[int, int] | None = None
    dim: int | None = None
    length: int | None = None

    def of(self, full: Tensor, rank: int, size: int) -> Tensor:
        """This parameter on rank `rank` of `size` that share it, a view of the whole tensor unless it is filled up."""
        part = full if self.rows is None else full[slice(*self.rows)]
        if self.dim is None:
            return part
        each = share(part.shape[self.dim], size)
        own = part.narrow(self.dim, *_within(part.shape[self.dim], rank, each))
        missing = each - own.shape[self.dim]
        return own if not missing else torch.cat([own, own.new_zeros(missing, *own.shape[1:])])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of the whole tensor that this parameter holds, from the parts of all ranks."""
        return parts[0] if self.dim is None else torch.cat(list(parts), self.dim)[: self.length]

    def whole_shape(self, part: Sequence[int], size: int) -> torch.Size:
        """Shape of all ranks' parts together, without what fills them up."""
        shape = list(part)
        if self.dim is not None:
            shape[self.dim] = self.length or shape[self.dim] * size
        return torch.Size(shape)

    def part_shape(self, whole: Sequence[int], rank: int, size: int) -> torch.Size:
        """Shape of a rank's part, without what fills it up."""
        shape = list(whole)
        if self.dim is not None:
            _, shape[self.dim] = _within(shape[self.dim], rank, share(shape[self.dim], size))
        return torch.Size(shape)


def _within(length: int, rank: int, each: int) -> tuple[int, int]:
    """Begin and length of a rank's part of a length."""
    begin = min(rank * each, length)
    return begin, min(each, length - begin)


def pieces(model: nn.Module) -> dict[str, Piece]:
    """What each parameter of a model is, by name, tied names included.

    Args:
        model: spread over ranks, or whole.
    """
    found = {}
    rows: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SegmentedLinear):
            rows |= {f"{name}.{segment}": (name, place) for segment, place in module.rows.items()}
        for local_name, parameter in module._parameters.items():
            if parameter is not None:
                owner, place = rows.get(name, (name, None))
                source = f"{owner}.{local_name}" if owner else local_name
                own_name = f"{name}.{local_name}" if name else local_name
                dim = shard_dimension(module, local_name)
                length = module.length if isinstance(module, TensorParallel) and dim is not None else None
                found[own_name] = Piece(source, place, dim, length)
    return found


def whole_tensors(table: Mapping[str, Piece]) -> dict[str, list[str]]:
    """The parameters that make up each tensor of the Hugging Face state dict, in the order of its rows."""
    found: dict[str, list[str]] = {}
    for name, piece in table.items():
        found.setdefault(piece.source, []).append(name)
    return {source: sorted(names, key=lambda name: table[name].rows or (0, 0)) for source, names in found.items()}


def assemble(names: Sequence[str], read: Callable[[str], Tensor]) -> Tensor:
    """Join the parameters of one tensor, each already whole, row after row."""
    return read(names[0]) if len(names) == 1 else torch.cat([read(name) for name in names])
