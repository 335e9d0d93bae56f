"""Pretraining of Mega language models (arXiv 2209.10655) on clusters; importing it registers them with transformers."""

from typing import TYPE_CHECKING, Any

from mega_scale import model

if TYPE_CHECKING:
    from mega_scale.model import (
        MegaCache,
        MegaConfig,
        MegaForCausalLM,
        MegaForMaskedLM,
        MegaForMultipleChoice,
        MegaForQuestionAnswering,
        MegaForSequenceClassification,
        MegaForTokenClassification,
        MegaModel,
        MegaPreTrainedModel,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(model, name)


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
