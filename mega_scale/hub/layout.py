"""Which tensors a model's folder holds, asked of the model itself on the meta device."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mega_scale.model import MegaConfig, MegaForCausalLM

BASE_PREFIX = "mega."
_LISTED = 8


class Layout(NamedTuple):
    """Names, shapes and ties of a model's state dict.

    Args:
        tensors: a meta tensor for every name of the state dict, tied names included, in the model's order.
        ties: for a name that shares its tensor with an earlier one, that earlier name.
        buffers: the names that are buffers, not parameters.
    """

    tensors: dict[str, Tensor]
    ties: dict[str, str]
    buffers: frozenset[str]

    def stored(self) -> list[str]:
        """Names that a folder holds: each tensor once."""
        return [name for name in self.tensors if name not in self.ties]

    def stored_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Dtype of `name` in a folder whose parameters are `dtype`: buffers and the moving average keep their own."""
        exact = any(module in name.split(".") for module in MegaForCausalLM.fp32_modules)
        if exact or name in self.buffers or not self.tensors[name].is_floating_point():
            return self.tensors[name].dtype
        return dtype

    def differences(self, shapes: Mapping[str, Collection[int]], optional: Iterable[str] = ()) -> list[str]:
        """What is wrong with a set of tensors: missing, unexpected and mis-shaped names, one line for each kind.

        Args:
            shapes: name to shape, of the tensors at hand; of tied names one is enough.
            optional: names that may be absent.

        Returns:
            Lines of text; none when the tensors fit.
        """
        present = {self.ties.get(name, name) for name in shapes} | set(optional)
        missing = [name for name in self.stored() if name not in present]
        unexpected = [name for name in shapes if name not in self.tensors]
        misshapen = [
            f"{name} is {tuple(shape)}, expected {tuple(self.tensors[name].shape)}"
            for name, shape in shapes.items()
            if name in self.tensors and tuple(shape) != tuple(self.tensors[name].shape)
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshapen}
        return [f"{kind} ({len(names)}): {_list(names)}" for kind, names in kinds.items() if names]


def layout_of(config: MegaConfig, build: Callable[[MegaConfig], nn.Module] = MegaForCausalLM) -> Layout:
    """Layout of a model, built without memory for its weights.

    Args:
        config: the model's configuration.
        build: makes the model from it.

    Returns:
        The layout.

    Raises:
        ValueError: no such model exists; the message names the fields.
    """
    with torch.device("meta"):
        model = build(config)
    buffers = dict(model.named_buffers())
    # A state dict detaches its values: identity survives only with keep_vars.
    tensors = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            ties[name] = owner
    return Layout(dict(tensors), ties, frozenset(name for name in tensors if name in buffers))


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}, and {len(names) - _LISTED} more"
