"""Word and token type embeddings.

Legend: B batch, L length, D channels.
"""

import torch
from torch import Tensor, nn

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.dropout import MegaDropout
from mega_scale.ops.tracing import in_memory

INDICES = (torch.int64, torch.int32)


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
        """Embed input_ids (B, L), or take inputs_embeds (B, L, D) in their place; token types default to 0.

        Raises:
            ValueError: ids that no row belongs to; see also `check_inputs`.
        """
        check_rows(self.word_embeddings, input_ids, "input_ids", "vocab_size")
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.scale != 1.0:
            x = x * self.scale
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
            check_rows(self.token_type_embeddings, token_type_ids, "token_type_ids", "type_vocab_size")
            x = x + self.token_type_embeddings(token_type_ids)
        return self.dropout(x)


def check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor | None, config: MegaConfig
) -> None:
    """Refuse inputs of another shape or dtype than `MegaEmbeddings` takes.

    Raises:
        ValueError: both or none of ids and embeddings; no token in a row; other shapes or dtypes; token types that are
            not (B, L) or (1, L).
    """
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    shape = tuple(given.shape)
    if input_ids is None:
        name, expected, fits = (
            "inputs_embeds",
            f"(batch, length, {config.hidden_size})",
            shape[2:] == (config.hidden_size,),
        )
    else:
        name, expected, fits = "input_ids", "int64 (batch, length)", len(shape) == 2 and given.dtype in INDICES
    if not fits or shape[1] < 1:
        raise ValueError(f"{name} is {given.dtype} {shape}: expected {expected}, at least one token long")
    if token_type_ids is not None and config.add_token_type_embeddings:
        types = tuple(token_type_ids.shape)
        if types not in (shape[:2], (1, shape[1])) or token_type_ids.dtype not in INDICES:
            raise ValueError(
                f"token_type_ids is {token_type_ids.dtype} {types}: expected int64 {shape[:2]}, one a token"
            )


def check_rows(table: nn.Module, ids: Tensor | None, name: str, size: str) -> None:
    """Refuse ids that a table on a CPU has no row for; other devices say so themselves, and later."""
    if ids is None or not in_memory(ids) or type(table) is not nn.Embedding or not ids.numel() or not ids.is_cpu:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= table.num_embeddings:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{name} holds {wrong}: expected 0 to {table.num_embeddings - 1} ({size}={table.num_embeddings})"
        )
