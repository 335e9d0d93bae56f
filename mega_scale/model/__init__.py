"""The Hugging Face Mega and Megalodon families on one device, and what code that runs any of them asks for.

Importing it registers them with transformers' Auto classes. The modules of models are imported when a class is asked
for, here or through an Auto class: they cost seconds, which a command that refuses its arguments need not pay.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizer
from transformers.models.auto import modeling_auto

from mega_scale.model import configuration_mega, configuration_megalodon
from mega_scale.model.configuration_mega import BaseConfig, MegaConfig
from mega_scale.model.configuration_megalodon import MegalodonConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mega_scale.model.basic_layers import BasePreTrainedModel
    from mega_scale.model.cache import MegaCache
    from mega_scale.model.heads import (
        MegaForMaskedLM,
        MegaForMultipleChoice,
        MegaForQuestionAnswering,
        MegaForSequenceClassification,
        MegaForTokenClassification,
    )
    from mega_scale.model.modeling_mega import MegaForCausalLM, MegaModel, MegaPreTrainedModel
    from mega_scale.model.modeling_megalodon import MegalodonForCausalLM, MegalodonModel, MegalodonPreTrainedModel
    from mega_scale.model.static_cache import DecodingGraph, MegaStaticCache

_MODULES = {
    "MegaCache": "cache",
    **dict.fromkeys(("DecodingGraph", "MegaStaticCache"), "static_cache"),
    **dict.fromkeys(("MegaForCausalLM", "MegaModel", "MegaPreTrainedModel"), "modeling_mega"),
    **dict.fromkeys(("MegalodonForCausalLM", "MegalodonModel", "MegalodonPreTrainedModel"), "modeling_megalodon"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'heads')}"), name)


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
    module: "nn.Module", name: str, config: BaseConfig, generator: "torch.Generator | None" = None
) -> "Tensor | None":
    """Draw the initial value of one parameter or buffer, as the family's function of this name does."""
    return causal_lm_class(config).initial_tensor(module, name, config, generator)


_config: Any
for _config, _classes in (
    (MegaConfig, configuration_mega.CLASSES),
    (MegalodonConfig, configuration_megalodon.CLASSES),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _table in _classes:
        # `register` of a model's Auto class takes the class itself. This is how transformers puts off the import of its
        # own models: by a name (the configuration's module writes it) and the module that has the class of that name.
        _mapping = getattr(modeling_auto, f"{_table}_MAPPING")
        _mapping._reverse_config_mapping[_config.__name__] = _config.model_type
        _mapping._modules[_config.model_type] = sys.modules[__name__]
# The tokenizer of folders that name none: of Mega as in 4.37.2.
AutoTokenizer.register(MegaConfig, RobertaTokenizer, exist_ok=True)
AutoTokenizer.register(MegalodonConfig, PreTrainedTokenizerFast, exist_ok=True)

__all__ = [
    "DecodingGraph",
    "MegaCache",
    "MegaConfig",
    "MegaForCausalLM",
    "MegaForMaskedLM",
    "MegaForMultipleChoice",
    "MegaForQuestionAnswering",
    "MegaForSequenceClassification",
    "MegaForTokenClassification",
    "MegaModel",
    "MegaPreTrainedModel",
    "MegaStaticCache",
    "MegalodonConfig",
    "MegalodonForCausalLM",
    "MegalodonModel",
    "MegalodonPreTrainedModel",
]
