"""The families of models, by `model_type`: what code that runs any of them asks for.

Models' modules are imported when one of their classes is asked for: a configuration alone costs no model.
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mega_scale.model.configuration import BaseConfig
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.configuration_megalodon import MegalodonConfig

if TYPE_CHECKING:
    from mega_scale.model.pretrained import BasePreTrainedModel

CONFIGURATIONS: dict[str, type[BaseConfig]] = {kind.model_type: kind for kind in (MegaConfig, MegalodonConfig)}


def configuration_class(model_type: Any) -> type[BaseConfig]:
    """The configuration of a family. Raises ValueError where there is none of this name."""
    if model_type not in CONFIGURATIONS:
        raise ValueError(f"model_type={model_type!r} is unknown: expected one of {', '.join(CONFIGURATIONS)}")
    return CONFIGURATIONS[model_type]


def causal_lm_class(config: BaseConfig) -> "type[BasePreTrainedModel]":
    """`MegaForCausalLM` or `MegalodonForCausalLM`."""
    module = importlib.import_module(f"mega_scale.model.modeling_{config.model_type}")
    kind: type[BasePreTrainedModel] = getattr(module, f"{config.model_type.capitalize()}ForCausalLM")
    return kind


def initial_tensor(
    module: nn.Module, name: str, config: BaseConfig, generator: torch.Generator | None = None
) -> Tensor | None:
    """Draw the initial value of one parameter or buffer, as the family's function of this name does."""
    return causal_lm_class(config).initial_tensor(module, name, config, generator)
