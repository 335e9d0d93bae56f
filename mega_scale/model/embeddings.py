"""Word and token type embeddings.

Legend: B batch, L length, D channels.
"""

import torch
from torch import Tensor, nn

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.dropout import MegaDropout


class MegaEmbeddings(nn.Module):
    """Word embeddings, times sqrt(D) if `scale_embeddings`, plus token type embeddings if the model has them."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.padding_idx)
        self.token_type_embeddings = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.add_token_type_embeddings else None
        )
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.dropout = MegaDropout(config.embedding_dropout_prob, config.use_feature_dropout)

    def forward(
        self, input_ids: Tensor | None = None, token_type_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Embed input_ids (B, L), or take inputs_embeds (B, L, D) in their place; token types default to 0."""
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.scale != 1.0:
            x = x * self.scale
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
            x = x + self.token_type_embeddings(token_type_ids)
        return self.dropout(x)
