"""From the meta device to values: a seeded start that is the same for every layout, one tensor in memory at a time."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mega_scale.model import MegaConfig, MegaPreTrainedModel
from mega_scale.model.modeling_mega import initial_tensor
from mega_scale.parallel.collectives import ALONE, Axis
from mega_scale.parallel.pieces import pieces

Values = Callable[[str, nn.Module, str], Tensor]
"""(full name, owner module, name in the owner) -> full fp32 CPU tensor of a parameter or buffer of a whole model."""

Place = Callable[[nn.Parameter, Tensor], nn.Parameter]
"""(parameter as the engine left it, fp32 CPU value) -> parameter that holds what the engine keeps of it on this rank.

The value is whole, or this rank's part along `tp`."""


class _Slot(NamedTuple):
    name: str
    owner: nn.Module
    local_name: str


def seeded_values(config: MegaConfig, seed: int) -> Values:
    """Initial values that depend on the seed and the tensor's name only, not on ranks, engine or order.

    Args:
        config: the model's configuration.
        seed: any integer.

    Returns:
        A function that draws the initial value of one tensor.
    """

    def value(name: str, owner: nn.Module, local_name: str) -> Tensor:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        drawn = initial_tensor(owner, local_name, config, generator)
        if drawn is None:
            raise ValueError(f"{name} has no initial value: add {type(owner).__name__}.{local_name} to the initialiser")
        return drawn

    return value


def fill(
    model: MegaPreTrainedModel,
    values: Values,
    place: Place,
    device: torch.device,
    *,
    template: nn.Module | None = None,
    tp: Axis = ALONE,
) -> None:
    """Give every parameter and buffer its value; what was tied stays tied.

    Args:
        model: model on the meta device, or sharded and empty; changed in place.
        values: full values of parameters and persistent buffers.
        place: puts a rank's part of a value where the engine wants it.
        device: where buffers go.
        template: the same model before it was spread, on the meta device; none: the model was not spread.
        tp: the ranks that share every layer.

    Raises:
        ValueError: a value has another shape than the model's tensor.
    """
    table = pieces(model)
    whole = {slot.name: slot for slot in _slots(template or model)}
    tied: dict[nn.Parameter, list[_Slot]] = {}
    for slot in _slots(model):
        parameter = slot.owner._parameters[slot.local_name]
        if parameter is not None:
            tied.setdefault(parameter, []).append(slot)
    drawn: dict[str, Tensor] = {}  # one tensor at most: the next parameter may be another part of it
    for parameter, (first, *others) in tied.items():
        piece = table[first.name]
        if piece.source not in drawn:
            drawn.clear()
            source = whole[piece.source]
            target = source.owner._parameters[source.local_name]
            assert target is not None, f"{source.name} is no parameter of the template"
            drawn[piece.source] = _checked(values, source, target)
        placed = place(parameter, piece.of(drawn[piece.source], tp.rank, tp.size))
        for slot in (first, *others):
            slot.owner._parameters[slot.local_name] = placed
    drawn.clear()
    start = seeded_values(model.config, 0)
    for name, owner in model.named_modules():
        for local_name, buffer in owner.named_buffers(recurse=False):
            slot = _Slot(f"{name}.{local_name}" if name else local_name, owner, local_name)
            # A buffer outside checkpoints is a constant of the configuration.
            buffer_source = start if local_name in owner._non_persistent_buffers_set else values
            owner._buffers[local_name] = _checked(buffer_source, slot, buffer).to(device, buffer.dtype)


def _slots(model: nn.Module) -> Iterator[_Slot]:
    for name, owner in model.named_modules():
        for local_name in owner._parameters:
            yield _Slot(f"{name}.{local_name}" if name else local_name, owner, local_name)


def _checked(values: Values, slot: _Slot, target: Tensor) -> Tensor:
    value = values(*slot)
    if value.shape != target.shape:
        raise ValueError(
            f"the value of {slot.name} has shape {tuple(value.shape)}, the model needs {tuple(target.shape)}: "
            "give the configuration that the values were made with"
        )
    return value
