"""The names of Mega's classes in transformers' tables of names.

Its Trainer, pipelines and server look a class up there by name to know what it computes: a Trainer with label smoothing
shifts labels only for the names of the causal table. Auto classes' `register` does not write them.
"""

from transformers.models.auto import modeling_auto

_CLASSES = {
    "MODEL": "MegaModel",
    "MODEL_FOR_PRETRAINING": "MegaForMaskedLM",
    "MODEL_FOR_CAUSAL_LM": "MegaForCausalLM",
    "MODEL_FOR_MASKED_LM": "MegaForMaskedLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": "MegaForSequenceClassification",
    "MODEL_FOR_MULTIPLE_CHOICE": "MegaForMultipleChoice",
    "MODEL_FOR_TOKEN_CLASSIFICATION": "MegaForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING": "MegaForQuestionAnswering",
}


def registered_name(kind: type) -> str:
    """Name of the class in the tables that a class is or derives from, else its own."""
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in _CLASSES.values()), kind.__name__)


def register_names(model_type: str) -> None:
    """Write the classes' names into the tables, under the configuration's `model_type`."""
    for table, name in _CLASSES.items():
        getattr(modeling_auto, f"{table}_MAPPING_NAMES")[model_type] = name
