"""Extractive question answering.

Legend: B batch, L length.
"""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput
from transformers.utils import can_return_tuple

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.heads import MegaHeadModel
from mega_scale.model.losses import cross_entropy
from mega_scale.model.modeling_mega import MegaModel


class MegaForQuestionAnswering(MegaHeadModel):
    """Mega with two scores a token: that the answer begins there, and that it ends there.

    Args:
        config: of the backbone; `num_labels` must be 2.

    Raises:
        ValueError: `num_labels` is not 2.
    """

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Scores of every position, and their loss when positions are given; other arguments as in `MegaModel`.

        Args:
            start_positions: (B,) or (B, 1) int64, where the answers begin, in tokens; positions outside the sequence
                are ignored.
            end_positions: likewise, the last token of the answers.
            num_items_in_batch: what both sums of losses are divided by; default: the number of positions inside.

        Returns:
            loss (the mean of both cross-entropies, zero if all positions lie outside), start_logits (B, L),
            end_logits (B, L), hidden_states, attentions.

        Raises:
            ValueError: only one of the positions is given.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give both start_positions and end_positions, or neither")
        hidden, outputs = self.encode(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        start_logits, end_logits = self.qa_outputs(hidden).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            pairs = ((start_logits, start_positions), (end_logits, end_positions))
            start, end = (_position_loss(logits, positions, num_items_in_batch) for logits, positions in pairs)
            loss = (start + end) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _position_loss(logits: Tensor, positions: Tensor, num_items: Tensor | int | None) -> Tensor:
    positions = positions.reshape(-1).to(logits.device)
    outside = (positions < 0) | (positions >= logits.shape[1])
    return cross_entropy(logits, positions.masked_fill(outside, -100), num_items)
