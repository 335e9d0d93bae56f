"""The heads over the backbone, but for the causal language model.

Their `forward` takes what `MegaModel.forward` takes, labels, and `num_items_in_batch` as `mean` has it.

Legend: B batch, M choices, L length, D channels, V vocabulary, K classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple, logging

from mega_scale.model.basic_layers import INTEGERS, cross_entropy, mean
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.modeling_mega import MegaModel, MegaPreTrainedModel, valid_token

logger = logging.get_logger(__name__)

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class MegaHeadModel(MegaPreTrainedModel):
    """A backbone under a head that needs no cache."""

    mega: MegaModel
    one_answer_a_row = False

    def encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """Run the backbone; returns the last hidden state (B, L, D), and what every head's outputs have of it."""
        # A head reads every position at once, so a cache would only hold memory.
        fixed = {"use_cache": False, "return_dict": True, "one_answer_a_row": self.one_answer_a_row}
        outputs = self.mega(*args, **{**kwargs, **fixed})
        return outputs.last_hidden_state, {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}


def _classifier_dropout(config: MegaConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class MegaForMaskedLM(MegaHeadModel):
    """Mega with a head that predicts the tokens behind masks: optional dense layer with tanh, then a linear layer."""

    _tied_weights_keys = {"mlm_head.weight": "mega.embedding_layer.word_embeddings.weight"}

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        if config.is_decoder:
            logger.warning("MegaForMaskedLM with is_decoder=True predicts a token from its left side only")
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if config.add_lm_hidden_dense_layer else None
        self.mlm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.mlm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.mlm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits (B, L, V), and their cross-entropy with `labels` (B, L) int64, of which -100 is ignored."""
        inputs = input_ids, attention_mask, token_type_ids, inputs_embeds, encoder_hidden_states, encoder_attention_mask
        hidden, outputs = self.encode(*inputs, **kwargs)
        if self.dense is not None:
            hidden = torch.tanh(self.dense(hidden))
        logits = self.mlm_head(hidden)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits, **outputs)


class MegaClassificationHead(nn.Module):
    """Dropout, dense layer, tanh, dropout, and a linear layer to the classes."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = _classifier_dropout(config)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels or 0)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D) to (B, K)."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


def sequence_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None = None, num_items: Tensor | int | None = None
) -> Tensor:
    """Loss of logits (B, K), one prediction a sequence, by labels: (B,) classes, (B, K) zeros and ones for several, or
    values of a regression, (B, K) or if K = 1 (B,): cross-entropy, binary cross-entropy, or mean square.

    By default the problem is a regression if K = 1, else one label if the labels are integers, else several.
    """
    if problem_type is None:
        several = "single_label_classification" if labels.dtype in INTEGERS else "multi_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else several
    if problem_type not in PROBLEMS:
        raise ValueError(f"problem_type={problem_type!r} is unknown: choose one of {', '.join(PROBLEMS)}, or none")
    labels = labels.to(logits.device)
    single = problem_type == "single_label_classification"
    expected = logits[..., 0] if single else logits
    if labels.numel() != expected.numel():
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: {problem_type} of logits {tuple(logits.shape)} needs "
            f"{tuple(expected.shape)}; set problem_type in the configuration if you meant another problem"
        )
    if single:
        return cross_entropy(logits, labels, num_items)
    values, targets = logits.float(), labels.reshape(logits.shape).float()
    if problem_type == "regression":
        total = F.mse_loss(values, targets, reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(values, targets, reduction="sum")
    return mean(total, labels.numel(), num_items)


class MegaForSequenceClassification(MegaHeadModel):
    """Mega with one prediction a sequence: a class, several labels, or values, by `num_labels` and `problem_type`."""

    one_answer_a_row = True

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
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
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, K), and their loss when labels are given, as `sequence_loss` takes them."""
        hidden, outputs = self.encode(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        # A decoder's first token has seen nothing but itself.
        logits = self.classifier(valid_token(hidden, attention_mask, last=self.config.is_decoder))
        problem = self.config.problem_type  # stays as it is: what one batch suggests must not decide for the next
        loss = None if labels is None else sequence_loss(logits, labels, problem, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits, **outputs)


class MegaForMultipleChoice(MegaHeadModel):
    """Mega with one score a choice: pooler over the token that stands for the sequence, dropout, linear layer."""

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
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Scores of every choice (B, M), and their cross-entropy with `labels` (B,) int64, the numbers of right ones.

        Inputs are (B, M, L), or embeddings (B, M, L, D); hidden states and attentions, if asked for, are those of B * M
        rows, the choices of a batch one after the other.
        """
        name, given, dimensions = "input_ids", input_ids, 3
        if input_ids is None:
            name, given, dimensions = "inputs_embeds", inputs_embeds, 4
        if given is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if given.dim() != dimensions:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}: expected {dimensions} dimensions, (batch, choices, ...); "
                "add one of size 1 for a batch of one"
            )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs |= {"inputs_embeds": inputs_embeds, "position_ids": kwargs.get("position_ids")}
        rows = {key: None if value is None else value.flatten(0, 1) for key, value in inputs.items()}
        hidden, outputs = self.encode(**kwargs | rows)
        token = valid_token(hidden, rows["attention_mask"], last=self.config.is_decoder)
        assert self.mega.pooler is not None
        logits = self.classifier(self.dropout(self.mega.pooler(token[:, None]))).view(given.shape[:2])
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MultipleChoiceModelOutput(loss=loss, logits=logits, **outputs)


class MegaForTokenClassification(MegaHeadModel):
    """Mega with one prediction a token, of `num_labels` classes: dropout and a linear layer."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits (B, L, K), and their cross-entropy with `labels` (B, L) int64, of which -100 is ignored."""
        hidden, outputs = self.encode(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(hidden))
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits, **outputs)


class MegaForQuestionAnswering(MegaHeadModel):
    """Mega with two scores a token: that the answer begins there, and that it ends there."""

    one_answer_a_row = True

    def __init__(self, config: MegaConfig) -> None:
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels={config.num_labels}: question answering has two scores a token, start and end; "
                "set num_labels=2"
            )
        super().__init__(config)
        self.num_labels = 2
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Both scores of every position, (B, L) each, and the mean of both cross-entropies when positions are given.

        Positions are (B,) or (B, 1) int64, of the first and last tokens of the answers; those outside the sequence are
        ignored, and the loss is zero if all are.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give both start_positions and end_positions, or neither")
        hidden, outputs = self.encode(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(hidden).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = []
            for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
                labels = positions.reshape(-1).to(logits.device)
                outside = (labels < 0) | (labels >= logits.shape[1])
                losses.append(cross_entropy(logits, labels.masked_fill(outside, -100), num_items_in_batch))
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start_logits, end_logits=end_logits, **outputs)
