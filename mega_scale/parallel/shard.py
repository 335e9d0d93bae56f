"""Which part of which tensor a rank holds, and how a model on the meta device gets its values.

A parameter of a parallel model is some rows of a tensor of the Hugging Face state dict (a segment of a packed layer),
sharded over the ranks of `tp` along one dimension: its `Sharding`. What one of these ranks holds of it is a box, its
`Shard`. FSDP (rows) and ZeRO (flat partitions) divide that further, and either leaves a rank one contiguous range of
the flattened box: a `LocalTensor`. Checkpoints store the same facts, so that any layout reads any other.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mega_scale.model import MegaConfig, MegaPreTrainedModel
from mega_scale.model.modeling_mega import initial_tensor
from mega_scale.parallel.world import ALONE, Axis

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


class Shard(NamedTuple):
    """A box of a tensor: `sizes[d]` indices from `offsets[d]` on, in every dimension d."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return prod(self.sizes)

    def of(self, whole: Tensor) -> Tensor:
        """The shard of a whole tensor, a view."""
        return whole[tuple(slice(first, first + size) for first, size in zip(*self, strict=True))]


class Sharding(NamedTuple):
    """How a parameter is sharded over `tp`, and of which tensor it is a part."""

    source: str  # name of a tensor of the Hugging Face state dict
    rows: tuple[int, int] | None = None  # its rows that the parameter is, [first, end); None means all
    dim: int | None = None  # dimension along which ranks of `tp` divide it; None where each has the whole
    # Of that dimension, 0, where ranks need not divide it: the last ranks' tensors are then padded with rows of zeros,
    # which get no gradient and are in no checkpoint. None where ranks divide it.
    length: int | None = None

    def shard(self, shape: Sequence[int], rank: int, size: int) -> Shard:
        """What rank `rank` of `size` holds of the whole parameter of a shape, without padding."""
        offsets, sizes = [0] * len(shape), list(shape)
        if self.dim is not None:
            each = shard_length(shape[self.dim], size)
            offsets[self.dim] = min(rank * each, shape[self.dim])
            sizes[self.dim] = min(each, shape[self.dim] - offsets[self.dim])
        return Shard(tuple(offsets), tuple(sizes))

    def local(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The parameter of rank `rank` of `size`, padded: a view of the whole source tensor where it has no padding."""
        whole = full if self.rows is None else full[slice(*self.rows)]
        own = self.shard(whole.shape, rank, size).of(whole)
        missing = 0 if self.dim is None else shard_length(whole.shape[self.dim], size) - own.shape[self.dim]
        return own if not missing else torch.cat([own, own.new_zeros(missing, *own.shape[1:])])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole parameter from the tensors of all ranks, padded or not."""
        return shards[0] if self.dim is None else torch.cat(list(shards), self.dim)[: self.length]

    def whole_shape(self, local: Sequence[int], size: int) -> torch.Size:
        """Shape of the whole parameter, from that of a rank's padded tensor."""
        shape = list(local)
        if self.dim is not None:
            shape[self.dim] = self.length or shape[self.dim] * size
        return torch.Size(shape)


class ShardedModule(nn.Module):
    """A module whose parameters are shards: what `shardings` asks modules for.

    Attributes:
        shard_dims: dimension along which a parameter is sharded, by its name; one that is not named is whole.
        length: of that dimension in the whole, where ranks need not divide it; None where they do.
        rows: rows of this module's weight and bias that each child's are, where it replaces one packed layer.
    """

    shard_dims: ClassVar[dict[str, int]] = {}
    length: int | None = None
    rows: Mapping[str, tuple[int, int]] = {}


def shard_length(length: int, ranks: int) -> int:
    """What each rank has of a length: the same, so that the last ranks' tensors end in padding."""
    return -(-length // ranks)


def shardings(model: nn.Module) -> dict[str, Sharding]:
    """The sharding of each parameter by name, tied names included, of a parallel model or a whole one."""
    found = {}
    rows: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ShardedModule):
            rows |= {f"{name}.{child}": (name, place) for child, place in module.rows.items()}
        for local_name, parameter in module._parameters.items():
            if parameter is not None:
                owner, place = rows.get(name, (name, None))
                dim = module.shard_dims.get(local_name) if isinstance(module, ShardedModule) else None
                length = module.length if isinstance(module, ShardedModule) and dim is not None else None
                found[_join(name, local_name)] = Sharding(_join(owner, local_name), place, dim, length)
    return found


def by_source(table: Mapping[str, Sharding]) -> dict[str, list[str]]:
    """The parameters that make up each tensor of the Hugging Face state dict, in the order of its rows."""
    found: dict[str, list[str]] = {}
    for name, sharding in table.items():
        found.setdefault(sharding.source, []).append(name)
    return {source: sorted(names, key=lambda name: table[name].rows or (0, 0)) for source, names in found.items()}


def assemble(names: Sequence[str], read: Callable[[str], Tensor]) -> Tensor:
    """Concatenate the rows of one tensor from its parameters, each already whole."""
    return read(names[0]) if len(names) == 1 else torch.cat([read(name) for name in names])


class LocalTensor(NamedTuple):
    """What this rank holds of one parameter, and of its moments."""

    shape: torch.Size  # of the whole parameter
    shard: Shard  # what this rank of `tp` has of it
    start: int  # first number, in the flattened shard
    # `weight`, and `exp_avg` and `exp_avg_sq` where it is trained, by these names: 1-D fp32, all of one length; views
    # of the engine's memory, so that what is written into them is loaded.
    tensors: dict[str, Tensor]
    copies: int  # ranks that hold the same numbers
    copy: int  # number of this rank among them


class EngineState(NamedTuple):
    """Model and optimizer as one rank holds them."""

    shardings: dict[str, Sharding]  # of the parameters; tied names are left out
    ties: dict[str, str]  # further names of the state dict, each with the name whose tensor it shares
    tp: int  # ranks over which parameters are sharded
    tp_rank: int  # this rank among them
    tensors: dict[str, LocalTensor]  # by parameter, the same names in the same order on all ranks
    steps: list[Tensor]  # the optimizer's counters of steps, all equal; scalar tensors of the engine
    buffers: dict[str, Tensor]  # persistent ones by name of the state dict, the same on all ranks


def untied(model: nn.Module) -> tuple[dict[str, Sharding], dict[str, str]]:
    """`shardings` and `ties` of a model's `EngineState`."""
    table = shardings(model)
    first: dict[nn.Parameter, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            ties[table.pop(name).source] = table[first[parameter]].source
    return table, ties


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state dict, by name."""
    return {
        _join(name, local_name): buffer
        for name, owner in model.named_modules()
        for local_name, buffer in owner.named_buffers(recurse=False)
        if local_name not in owner._non_persistent_buffers_set
    }


Values = Callable[[str, nn.Module, str], Tensor]
"""(full name, owner module, name in the owner) -> full fp32 CPU tensor of a parameter or buffer of a whole model."""

Placer = Callable[[nn.Parameter, Tensor], nn.Parameter]
"""(parameter as the engine left it, fp32 CPU value of this rank of `tp`) -> parameter with what this rank keeps."""


class _Slot(NamedTuple):
    name: str
    owner: nn.Module
    local_name: str


def seeded_values(config: MegaConfig, seed: int) -> Values:
    """Initial values of a model, which depend on the seed and a tensor's name only, not on ranks, engine or order."""

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
    place: Placer,
    device: torch.device,
    *,
    template: nn.Module | None = None,
    tp: Axis = ALONE,
) -> None:
    """Give every parameter and buffer its value, with one whole tensor in memory at a time; ties are kept.

    Args:
        model: on the meta device, or sharded and empty; changed in place.
        values: full values of parameters and persistent buffers.
        place: puts this rank's value where the engine wants it.
        device: of the buffers.
        template: the same model before it was made parallel, on the meta device; None: it was not.
        tp: the ranks that share every layer.

    Raises:
        ValueError: a value has another shape than the model's tensor.
    """
    table = shardings(model)
    whole = {slot.name: slot for slot in _slots(template or model)}
    tied: dict[nn.Parameter, list[_Slot]] = {}
    for slot in _slots(model):
        parameter = slot.owner._parameters[slot.local_name]
        if parameter is not None:
            tied.setdefault(parameter, []).append(slot)
    drawn: dict[str, Tensor] = {}  # one tensor at most: the next parameter may be more rows of it
    for parameter, (first, *others) in tied.items():
        sharding = table[first.name]
        if sharding.source not in drawn:
            drawn.clear()
            source = whole[sharding.source]
            target = source.owner._parameters[source.local_name]
            assert target is not None, f"{source.name} is not a parameter of the template"
            drawn[sharding.source] = _checked(values, source, target)
        placed = place(parameter, sharding.local(drawn[sharding.source], tp.rank, tp.size))
        for slot in (first, *others):
            slot.owner._parameters[slot.local_name] = placed
    drawn.clear()
    constants = seeded_values(model.config, 0)
    for name, owner in model.named_modules():
        for local_name, buffer in owner.named_buffers(recurse=False):
            slot = _Slot(_join(name, local_name), owner, local_name)
            # A buffer outside checkpoints is a constant of the configuration.
            buffer_values = constants if local_name in owner._non_persistent_buffers_set else values
            owner._buffers[local_name] = _checked(buffer_values, slot, buffer).to(device, buffer.dtype)


def _slots(model: nn.Module) -> Iterator[_Slot]:
    for name, owner in model.named_modules():
        for local_name in owner._parameters:
            yield _Slot(_join(name, local_name), owner, local_name)


def _checked(values: Values, slot: _Slot, target: Tensor) -> Tensor:
    value = values(*slot)
    if value.shape != target.shape:
        raise ValueError(
            f"the value of {slot.name} has shape {tuple(value.shape)}, the model needs {tuple(target.shape)}: "
            "give the configuration that the values were made with"
        )
    return value


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def on_meta(module: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Make a module without memory for its parameters."""
    with torch.device("meta"):
        return module(*args, **kwargs)


def replace_modules(model: nn.Module, build: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Put other modules in the place of some of a model's.

    Args:
        model: changed in place.
        build: (name, module) -> what takes its place; None leaves it, and the modules inside are then asked for.
    """
    for name, parent in list(model.named_modules()):
        for local_name, module in list(parent.named_children()):
            if (new := build(_join(name, local_name), module)) is not None:
                parent.add_module(local_name, new.train(module.training))
