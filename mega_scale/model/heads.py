"""What the heads share: a backbone run without a cache, and the token that stands for a sequence.

Legend: B batch, L length, D channels.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.modeling_mega import MegaModel, MegaPreTrainedModel


class MegaHeadModel(MegaPreTrainedModel):
    """A backbone under a head that needs no cache."""

    mega: MegaModel
    one_answer_a_row = False

    def encode(
        self, extras: dict[str, Any], **inputs: Any
    ) -> tuple[Tensor, BaseModelOutputWithPoolingAndCrossAttentions]:
        """Run the backbone.

        Args:
            extras: keyword arguments that the head's forward does not know.
            inputs: those that it does.

        Returns:
            The last hidden state (B, L, D), and all outputs.
        """
        # A head reads every position at once, so a cache would only hold memory.
        fixed = {"use_cache": False, "return_dict": True, "one_answer_a_row": self.one_answer_a_row}
        outputs = self.mega(**{**extras, **inputs, **fixed})
        return outputs.last_hidden_state, outputs


def sequence_token(hidden: Tensor, attention_mask: Tensor | None, config: MegaConfig) -> Tensor:
    """Take the vector that stands for a whole sequence: the first valid token's, or a decoder's last valid token's.

    A decoder's first token has seen nothing but itself, and a padded row's first token may be padding.

    Args:
        hidden: (B, L, D).
        attention_mask: (B, L), 1 or true for valid positions; none means that all are valid.
        config: tells whether the model is a decoder.

    Returns:
        (B, D); of a row without any valid token, the outermost position.
    """
    last = config.is_decoder
    if attention_mask is None:
        return hidden[:, -1 if last else 0]
    valid = attention_mask.to(hidden.device).bool().int()
    index = hidden.shape[1] - 1 - valid.flip(1).argmax(1) if last else valid.argmax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]


def head_dropout(config: MegaConfig) -> float:
    """Dropout probability of a classification head."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def label_count(config: MegaConfig) -> int:
    """Number of classes, labels, or values that a head predicts."""
    assert config.num_labels is not None, "configurations default to two labels"
    return config.num_labels
