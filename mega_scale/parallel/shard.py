"""Which part of the batch and of each tensor a rank has, and how a model on the meta device gets its values.

A parameter of a parallel model is some rows of a tensor of the Hugging Face state dict (a segment of a packed layer),
sharded over the ranks of `tp` along one dimension: its `Sharding`. What one of these ranks holds of it is a box, its
`Shard`. FSDP (rows) and ZeRO (flat partitions) divide that further, and either leaves a rank one contiguous range of
the flattened box: a `LocalTensor`. Checkpoints store the same facts, so that any layout reads any other.

Legend: B rows, L length of a whole row, C chunk, P ranks that share a row, D channels.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mega_scale.model import MegaConfig, MegaPreTrainedModel
from mega_scale.model.attention import MegaMovingAverageGatedAttention
from mega_scale.model.layers import MegaLinear
from mega_scale.model.modeling_mega import initial_tensor
from mega_scale.parallel.world import ALONE, Axis

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


class Place(NamedTuple):
    """Where a micro-batch lies in the run."""

    step: int = 0  # optimizer steps before it
    first_row: int = 0  # number of its first row in the global batch of its step


START = Place()


class RowSlice:
    """Which part of the global batch this rank computes: its whole chunks of rows that the ranks of `sp` share.

    One object serves a whole model. Inside a `with` statement the model computes part `part` of P `parts`, in multiples
    of `chunk` tokens, of the micro-batch last taken; outside, whole rows.
    """

    def __init__(self, part: int = 0, parts: int = 1, chunk: int = 1) -> None:
        self.part, self.parts = part, parts
        self.place = START  # of the micro-batch under way
        self.first_token = 0  # position of this rank's first token in its rows
        self.cut = False  # whether the model is given this rank's part of its rows
        self._multiple = parts * chunk if parts > 1 else 1
        self._taken = (START, 0)

    def split(self, tensor: Tensor, fill: int) -> Tensor:
        """This rank's part of whole rows, (B, L, ...) to (B, ceil(L / P C) C, ...); rows are filled up at their end."""
        if self.parts == 1:
            return tensor
        missing = -tensor.shape[1] % self._multiple
        if missing:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing), value=fill)
        return tensor.chunk(self.parts, dim=1)[self.part].contiguous()

    def take(self, place: Place, input_ids: Tensor, shift_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Begin a micro-batch: this rank's part of its inputs and next tokens, (B, L) int64 each.

        What fills rows up has no labels. A causal model needs no mask for it: nothing before it sees it.
        """
        inputs = self.split(input_ids, 0)
        self._taken = (place, inputs.shape[1])
        return inputs, self.split(shift_labels, -100)

    def __enter__(self) -> None:
        self.place, length = self._taken
        self.first_token, self.cut = self.part * length, self.parts > 1

    def __exit__(self, *error: object) -> None:
        self.place, self.first_token, self.cut = START, 0, False


class Shard(NamedTuple):
    """A box of a tensor: `sizes[d]` indices from `offsets[d]` on, in every dimension d."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
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


class ShardedModule(nn.Module):
    """A module whose parameters are shards: what `shardings` asks modules for."""

    shard_dims: ClassVar[dict[str, int]] = {}  # along which a parameter is sharded, by its name; others are whole
    length: int | None = None  # of that dimension in the whole, where ranks need not divide it
    # Rows of this module's weight and bias that each child's are, where it replaces one packed layer.
    rows: Mapping[str, tuple[int, int]] = {}


class SegmentedLinear(ShardedModule):
    """A packed linear layer with a layer for each segment, so that each can be sharded, or not, in its own way."""

    def __init__(self, segments: dict[str, nn.Module], rows: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.rows = rows
        for name, layer in segments.items():
            self.add_module(name, layer)


class SegmentedAttention(MegaMovingAverageGatedAttention):
    """Gated attention whose `mx_proj` is a `SegmentedLinear`."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        layers: dict[str, nn.Module] = {}
        rows: dict[str, tuple[int, int]] = {}
        end = 0
        for key, width in self.segments.items():
            layers[key], rows[key] = MegaLinear(config.hidden_size, width), (end, end + width)
            end += width
        self.add_module("mx_proj", SegmentedLinear(layers, rows))

    def project(self, averaged: Tensor) -> tuple[Tensor, ...]:
        """The average (B, L, D) to one tensor a segment."""
        return tuple(layer(averaged) for layer in self.mx_proj.children())


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


Values = Callable[[str, nn.Module, str], Tensor]
"""(full name, owner module, name in the owner) -> full fp32 CPU tensor of a parameter or buffer of a whole model."""

Placer = Callable[[nn.Parameter, Tensor], nn.Parameter]
"""(parameter as the engine left it, fp32 CPU value of this rank of `tp`) -> parameter with what this rank keeps."""


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

    Raises:
        ValueError: a value has another shape than the model's tensor.
    """
    whole = {_join(name, local_name): (owner, local_name) for name, owner, local_name in _slots(template or model)}
    tied: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for name, owner, local_name in _slots(model):
        parameter = owner._parameters[local_name]
        if parameter is not None:
            tied.setdefault(parameter, []).append((_join(name, local_name), owner, local_name))
    table = shardings(model)
    drawn: dict[str, Tensor] = {}  # one tensor at most: the next parameter may be more rows of it
    for parameter, slots in tied.items():
        sharding = table[slots[0][0]]
        if sharding.source not in drawn:
            drawn.clear()
            owner, local_name = whole[sharding.source]
            target = owner._parameters[local_name]
            assert target is not None, f"{sharding.source} is not a parameter of the template"
            drawn[sharding.source] = _checked(values, sharding.source, owner, local_name, target)
        placed = place(parameter, sharding.local(drawn[sharding.source], tp.rank, tp.size))
        for _, owner, local_name in slots:
            owner._parameters[local_name] = placed
    drawn.clear()
    constants = seeded_values(model.config, 0)
    for name, owner in model.named_modules():
        for local_name, buffer in owner.named_buffers(recurse=False):
            # A buffer outside checkpoints is a constant of the configuration.
            own = constants if local_name in owner._non_persistent_buffers_set else values
            value = _checked(own, _join(name, local_name), owner, local_name, buffer)
            owner._buffers[local_name] = value.to(device, buffer.dtype)


def _slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    return ((name, owner, local_name) for name, owner in model.named_modules() for local_name in owner._parameters)


def _checked(values: Values, name: str, owner: nn.Module, local_name: str, target: Tensor) -> Tensor:
    value = values(name, owner, local_name)
    if value.shape != target.shape:
        raise ValueError(
            f"the value of {name} has shape {tuple(value.shape)}, the model needs {tuple(target.shape)}: "
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
    """Replace modules by what `build(name, module)` gives; None leaves one, and those inside are then asked for."""
    for name, parent in list(model.named_modules()):
        for local_name, module in list(parent.named_children()):
            if (new := build(_join(name, local_name), module)) is not None:
                parent.add_module(local_name, new.train(module.training))
