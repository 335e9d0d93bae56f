"""Reading the weights of a training checkpoint, of either engine, without a process group and one tensor at a time."""

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mega_scale.parallel.deepspeed_import import import_deepspeed

DEEPSPEED_TAG = "zero"
"""Folder of the DeepSpeed engine's files inside the engine's folder."""

_REPLICATED = "mp_rank_00_model_states.pt"
_TIES = "ties.json"
_DCP_PREFIX = "model."


class LazyWeights(Mapping[str, Tensor]):
    """Full CPU tensors by state-dict name, tied names and persistent buffers included, each read when asked for.

    Args:
        read: reads one stored tensor.
        stored: names that `read` knows.
        ties: further names, each with the stored name whose tensor it shares.
    """

    def __init__(self, read: Callable[[str], Tensor], stored: Collection[str], ties: Mapping[str, str]) -> None:
        self._read = read
        self._source = {name: name for name in stored} | dict(ties)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._read(self._source[name])
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


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
    if (root / ".metadata").is_file():
        return _open_dcp(root)
    if (root / DEEPSPEED_TAG / _REPLICATED).is_file():
        return _open_replicated(root / DEEPSPEED_TAG)
    if (root / DEEPSPEED_TAG / _zero_file(0, "model")).is_file():
        return _open_partitioned(root / DEEPSPEED_TAG)
    raise ValueError(f"{folder} holds no checkpoint of an engine: name a folder like checkpoints/step-00000100")


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


def write_ties(module: nn.Module, folder: Path) -> None:
    """Note which names share a parameter, as DCP stores each parameter under its first name only.

    Args:
        module: the model.
        folder: the engine's folder.
    """
    first: dict[nn.Parameter, str] = {}
    ties = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            ties[name] = first[parameter]
    (folder / _TIES).write_text(json.dumps(ties))


class _Reader(dcp.FileSystemReader):
    """Keeps the metadata of a folder, which a plain reader reads again for every tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def _open_dcp(folder: Path) -> LazyWeights:
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

    return LazyWeights(read, entries, json.loads((folder / _TIES).read_text()))


def _open_replicated(folder: Path) -> LazyWeights:
    """ZeRO 0 to 2: the weights are whole in one file, in fp32, as the engine never rounds them."""
    module = _mapped(folder / _REPLICATED)["module"]
    return LazyWeights(lambda name: module[name].clone(), module, {})


def _open_partitioned(folder: Path) -> LazyWeights:
    """ZeRO 3: each parameter is padded and cut into one equal part per rank, part after part in flat groups."""
    model = _mapped(folder / _zero_file(0, "model"))
    buffers = {name: model["module"][name] for name in model["buffer_names"]}
    groups = _flat_groups(folder)
    ranks = len(groups)
    place: dict[str, tuple[int, int, int, torch.Size]] = {}
    for number, shapes in enumerate(model["param_shapes"]):
        offset = 0
        for name, shape in shapes.items():
            part = -(-shape.numel() // ranks)
            place[name] = (number, offset, part, shape)
            offset += part
        if offset != groups[0][number].numel():
            raise ValueError(
                f"{folder} is incomplete: group {number} of its parameters holds {groups[0][number].numel()} "
                f"numbers a rank, {offset} were expected of {ranks} ranks"
            )

    def read(name: str) -> Tensor:
        if name in buffers:
            return buffers[name].clone()
        number, offset, part, shape = place[name]
        parts = [rank_groups[number].detach()[offset : offset + part] for rank_groups in groups]
        return torch.cat(parts)[: shape.numel()].view(shape)

    return LazyWeights(read, [*place, *buffers], model["shared_params"])


def _flat_groups(folder: Path) -> list[list[Tensor]]:
    """The fp32 groups of every rank, mapped rather than read."""
    import_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler  # noqa: PLC0415
    from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: PLC0415

    pattern = re.compile(_zero_file(r"(\d+)", "optim"))
    found = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    groups = []
    # Nothing but tensors, plain values and these two classes is unpickled, so a file cannot bring code of its own.
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
        for rank in range(len(found)):
            if rank not in found:
                raise ValueError(f"{folder} is incomplete: {_zero_file(rank, 'optim')} is missing")
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


def _zero_file(rank: int | str, kind: str) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
