"""Hugging Face folders: which tensors one holds, and reading them one at a time after checking that they fit."""

import json
import os
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mega_scale import model as mega  # its models are imported when they are used: reading a configuration needs none
from mega_scale.model import MegaConfig
from mega_scale.model.configuration_mega import warn_if_norm_differs

BASE_PREFIX = "mega."
_POOLER = "pooler."  # a base model may carry one, which no language model has
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LISTED = 8
T = TypeVar("T")


class StateDictSpec(NamedTuple):
    """Names, shapes and ties of a model's state dict.

    Args:
        tensors: a meta tensor for every name of the state dict, tied names included, in the model's order.
        ties: for a name that shares its tensor with an earlier one, that earlier name.
        buffers: the names that are buffers, not parameters.
    """

    tensors: dict[str, Tensor]
    ties: dict[str, str]
    buffers: frozenset[str]

    def owner(self, name: str) -> str:
        """The earliest name of the tensor that is called `name`."""
        return self.ties.get(name, name)

    def complete(self, found: Mapping[str, T]) -> dict[str, T]:
        """Give tied names the value of the one that was found, in the model's order."""
        by_owner = {self.owner(name): value for name, value in found.items()}
        by_owner |= {name: value for name, value in found.items() if name not in self.ties}
        return {name: by_owner[self.owner(name)] for name in self.tensors if self.owner(name) in by_owner}

    def unequal_ties(self, found: Mapping[str, T], equal: Callable[[T, T], bool]) -> list[tuple[str, str]]:
        """Names that share a tensor but were found with different values."""
        both = [(name, owner) for name, owner in self.ties.items() if name in found and owner in found]
        return [(name, owner) for name, owner in both if not equal(found[name], found[owner])]

    def stored(self) -> list[str]:
        """Names that a folder holds: each tensor once."""
        return [name for name in self.tensors if name not in self.ties]

    def stored_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Dtype of `name` in a folder whose parameters are `dtype`: buffers and the moving average keep their own."""
        exact = any(module in name.split(".") for module in mega.MegaPreTrainedModel.fp32_modules)
        if exact or name in self.buffers or not self.tensors[name].is_floating_point():
            return self.tensors[name].dtype
        return dtype

    def differences(self, shapes: Mapping[str, Collection[int]], optional: Iterable[str] = ()) -> list[str]:
        """What is wrong with tensors of these names and shapes: a line each for missing, unexpected, mis-shaped ones.

        Args:
            shapes: of tied names one is enough.
            optional: names that may be absent.
        """
        present = {self.owner(name) for name in shapes} | set(optional)
        missing = [name for name in self.stored() if name not in present]
        unexpected = [name for name in shapes if name not in self.tensors]
        misshapen = [
            f"{name} is {tuple(shape)}, expected {tuple(self.tensors[name].shape)}"
            for name, shape in shapes.items()
            if name in self.tensors and tuple(shape) != tuple(self.tensors[name].shape)
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshapen}
        return [f"{kind} ({len(names)}): {_list(names)}" for kind, names in kinds.items() if names]


def state_dict_spec(config: MegaConfig, build: Callable[[MegaConfig], nn.Module] | None = None) -> StateDictSpec:
    """The state dict of the model that `build` makes (default: `MegaForCausalLM`), without memory for its weights.

    Raises:
        ValueError: no such model exists; the message names the fields.
    """
    with torch.device("meta"):
        model = (build or mega.MegaForCausalLM)(config)
    buffers = dict(model.named_buffers())
    # A state dict detaches its values: identity survives only with keep_vars.
    tensors = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            ties[name] = owner
    return StateDictSpec(dict(tensors), ties, frozenset(name for name in tensors if name in buffers))


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}, and {len(names) - _LISTED} more"


class _File(Protocol):
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor: ...


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._open = safe_open(path, framework="pt", device="cpu")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._open.get_slice(name).get_shape()) for name in self._open.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        return self._open.get_tensor(name)


class _Pickled:
    """A `torch.save` file, mapped into memory rather than read, and without running code from it."""

    def __init__(self, path: Path) -> None:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{path} holds something else than named tensors: save a model's state_dict()")
        self._tensors: dict[str, Tensor] = content

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class FolderTensors(Mapping[str, Tensor]):
    """Tensors of a folder under the names of `MegaForCausalLM`'s state dict, tied names included, read when asked for.

    Args:
        sources: for every name, the open file and the name inside it.
    """

    def __init__(self, sources: dict[str, tuple[_File, str]]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        file, stored_name = self._sources[name]
        tensor = file.read(stored_name)
        # A copy: what lies in the mapped file must not change under the next reader.
        return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources


def open_folder(path: str | os.PathLike[str], *, require_head: bool = True) -> tuple[MegaConfig, FolderTensors]:
    """Open an export, or a Mega folder of transformers 4.37.2, as a causal language model's configuration and tensors.

    Reads `model.safetensors`, a sharded index, or `pytorch_model.bin` (without executing code from it), and checks all
    names and shapes first. Names of a base model (without `mega.`) are taken as those of the model inside.

    Args:
        path: a folder with config.json and weights.
        require_head: whether a base model's folder, which has no language-model head, is refused; if not, the head's
            names are absent from the mapping.

    Returns:
        The configuration, and a mapping from state-dict name to full CPU tensor, floating ones in fp32.

    Raises:
        ValueError: the folder is not readable as such, or names or shapes differ from the model's; all are listed.
    """
    folder = Path(path)
    config = read_config(folder)
    spec = state_dict_spec(config)
    stored = _stored_tensors(folder)
    found = {name: (file, name) for name, (file, _) in stored.items()}
    optional: list[str] = []
    is_base_model = bool(stored) and not any(name.startswith(BASE_PREFIX) for name in stored)
    if is_base_model:
        found = {BASE_PREFIX + name: source for name, source in found.items() if not name.startswith(_POOLER)}
        if not require_head:
            optional = [name for name in spec.tensors if not name.startswith(BASE_PREFIX)]
    prefix_length = len(BASE_PREFIX) if is_base_model else 0
    wrong = spec.differences({name: stored[name[prefix_length:]][1] for name in found}, optional)
    if wrong:
        hint = "; it holds a base model, without a language-model head" if is_base_model else ""
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(wrong)}{hint}")
    for name, owner in spec.unequal_ties(found, _same_values):
        raise ValueError(
            f"{folder} ties {name} to {owner} but holds different values for them: "
            "set tie_word_embeddings to false in its config.json to keep both"
        )
    return config, FolderTensors(spec.complete(found))


def read_config(folder: Path) -> MegaConfig:
    """Read the configuration of an export, or of a Mega folder of transformers 4.37.2.

    Raises:
        ValueError: the folder has none, or that of another kind of model.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name an export or a Hugging Face folder of a Mega model")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: name an export or a Hugging Face folder of a Mega model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != MegaConfig.model_type:
        found = values.get("model_type") if isinstance(values, dict) else None
        raise ValueError(f"{path} has model_type={found!r}: expected {MegaConfig.model_type!r}")
    warn_if_norm_differs(values)
    return MegaConfig.from_pretrained(folder)


