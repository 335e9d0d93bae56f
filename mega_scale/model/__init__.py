"""The Hugging Face Mega family on one device.

Importing it registers the family with transformers' Auto classes. The modules of models are imported when a class is
asked for, here or through an Auto class: they cost seconds, which a command that refuses its arguments need not pay.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, RobertaTokenizer
from transformers.models.auto import modeling_auto

from mega_scale.model.configuration_mega import CLASSES, MegaConfig

if TYPE_CHECKING:
    from mega_scale.model.cache import MegaCache
    from mega_scale.model.heads import (
        MegaForMaskedLM,
        MegaForMultipleChoice,
        MegaForQuestionAnswering,
        MegaForSequenceClassification,
        MegaForTokenClassification,
    )
    from mega_scale.model.modeling_mega import MegaForCausalLM, MegaModel, MegaPreTrainedModel

_MODULES = dict.fromkeys(("MegaForCausalLM", "MegaModel", "MegaPreTrainedModel"), "modeling_mega")
_MODULES["MegaCache"] = "cache"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'heads')}"), name)


AutoConfig.register(MegaConfig.model_type, MegaConfig, exist_ok=True)
# The tokenizer of folders that name none, as in 4.37.2.
AutoTokenizer.register(MegaConfig, RobertaTokenizer, exist_ok=True)
for _table in CLASSES:
    # `register` of a model's Auto class takes the class itself. This is how transformers puts off the import of its own
    # models: by a name (configuration_mega writes it) and the module that has the class of that name.
    _mapping = getattr(modeling_auto, f"{_table}_MAPPING")
    _mapping._reverse_config_mapping[MegaConfig.__name__] = MegaConfig.model_type
    _mapping._modules[MegaConfig.model_type] = sys.modules[__name__]

__all__ = [
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
]
