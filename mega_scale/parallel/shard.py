"""Which part of the batch and of each tensor a rank has, and how a model on the meta device gets its values.

A parameter of a parallel model is some rows of a tensor of the Hugging Face state dict (a segment of a packed layer),
sharded over the ranks of `tp` along one dimension: its `Sharding`. What one of these ranks holds of it is a box, its
`Shard`. FSDP (rows) and ZeRO (flat partitions) divide that further, and either leaves a rank one contiguous range of
the flattened box: a `LocalTensor`. Checkpoints store the same facts, so that any layout reads any other.

Legend: B rows, L length of a whole row, C chunk, P ranks that share a row, D channels.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mega_scale.model import initial_tensor
from mega_scale.model.basic_layers import MegaLinear
from mega_scale.ops.linear import packed_linear
from mega_scale.parallel.world import ALONE, Axis

WEIGHT, AVERAGE = "weight", "average"
MOMENTS, MOMENTUM = ("exp_avg", "exp_avg_sq"), "momentum"  # of AdamW, and of Muon
KINDS = (WEIGHT, *MOMENTS, MOMENTUM, AVERAGE)
"""What an engine may hold of a parameter: itself, and where it is trained its moments and, if kept, its average."""


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
        self.compiled: list[Any] = []  # what drops in compiled blocks by place, which it gets as a tensor
        self._places: Tensor | None = None  # of these: key, first row and first token of each
        self._multiple = parts * chunk if parts > 1 else 1
        self._taken = (START, 0)
        self._device = torch.device("cpu")

    def split(self, tensor: Tensor, fill: int) -> Tensor:
        """This rank's part of whole rows, (B, L, ...) to (B, ceil(L / P C) C, ...); rows are filled up at their end."""
        if missing := -tensor.shape[1] % self._multiple:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing), value=fill)
        return tensor.chunk(self.parts, dim=1)[self.part].contiguous()

    def take(self, place: Place, input_ids: Tensor, shift_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Begin a micro-batch: this rank's part of its inputs and next tokens, (B, L) int64 each.

        What fills rows up has no labels. A causal model needs no mask for it: nothing before it sees it.
        """
        if self.parts > 1:
            input_ids, shift_labels = self.split(input_ids, 0), self.split(shift_labels, -100)
        self._taken, self._device = (place, input_ids.shape[1]), input_ids.device
        return input_ids, shift_labels

    def __enter__(self) -> None:
        self.place, length = self._taken
        self.first_token, self.cut = self.part * length, self.parts > 1
        if self.compiled:
            step, first_row = self.place
            places = [[drop.key(step), first_row, self.first_token] for drop in self.compiled]
            self._give(torch.tensor(places, device=self._device))

    def __exit__(self, *error: object) -> None:
        self.place, self.first_token, self.cut = START, 0, False

    def _give(self, places: Tensor) -> None:
        self._places = places
        for drop, own in zip(self.compiled, places, strict=True):
            drop.place = own

    @contextmanager
    def shifted(self, tokens: int) -> Iterator[None]:
        """Shift positions by `tokens` inside the context."""
        first, places = self.first_token, self._places
        self.first_token += tokens
        if places is not None:
            further = places.clone()
            further[:, 2] += tokens
            self._give(further)
        try:
            yield
        finally:  # recomputation ends with an exception when it has all that it needs
            self.first_token = first
            if places is not None:
                self._give(places)


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

    def part(self, full: Tensor) -> Tensor:
        """The whole parameter from the whole source tensor, a view."""
        return full if self.rows is None else full[slice(*self.rows)]

    def local(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The parameter of rank `rank` of `size`, padded: a view of the whole source tensor where it has no padding."""
        whole = self.part(full)
        own = self.shard(whole.shape, rank, size).of(whole)
        missing = 0 if self.dim is None else shard_length(whole.shape[self.dim], size) - own.shape[self.dim]
        return own if not missing else torch.cat([own, own.new_zeros(missing, *own.shape[1:])])

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole parameter from the tensors of all ranks, padded or not."""
        return shards[0] if self.dim is None else torch.cat(list(shards), self.dim)[: self.length]


class SegmentedLinear(nn.Module):
    """The packed layer of gated attention as a layer for each segment: each is sharded, or not, in its own way.

    They read the same input, so they are computed as one product, unless a layer computes its own in another way.
    """

    def __init__(self, channels: int, segments: Mapping[str, int]) -> None:
        super().__init__()
        self.rows: dict[str, tuple[int, int]] = {}  # of the packed layer's weight and bias, by segment
        end = 0
        for name, width in segments.items():
            self.add_module(name, MegaLinear(channels, width))
            self.rows[name] = (end, end + width)
            end += width

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, L, D) to one tensor a segment."""
        layers: list[Any] = list(self.children())
        if any(type(layer).forward is not MegaLinear.forward for layer in layers):
            return tuple(layer(x) for layer in layers)
        return packed_linear(x, [layer.weight for layer in layers], [layer.bias for layer in layers])


def separate_segments(model: nn.Module) -> None:
    """Take packed layers apart, in every layout, so that checkpoints bear the same names."""
    module: Any
    for module in list(model.modules()):
        if isinstance(segments := getattr(module, "segments", None), dict):  # of gated attention
            module.mx_proj = on_meta(SegmentedLinear, module.config.hidden_size, segments)


def shard_length(length: int, ranks: int) -> int:
    """What each rank has of a length: the same, so that the last ranks' tensors end in padding."""
    return -(-length // ranks)


def shardings(model: nn.Module) -> dict[str, Sharding]:
    """The sharding of each parameter by name, tied names included, of a parallel model or a whole one."""
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        module, local_name = _owner(model, name)
        packed, _, segment = name.rpartition(".")[0].rpartition(".")
        source, rows, dim, length = name, None, None, None
        if isinstance(whole := model.get_submodule(packed), SegmentedLinear):
            source, rows = f"{packed}.{local_name}", whole.rows[segment]
        dims = getattr(module, "shard_dims", {})  # of modules with shards: see tensor_parallel
        if local_name in dims:
            dim, length = dims[local_name], getattr(module, "length", None)
        found[name] = Sharding(source, rows, dim, length)
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


class Held(NamedTuple):
    """Which numbers of one parameter a rank holds."""

    shard: Shard  # what its rank of `tp` has of the whole
    start: int  # first number, in the flattened shard
    stop: int  # the one after the last
    copies: int  # ranks that hold the same numbers
    copy: int  # number of the rank among them


class LocalTensor(NamedTuple):
    """What this rank holds of one parameter, and of its moments."""

    shape: torch.Size  # of the whole parameter
    shard: Shard  # what this rank of `tp` has of it
    start: int  # first number, in the flattened shard
    # By kind, see `KINDS`: 1-D fp32, all of one length; views of the engine's memory, so that what is written into them
    # is loaded.
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
    averaged: Tensor | None = None  # steps that the average of the weights is of, scalar int64; None for no average


Values = Callable[[str, nn.Module, str], Tensor]
"""(full name, owner module, name in the owner) -> full fp32 CPU tensor of a parameter or buffer of a whole model."""
Placer = Callable[[nn.Parameter, Tensor], nn.Parameter]
"""(parameter as the engine left it, fp32 CPU value of this rank of `tp`) -> parameter with what this rank keeps."""


def seeded_values(config: Any, seed: int) -> Values:
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
    model: PreTrainedModel,
    values: Values,
    place: Placer,
    device: torch.device,
    *,
    template: nn.Module | None = None,
    tp: Axis = ALONE,
) -> None:
    """Give every parameter and buffer its value, with one whole tensor in memory at a time; ties are kept.

    The model, on the meta device or sharded and empty, is changed in place; buffers come to `device`. `template` is the
    same model before it was made parallel, None where it was not. Raises ValueError where a value has another shape
    than the model's tensor.
    """
    template = template or model
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    table = shardings(model)
    drawn: dict[str, Tensor] = {}  # one tensor at most: the next parameter may be more rows of it
    for parameter, tied in names.items():
        sharding = table[tied[0]]
        if sharding.source not in drawn:
            drawn.clear()
            drawn[sharding.source] = _value(values, template, sharding.source, template.get_parameter(sharding.source))
        placed = place(parameter, sharding.local(drawn[sharding.source], tp.rank, tp.size))
        for name in tied:
            owner, local_name = _owner(model, name)
            owner._parameters[local_name] = placed
    constants = seeded_values(model.config, 0)
    for name, buffer in list(model.named_buffers()):
        owner, local_name = _owner(model, name)
        # A buffer outside checkpoints is a constant of the configuration.
        own = constants if local_name in owner._non_persistent_buffers_set else values
        owner._buffers[local_name] = _value(own, model, name, buffer).to(device, buffer.dtype)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, local_name = name.rpartition(".")
    return model.get_submodule(module), local_name


def _value(values: Values, model: nn.Module, name: str, target: Tensor) -> Tensor:
    value = values(name, *_owner(model, name))
    if value.shape != target.shape:
        raise ValueError(
            f"the value of {name} has shape {tuple(value.shape)}, the model needs {tuple(target.shape)}: "
            "give the configuration that the values were made with"
        )
    return value


def flat(tensor: Tensor) -> Tensor:
    """This rank's numbers of a tensor, as a 1-D view."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():  # without a view that autograd could follow, in whose place there is another
            tensor = tensor.to_local()
    return tensor.detach().view(-1)


def on_meta(module: Callable[..., nn.Module], *args: Any) -> Any:
    """Make a module without memory for its parameters."""
    with torch.device("meta"):
        return module(*args)
