"""All seven Mega classes at one small size, with inputs and labels that fit each."""

import torch
from builders import make_ids, make_model

ENCODER = {"is_decoder": False, "bidirectional": True}
# Class, what its model needs besides the shared sizes, and its Auto class.
CLASSES = {
    "MegaModel": (ENCODER, "AutoModel"),
    "MegaForCausalLM": ({}, "AutoModelForCausalLM"),
    "MegaForMaskedLM": (ENCODER, "AutoModelForMaskedLM"),
    "MegaForSequenceClassification": ({**ENCODER, "num_labels": 3}, "AutoModelForSequenceClassification"),
    "MegaForMultipleChoice": (ENCODER, "AutoModelForMultipleChoice"),
    "MegaForTokenClassification": ({**ENCODER, "num_labels": 4}, "AutoModelForTokenClassification"),
    "MegaForQuestionAnswering": (ENCODER, "AutoModelForQuestionAnswering"),
}
HEADS = [kind for kind in CLASSES if kind != "MegaModel"]
LANGUAGE_MODELS = ["MegaForCausalLM", "MegaForMaskedLM"]
LENGTH = 13  # chunks of 8


def make(kind, **changes):
    """A model of the class in eval mode, without dropout."""
    off = {"dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    off["nffn_activation_dropout_prob"] = 0.0
    return make_model(kind=kind, **{**off, **CLASSES[kind][0], **changes})


def inputs_of(kind, batch=2, seed=0):
    """Token ids and a mask, with padding at the end of the first row; two choices a row for multiple choice."""
    rows = batch * 2 if kind == "MegaForMultipleChoice" else batch
    ids = make_ids(rows, LENGTH, seed=seed)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    if kind == "MegaForMultipleChoice":
        ids, mask = ids.view(batch, 2, LENGTH), mask.view(batch, 2, LENGTH)
    return {"input_ids": ids, "attention_mask": mask}


def labels_of(kind, inputs):
    """Labels that fit the class; some tokens do not count where tokens have labels."""
    ids = inputs["input_ids"]
    batch = ids.shape[0]
    if kind == "MegaForQuestionAnswering":
        return {"start_positions": torch.arange(batch) + 1, "end_positions": torch.arange(batch) + 4}
    if kind == "MegaForSequenceClassification":
        return {"labels": torch.arange(batch) % 3}
    if kind == "MegaForMultipleChoice":
        return {"labels": torch.arange(batch) % 2}
    labels = ids % 4 if kind == "MegaForTokenClassification" else ids.clone()
    labels[0, 5:] = -100
    return {"labels": labels}


def answers(outputs):
    """What a model is asked for: logits, both of question answering, or the last hidden state."""
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state
