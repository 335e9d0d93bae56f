"""Masked language model.

Legend: B batch, L length, D channels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple, logging

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.heads import MegaHeadModel
from mega_scale.model.linear import apply_linear
from mega_scale.model.losses import cross_entropy
from mega_scale.model.modeling_mega import MegaModel

logger = logging.get_logger(__name__)


class MegaForMaskedLM(MegaHeadModel):
    """Mega with a head that predicts the tokens behind masks: optional dense layer with tanh, then a linear layer.

    Args:
        config: an encoder's; the linear layer shares the word embeddings if `tie_word_embeddings`.
    """

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
        """The layer that gives logits."""
        return self.mlm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the layer that gives logits."""
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits of every position, and their cross-entropy when labels are given; other arguments as in `MegaModel`.

        Args:
            labels: (B, L) int64, the token of each position; -100 is ignored.
            num_items_in_batch: what the sum of token losses is divided by; default: the number of labels here.

        Returns:
            loss, logits (B, L, V), hidden_states, attentions.
        """
        hidden, outputs = self.encode(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        if self.dense is not None:
            hidden = torch.tanh(apply_linear(self.dense, hidden))
        logits = self.mlm_head(hidden)
        return MaskedLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
