"""Classification of sequences, of choices, and of tokens.

Legend: B batch, M choices, L length, D channels, K classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MultipleChoiceModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import can_return_tuple

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.heads import MegaHeadModel, head_dropout, label_count, sequence_token
from mega_scale.model.losses import cross_entropy, sequence_loss
from mega_scale.model.modeling_mega import MegaModel


class MegaClassificationHead(nn.Module):
    """Dropout, dense layer, tanh, dropout, and a linear layer to the classes."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(head_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, label_count(config))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D) to (B, K)."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


class MegaForSequenceClassification(MegaHeadModel):
    """Mega with one prediction a sequence: a class, several labels, or values.

    The head reads the first valid token, or a decoder's last valid one.

    Args:
        config: `num_labels` and `problem_type` say what is predicted.
    """

    one_answer_a_row = True

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels = label_count(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.classifier = MegaClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits of every sequence, and their loss when labels are given; other arguments as in `MegaModel`.

        Args:
            labels: (B,) int64 classes; (B, K) zeros and ones for several labels; (B,) or (B, K) values of a
                regression. Without `config.problem_type`, one label is a regression, and else integers are classes.
            num_items_in_batch: what the sum of losses is divided by; default: the number of labels here.

        Returns:
            loss, logits (B, K), hidden_states, attentions.

        Raises:
            ValueError: labels whose shape does not fit the problem.
        """
        hidden, outputs = self.encode(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.classifier(sequence_token(hidden, attention_mask, self.config))
        loss = None
        if labels is not None:
            # The configuration stays as it is: what one batch suggests must not decide for the next.
            loss = sequence_loss(logits, labels, self.config.problem_type, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MegaForMultipleChoice(MegaHeadModel):
    """Mega with one score a choice: pooler over the token that stands for the sequence, dropout, linear layer.

    Args:
        config: of the backbone.
    """

    one_answer_a_row = True

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Scores of every choice, and their cross-entropy when labels are given.

        Args:
            input_ids: (B, M, L) int64; or give `inputs_embeds`.
            token_type_ids: (B, M, L) int64.
            attention_mask: (B, M, L), 1 or true for valid positions.
            labels: (B,) int64, the number of the right choice.
            inputs_embeds: (B, M, L, D), in place of word embeddings.
            output_attentions: as in `MegaModel`; the choices of a batch come one after the other, B * M rows.
            output_hidden_states: likewise.
            num_items_in_batch: what the sum of losses is divided by; default: B.

        Returns:
            loss, logits (B, M), hidden_states, attentions.

        Raises:
            ValueError: inputs without a dimension of choices.
        """
        choices = _choices(input_ids, inputs_embeds)
        mask = _rows(attention_mask)
        hidden, outputs = self.encode(
            kwargs | {"position_ids": _rows(kwargs.get("position_ids"))},
            input_ids=_rows(input_ids),
            attention_mask=mask,
            token_type_ids=_rows(token_type_ids),
            inputs_embeds=_rows(inputs_embeds),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        token = sequence_token(hidden, mask, self.config)
        assert self.mega.pooler is not None
        pooled = self.mega.pooler(token[:, None])
        logits = self.classifier(self.dropout(pooled)).view(choices)
        return MultipleChoiceModelOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MegaForTokenClassification(MegaHeadModel):
    """Mega with one prediction a token: dropout and a linear layer.

    Args:
        config: `num_labels` is the number of classes.
    """

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels = label_count(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, label_count(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits of every token, and their cross-entropy when labels are given; other arguments as in `MegaModel`.

        Args:
            labels: (B, L) int64 classes; -100 is ignored.
            num_items_in_batch: what the sum of token losses is divided by; default: the number of labels here.

        Returns:
            loss, logits (B, L, K), hidden_states, attentions.
        """
        hidden, outputs = self.encode(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.classifier(self.dropout(hidden))
        return TokenClassifierOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _choices(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """B and M of the inputs of multiple choice."""
    name, given, dimensions = "input_ids", input_ids, 3
    if given is None:
        name, given, dimensions = "inputs_embeds", inputs_embeds, 4
    if given is None:
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if given.dim() != dimensions:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}: expected {dimensions} dimensions, (batch, choices, ...); "
            "add one of size 1 for a batch of one"
        )
    return given.shape[0], given.shape[1]


def _rows(tensor: Tensor | None) -> Tensor | None:
    """(B, M, ...) to (B * M, ...)."""
    return None if tensor is None else tensor.flatten(0, 1)
