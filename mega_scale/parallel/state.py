"""What a run's model and optimizer are, whichever engine and mesh they lie on: the canonical form of checkpoints.

Every engine holds of each parameter, and of its two moments, one contiguous range of numbers: FSDP rows, ZeRO flat
partitions. Ranges are counted in the flattened part that a rank of `tp` has of the parameter, so that any layout can be
read by any other one.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mega_scale.parallel.collectives import Axis
from mega_scale.parallel.pieces import Piece, pieces

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


class Names(NamedTuple):
    """What the parameters of a spread model are.

    Args:
        table: part of which tensor of the state dict each parameter is; tied names are left out.
        ties: further names of the state dict, each with the name whose tensor it shares.
        tp: ranks over which parameters are cut.
    """

    table: dict[str, Piece]
    ties: dict[str, str]
    tp: int


class Held(NamedTuple):
    """What this rank holds of one parameter.

    Args:
        shape: of the whole parameter.
        start: first number of the range, in the part that this rank has along `tp`, flattened.
        tensors: `weight`, and `exp_avg` and `exp_avg_sq` where it is trained, by these names: 1-D fp32, all of the
            range's length; views of the engine's memory, so that what is written into them is loaded.
        copies: ranks that hold the same range.
        copy: number of this rank among them.
    """

    shape: torch.Size
    start: int
    tensors: dict[str, Tensor]
    copies: int
    copy: int


class EngineState(NamedTuple):
    """Model and optimizer as one rank holds them.

    Args:
        names: what the parameters are.
        held: by parameter, the same names in the same order on all ranks.
        steps: the optimizer's counters of steps, all equal; scalar tensors of the engine.
        buffers: persistent buffers by name of the state dict, the same on all ranks; tensors of the engine.
    """

    names: Names
    held: dict[str, Held]
    steps: list[Tensor]
    buffers: dict[str, Tensor]


def names_of(module: nn.Module, tp: int) -> Names:
    """Say what the parameters of a spread model are.

    Args:
        module: the model.
        tp: ranks over which parameters are cut.
    """
    table = pieces(module)
    first: dict[nn.Parameter, str] = {}
    ties = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            ties[table.pop(name).source] = table[first[parameter]].source
    return Names(table, ties, tp)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state dict, by name."""
    return {
        f"{name}.{local_name}" if name else local_name: buffer
        for name, owner in module.named_modules()
        for local_name, buffer in owner.named_buffers(recurse=False)
        if local_name not in owner._non_persistent_buffers_set
    }


def held_range(
    piece: Piece, part: Sequence[int], start: int, tensors: dict[str, Tensor], tp: Axis, alike: Iterable[Axis]
) -> Held:
    """What a rank holds of a parameter, without what fills up its part.

    Args:
        piece: what the parameter is.
        part: shape of this rank's part along `tp` as the engine has it.
        start: first number of the range, in that part flattened.
        tensors: see `Held`; may reach beyond the part's own numbers.
        tp: the ranks that share every layer.
        alike: axes along which ranks hold the same range.
    """
    whole = piece.whole_shape(part, tp.size)
    count = max(piece.part_shape(whole, tp.rank, tp.size).numel() - start, 0)
    return Held(whole, start, {kind: tensor[:count] for kind, tensor in tensors.items()}, *copies_along(alike))


def copies_along(axes: Iterable[Axis]) -> tuple[int, int]:
    """Number of ranks that hold the same, and this one's number among them, if they do along some axes."""
    copies, copy = 1, 0
    for axis in axes:
        copies, copy = copies * axis.size, copy * axis.size + axis.rank
    return copies, copy


def ensure_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Have AdamW keep state for some tensors even before its first step, as the first step would make it.

    Args:
        optimizer: torch's AdamW.
        tensors: its parameters, or what an engine flattened them to.
    """
    on_device = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
    for tensor in tensors:
        if not optimizer.state[tensor]:
            place = tensor.device if on_device else torch.device("cpu")
            state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=place)}
            state |= {name: torch.zeros_like(tensor, requires_grad=False) for name in MOMENTS}
            optimizer.state[tensor] = state


def flat(tensor: Tensor) -> Tensor:
    """This rank's numbers of a tensor, as a 1-D view."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().view(-1)
