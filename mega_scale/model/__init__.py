"""The Hugging Face Mega family on one device."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    RobertaTokenizer,
)

from mega_scale.model.cache import MegaCache
from mega_scale.model.classification import (
    MegaForMultipleChoice,
    MegaForSequenceClassification,
    MegaForTokenClassification,
)
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.masked_lm import MegaForMaskedLM
from mega_scale.model.modeling_mega import MegaForCausalLM, MegaModel, MegaPreTrainedModel
from mega_scale.model.question_answering import MegaForQuestionAnswering

AutoConfig.register(MegaConfig.model_type, MegaConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, MegaModel),
    (AutoModelForPreTraining, MegaForMaskedLM),
    (AutoModelForCausalLM, MegaForCausalLM),
    (AutoModelForMaskedLM, MegaForMaskedLM),
    (AutoModelForSequenceClassification, MegaForSequenceClassification),
    (AutoModelForMultipleChoice, MegaForMultipleChoice),
    (AutoModelForTokenClassification, MegaForTokenClassification),
    (AutoModelForQuestionAnswering, MegaForQuestionAnswering),
):
    _auto.register(MegaConfig, _model, exist_ok=True)
# The tokenizer of folders that name none, as in 4.37.2.
AutoTokenizer.register(MegaConfig, RobertaTokenizer, exist_ok=True)

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
