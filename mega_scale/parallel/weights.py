"""Reading the weights of a training checkpoint, of either engine, without a process group and one tensor at a time."""

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mega_scale.parallel.deepspeed_import import import_deepspeed
from mega_scale.parallel.pieces import Piece, assemble, pieces, whole_tensors

DEEPSPEED_TAG = "zero"
"""Folder of the DeepSpeed engine's files inside the engine's folder."""

_NAMES = "names.json"
_DCP_PREFIX = "model."


class Names(NamedTuple):
    """What the parameters in a checkpoint are, as `write_names` noted it.

    Args:
        table: part of which tensor of the state dict each parameter is; tied names are left out.
        ties: further names of the state dict, each with the name whose tensor it shares.
        tp: ranks over which parameters are cut.
    """

    table: dict[str, Piece]
    ties: dict[str, str]
    tp: int


class LazyWeights(Mapping[str, Tensor]):
    """Full CPU tensors by state-dict name, tied names and persistent buffers included, each read when asked for.

    Args:
        read: reads one stored parameter or buffer, whole.
        buffers: names of buffers that `read` knows beside the parameters.
        names: what the parameters are.
    """

    def __init__(self, read: Callable[[str], Tensor], buffers: Collection[str], names: Names) -> None:
        self._read = read
        self._stored = whole_tensors(names.table) | {name: [name] for name in buffers}
        self._stored |= {name: self._stored[owner] for name, owner in names.ties.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = assemble(self._stored[name], self._read)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def open_weights(folder: Path) -> LazyWeights:
    """Open the weights that an engine saved; memory is bounded by one tensor.

    Args:
        folder: a checkpoint folder, which holds the folder `engine`, or that folder itself.

    Returns:
        A mapping from state-dict name to full tensor, floating ones in fp32.

    Raises:
        ValueError: the folder holds no engine's files, or not all of them.
    """
    inner = folder / "engine"
    root = inner if inner.is_dir() else folder
    files = root / DEEPSPEED_TAG
    partitioned = (files / zero_file(0, 0, "model")).is_file()
    if not ((root / ".metadata").is_file() or partitioned or (files / model_file(0)).is_file()):
        raise ValueError(f"{folder} holds no checkpoint of an engine: name a folder like checkpoints/step-00000100")
    names = _read_names(root)
    if (root / ".metadata").is_file():
        return _open_dcp(root, names)
    return _open_partitioned(files, names) if partitioned else _open_replicated(files, names)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Collect what a checkpoint of the model has to hold.

    Args:
        module: any model.

    Returns:
        Its parameters, tied ones once, and its persistent buffers, by name.
    """
    found: dict[str, Tensor] = dict(module.named_parameters())
    for name, owner in module.named_modules():
        for local_name, buffer in owner.named_buffers(recurse=False):
            if local_name not in owner._non_persistent_buffers_set:
                found[f"{name}.{local_name}" if name else local_name] = buffer
    return found


def write_names(module: nn.Module, folder: Path, tp: int) -> None:
    """Note what the parameters of a spread model are, for those who read the folder without making the model.

    Args:
        module: the model.
        folder: the engine's folder.
        tp: ranks over which parameters are cut.
    """
    table = pieces(module)
    first: dict[nn.Parameter, str] = {}
    ties = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            ties[table.pop(name).source] = table[first[parameter]].source
    (folder / _NAMES).write_text(json.dumps(Names(table, ties, tp)._asdict()))


def _read_names(folder: Path) -> Names:
    try:
        found = json.loads((folder / _NAMES).read_text())
        table = {
            name: Piece(source, None if rows is None else tuple(rows), dim)
            for name, (source, rows, dim) in found["table"].items()
        }
        return Names(table, found["ties"], found["tp"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / _NAMES} cannot be read ({error!r}): the checkpoint is incomplete") from None


class _Reader(dcp.FileSystemReader):
    """Keeps the metadata of a folder, which a plain reader reads again for every tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def _open_dcp(folder: Path, names: Names) -> LazyWeights:
    reader = _Reader(folder)
    entries = {
        name.removeprefix(_DCP_PREFIX): entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(_DCP_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }

    def read(name: str) -> Tensor:
        tensor = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
        with warnings.catch_warnings():
            # It warns of a missing process group although it is told to do without.
            warnings.simplefilter("ignore", UserWarning)
            dcp.load({_DCP_PREFIX + name: tensor}, storage_reader=reader, no_dist=True)
        return tensor

    return LazyWeights(read, entries.keys() - names.table.keys(), names)


def _open_replicated(folder: Path, names: Names) -> LazyWeights:
    """ZeRO 0 to 2: one file for each rank of tp holds all of its weights, in fp32, as the engine never rounds them."""
    modules = [_mapped(folder / model_file(rank))["module"] for rank in range(names.tp)]

    def read(name: str) -> Tensor:
        parts = [module[name] for module in modules]
        return (names.table[name].join(parts) if name in names.table else parts[0]).clone()

    buffers = [name for name in modules[0] if name not in names.table and name not in names.ties]
    return LazyWeights(read, buffers, names)


class _Partitions(NamedTuple):
    """What ZeRO 3 stored for one rank of tp: parameters padded and cut into one equal part per rank, in flat groups."""

    groups: list[list[Tensor]]
    place: dict[str, tuple[int, int, int, torch.Size]]

    @classmethod
    def open(cls, folder: Path, tp_rank: int, model: dict[str, Any]) -> "_Partitions":
        groups = _flat_groups(folder, tp_rank)
        place: dict[str, tuple[int, int, int, torch.Size]] = {}
        for number, shapes in enumerate(model["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                part = -(-shape.numel() // len(groups))
                place[name] = (number, offset, part, shape)
                offset += part
            if offset != groups[0][number].numel():
                raise ValueError(
                    f"{folder} is incomplete: group {number} of its parameters holds {groups[0][number].numel()} "
                    f"numbers a rank, {offset} were expected of {len(groups)} ranks"
                )
        return cls(groups, place)

    def read(self, name: str) -> Tensor:
        number, offset, part, shape = self.place[name]
        parts = [rank_groups[number].detach()[offset : offset + part] for rank_groups in self.groups]
        return torch.cat(parts)[: shape.numel()].view(shape)


def _open_partitioned(folder: Path, names: Names) -> LazyWeights:
    models = [_mapped(folder / zero_file(0, rank, "model")) for rank in range(names.tp)]
    buffers = {name: models[0]["module"][name] for name in models[0]["buffer_names"]}
    parts = [_Partitions.open(folder, rank, model) for rank, model in enumerate(models)]

    def read(name: str) -> Tensor:
        if name in buffers:
            return buffers[name].clone()
        return names.table[name].join([part.read(name) for part in parts])

    return LazyWeights(read, buffers, names)


def _flat_groups(folder: Path, tp_rank: int) -> list[list[Tensor]]:
    """The fp32 groups of every rank that holds parts of one rank of tp, mapped rather than read."""
    import_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler  # noqa: PLC0415
    from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: PLC0415

    pattern = re.compile(zero_file(r"(\d+)", tp_rank, "optim"))
    found = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    groups = []
    # Nothing but tensors, plain values and these two classes is unpickled, so a file cannot bring code of its own.
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
        for rank in range(len(found)):
            if rank not in found:
                raise ValueError(f"{folder} is incomplete: {zero_file(rank, tp_rank, 'optim')} is missing")
            state = _mapped(found[rank])["optimizer_state_dict"]
            if state["partition_count"] != len(found):
                raise ValueError(
                    f"{folder} is incomplete: it holds the parts of {len(found)} of {state['partition_count']} ranks"
                )
            groups.append(state["fp32_flat_groups"])
    return groups


def _mapped(path: Path) -> dict[str, Any]:
    """Open a file of torch.save without reading its tensors, and without running code that it may hold."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def model_file(tp_rank: int) -> str:
    """Name of a file of ZeRO 0 to 2: the weights of a rank of tp."""
    return f"mp_rank_{tp_rank:02d}_model_states.pt"


def zero_file(rank: int | str, tp_rank: int, kind: str) -> str:
    """Name of a file of ZeRO: of a partition and a rank of tp, kind model or optim."""
    return f"zero_pp_rank_{rank}_mp_rank_{tp_rank:02d}_{kind}_states.pt"
