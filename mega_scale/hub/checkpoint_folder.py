"""Reads the weights of a Hugging Face folder one tensor at a time, after checking that they fit the model."""

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mega_scale.hub.layout import BASE_PREFIX, Layout, layout_of
from mega_scale.model import MegaConfig
from mega_scale.model.configuration_mega import warn_if_norm_differs

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# A base model may carry a pooler, which no language model has.
_POOLER = "pooler."


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
    layout = layout_of(config)
    stored = _stored_tensors(folder)
    found = {name: (file, name) for name, (file, _) in stored.items()}
    optional: list[str] = []
    is_base_model = bool(stored) and not any(name.startswith(BASE_PREFIX) for name in stored)
    if is_base_model:
        found = {BASE_PREFIX + name: source for name, source in found.items() if not name.startswith(_POOLER)}
        if not require_head:
            optional = [name for name in layout.tensors if not name.startswith(BASE_PREFIX)]
    prefix_length = len(BASE_PREFIX) if is_base_model else 0
    wrong = layout.differences({name: stored[name[prefix_length:]][1] for name in found}, optional)
    if wrong:
        hint = "; it holds a base model, without a language-model head" if is_base_model else ""
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(wrong)}{hint}")
    _check_ties(folder, layout, found)
    return config, FolderTensors(_with_tied_names(layout, found))


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


def _check_ties(folder: Path, layout: Layout, found: dict[str, tuple[_File, str]]) -> None:
    for name, owner in layout.ties.items():
        if name in found and owner in found:
            (file, stored_name), (owner_file, owner_name) = found[name], found[owner]
            if not torch.equal(file.read(stored_name), owner_file.read(owner_name)):
                raise ValueError(
                    f"{folder} ties {name} to {owner} but holds different values for them: "
                    "set tie_word_embeddings to false in its config.json to keep both"
                )


def _with_tied_names(layout: Layout, found: dict[str, tuple[_File, str]]) -> dict[str, tuple[_File, str]]:
    source_of = {layout.ties.get(name, name): source for name, source in found.items()}
    owners = {name: layout.ties.get(name, name) for name in layout.tensors}
    return {name: source_of[owner] for name, owner in owners.items() if owner in source_of}