def _stored_tensors(folder: Path) -> dict[str, tuple[_File, tuple[int, ...]]]:
    """Every tensor of the folder by its stored name, with its open file and shape."""
    chosen = next((name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if chosen is None:
        raise ValueError(f"{folder} holds no weights: expected one of {', '.join(_WEIGHT_FILES)}")
    if not chosen.endswith(".index.json"):
        file = _open_file(folder / chosen)
        return {name: (file, shape) for name, shape in file.shapes().items()}
    return _indexed_tensors(folder, folder / chosen)


def _indexed_tensors(folder: Path, index: Path) -> dict[str, tuple[_File, tuple[int, ...]]]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of weight files: {error!r}") from error
    files: dict[str, _File] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or not (folder / file_name).is_file():
            raise ValueError(f"{index} names {file_name!r}, which is not a file in {folder}")
        files[file_name] = _open_file(folder / file_name)
        shapes[file_name] = files[file_name].shapes()
    absent = [name for name, file_name in weight_map.items() if name not in shapes[file_name]]
    if absent:
        raise ValueError(f"{index} names tensors that its files do not hold: {', '.join(absent[:8])}")
    return {name: (files[file_name], shapes[file_name][name]) for name, file_name in weight_map.items()}


def _open_file(path: Path) -> _File:
    try:
        return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _same_values(a: tuple[_File, str], b: tuple[_File, str]) -> bool:
    return torch.equal(a[0].read(a[1]), b[0].read(b[1]))
