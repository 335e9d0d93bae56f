"""Hugging Face folders: which tensors one holds, and reading them one at a time after checking that they fit."""

import json
import os
import pickle
from collections import UserDict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mega_scale.files import reason
from mega_scale.model import CONFIGURATIONS, MegaConfig, causal_lm_class
from mega_scale.model.configuration_mega import BaseConfig, warn_if_norm_differs

_POOLER = "pooler."  # a base model may carry one, which no language model has
_WEIGHT_FILES = [f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
_LISTED = 8
T = TypeVar("T")


class StateDictSpec(NamedTuple):
    """Names, shapes and ties of a model's state dict."""

    tensors: dict[str, Tensor]  # on meta, for every name, tied ones included, in the model's order
    ties: dict[str, str]  # for a name that shares its tensor with an earlier one, that earlier name
    buffers: frozenset[str]  # names that are buffers, not parameters
    fp32_modules: tuple[str, ...] = ()  # modules whose parameters no number format rounds

    def owner(self, name: str) -> str:
        """The earliest name of the tensor that is called `name`."""
        return self.ties.get(name, name)

    def complete(self, found: Mapping[str, T]) -> dict[str, T]:
        """Give tied names the value of the one that was found, in the model's order."""
        by_owner = {self.owner(name): value for name, value in found.items()}
        by_owner |= {name: value for name, value in found.items() if name not in self.ties}
        return {name: by_owner[self.owner(name)] for name in self.tensors if self.owner(name) in by_owner}

    def unequal_ties(self, found: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        """Names that share a tensor but were found with different values."""
        both = [(name, owner) for name, owner in self.ties.items() if name in found and owner in found]
        pairs = [(name, owner, found[name], found[owner]) for name, owner in both]
        return [(name, owner) for name, owner, a, b in pairs if a.dtype != b.dtype or not torch.equal(a, b)]

    def stored(self) -> list[str]:
        """Names that a folder holds: each tensor once."""
        return [name for name in self.tensors if name not in self.ties]

    def stored_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Dtype of `name` in a folder whose parameters are `dtype`: buffers and the moving average keep their own."""
        exact = any(module in name.split(".") for module in self.fp32_modules)
        keeps = exact or name in self.buffers or not self.tensors[name].is_floating_point()
        return self.tensors[name].dtype if keeps else dtype

    def require(self, shapes: Mapping[str, Collection[int]], problem: str, optional: Iterable[str] = ()) -> None:
        """Raise ValueError, with this `problem` and all that differ, where these are not its names and shapes.

        Of tied names one is enough; those in `optional` may be absent.
        """
        present = {self.owner(name) for name in shapes} | set(optional)
        wrong = {
            "missing": [name for name in self.stored() if name not in present],
            "unexpected": [name for name in shapes if name not in self.tensors],
            "mis-shaped": [
                f"{name} is {tuple(shape)}, expected {tuple(self.tensors[name].shape)}"
                for name, shape in shapes.items()
                if name in self.tensors and tuple(shape) != tuple(self.tensors[name].shape)
            ],
        }
        if lines := [f"{kind} ({len(names)}): {_some(names)}" for kind, names in wrong.items() if names]:
            raise ValueError(f"{problem}: {'; '.join(lines)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f", and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def state_dict_spec(config: BaseConfig, build: Callable[[Any], nn.Module] | None = None) -> StateDictSpec:
    """The state dict of the model that `build` makes (the family's causal one by default), without memory for it."""
    with torch.device("meta"):
        model = (build or causal_lm_class(config))(config)
    buffers = dict(model.named_buffers())
    # A state dict detaches its values: identity survives only with keep_vars.
    tensors = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    ties = {name: first[id(tensor)] for name, tensor in tensors.items() if first[id(tensor)] != name}
    fp32_modules: tuple[str, ...] = getattr(model, "fp32_modules", ())
    return StateDictSpec(dict(tensors), ties, frozenset(name for name in tensors if name in buffers), fp32_modules)


class LazyTensors(UserDict[str, Any]):
    """Tensors by name, each read when it is looked up: full ones on the CPU, floating ones in fp32."""

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.data[name]()
        # A copy: what lies in a mapped file must not change under the next reader.
        return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def open_folder(path: str | os.PathLike[str]) -> tuple[BaseConfig, LazyTensors]:
    """Open an export, or a Mega folder of transformers 4.37.2, as a causal language model's configuration and tensors.

    Tensors, of safetensors or `pytorch_model.bin` (without running its code), have the names of the model's state dict,
    tied ones included; those of a base model (without `mega.` or `megalodon.`) are taken as the model's inside.

    Raises ValueError where the folder cannot be read, or names or shapes differ from the model's; all are listed.
    """
    folder = Path(path)
    config = read_config(folder)
    spec = state_dict_spec(config)
    found = _stored_tensors(folder)
    problem = f"the weights in {folder} do not fit its config.json"
    prefix = f"{causal_lm_class(config).base_model_prefix}."
    if found and not any(name.startswith(prefix) for name in found):
        found = {prefix + name: tensor for name, tensor in found.items() if not name.startswith(_POOLER)}
        problem = f"{problem}, as it holds a base model, without a language-model head"
    spec.require({name: tensor.shape for name, tensor in found.items()}, problem)
    for name, owner in spec.unequal_ties(found):
        raise ValueError(
            f"{folder} ties {name} to {owner} but holds different values for them: "
            "set tie_word_embeddings to false in its config.json to keep both"
        )
    return config, LazyTensors({name: tensor.detach for name, tensor in spec.complete(found).items()})


def read_config(folder: Path) -> BaseConfig:
    """Read the configuration of such a folder. Raises ValueError where it has none, or that of another model."""
    path = folder / "config.json"
    if not path.is_file():
        what = "holds no config.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {what}: name an export or a Hugging Face folder of a Mega or Megalodon model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = values.get("model_type") if isinstance(values, dict) else None
    if found not in CONFIGURATIONS:
        raise ValueError(f"{path} has model_type={found!r}: expected {' or '.join(map(repr, CONFIGURATIONS))}")
    if found == MegaConfig.model_type:
        warn_if_norm_differs(values)
    return CONFIGURATIONS[found].from_pretrained(folder)


def _stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by its stored name, mapped into memory rather than read."""
    chosen = next((name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if chosen is None:
        raise ValueError(f"{folder} holds no weights: expected one of {', '.join(_WEIGHT_FILES)}")
    index = folder / chosen
    if index.suffix != ".json":
        return _open_file(index)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of weight files: {error!r}") from error
    files = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is not a file in {folder}")
        files[name] = _open_file(folder / name)
    if absent := [name for name, file in weight_map.items() if name not in files[file]]:
        raise ValueError(f"{index} names tensors that its files do not hold: {_some(absent)}")
    return {name: files[file][name] for name, file in weight_map.items()}


def _open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, without running code from it."""
    if path.suffix != ".safetensors":
        return named_tensors(path, read_pickle(path))
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error


def read_pickle(path: str | os.PathLike[str], *classes: type, keep: str = "the model's state_dict()") -> Any:
    """Map a file of `torch.save` into memory, without running its code: tensors, plain values, objects of `classes`.

    Raises ValueError where it holds anything else or cannot be read; `keep` is what a user who trusts it should save.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors and plain values ({reason(error)}): open it where you trust it, and "
            f"save {keep} with a torch of 1.6 or newer"
        ) from error


def named_tensors(path: str | os.PathLike[str], content: Any) -> dict[str, Tensor]:
    """The content of a file as tensors by name. Raises ValueError where it is anything else."""
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds something else than named tensors: save a model's state_dict()")
    return dict(content)
