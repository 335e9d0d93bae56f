"""Layers of a Mega block and model, but for attention.

Legend: B batch, L length, D channels, N moving averages per channel, Z width of queries and keys, I queries, J keys,
W outputs of a linear layer.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mega_scale.model.configuration_mega import BATCH_NORMS, MegaConfig
from mega_scale.ops import in_memory, without_autocast
from mega_scale.ops.attention import key_minus_query
from mega_scale.ops.elementwise import EAGER, divide_by_rms, recomputed
from mega_scale.ops.ema import Carry, damped_ema, ema_coefficients
from mega_scale.ops.linear import linear

_EPSILON = 1e-5  # of all norms
_INDICES = (torch.int64, torch.int32)  # dtypes of token ids


class MegaLinear(nn.Linear):
    """(B, L, D) to (B, L, W), by whichever library is fastest on a CPU whatever hooks it has: for trainers."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class MegaDropout(nn.Module):
    """Zeroes elements of (B, L, D) with probability p while training; featurewise: one draw for a feature of a row."""

    drop: Callable[[Tensor], Tensor] | None = None  # does it, where PyTorch is not to draw

    def __init__(self, p: float, featurewise: bool = False) -> None:
        super().__init__()
        self.p = float(p)
        self.featurewise = featurewise

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.drop is not None:
            return self.drop(x)
        if self.featurewise:
            return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)
        return F.dropout(x, self.p)


class MegaScaleNorm(nn.Module):
    """`g x / rms(x)` with one learned scalar g (arXiv 1910.05895); statistics in fp32."""

    scalar: nn.Parameter | None

    def __init__(self, eps: float = _EPSILON, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("scalar", nn.Parameter(torch.ones(1)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        return divide_by_rms(x, self.scalar, self.eps)


class MegaRMSNorm(nn.RMSNorm):
    """`g x / rms(x)` with a learned g per channel (arXiv 1910.07467). In 4.37.2 it returns its input unnormalised."""

    def __init__(self, channels: int, eps: float = _EPSILON, elementwise_affine: bool = True) -> None:
        super().__init__(channels, eps, elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        return divide_by_rms(x, self.weight, self.eps or 0.0)


class MegaSequenceNorm(nn.Module):
    """The norm named by `normalization_type`; batch norms take their statistics from valid positions only."""

    def __init__(self, kind: str, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.norm: nn.Module
        if kind == "scalenorm":
            self.norm = MegaScaleNorm(_EPSILON, affine)
        elif kind in BATCH_NORMS:
            norm = nn.BatchNorm1d if kind == "batchnorm" else nn.SyncBatchNorm
            self.norm = norm(channels, eps=_EPSILON, affine=affine)
        else:
            self.norm = (nn.LayerNorm if kind == "layernorm" else MegaRMSNorm)(channels, _EPSILON, affine)
        self.over_batch = kind in BATCH_NORMS

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x (B, L, D); mask (B, L) bool marks the positions that batch statistics count."""
        if not self.over_batch:
            return self.norm(x)
        if mask is None or not self.training:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        out = torch.zeros_like(x)
        out[mask] = self.norm(x[mask])
        return out


class MegaSimpleRelativePositionalBias(nn.Module):
    """A learned bias per distance; the table has `max_positions` on either side, read about the chunk when chunked."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.chunked = config.use_chunking
        self.centre = config.chunk_size if config.use_chunking else config.max_positions
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * config.max_positions - 1))

    def forward(self, queries: int, keys: int, offset: int | Tensor) -> Tensor:
        """The bias of I queries from position `offset` on against J keys, (I + J - 1,), or (B, I + J - 1) for (B,)."""
        reach = keys if isinstance(offset, Tensor) else max(keys, offset + queries)
        if not self.chunked and reach > self.centre:
            raise ValueError(
                f"a sequence of {reach} tokens is longer than max_positions={self.centre}, the limit of "
                "relative_positional_bias='simple': shorten it, use chunks, or use the rotary bias"
            )
        table: Tensor = self.rel_pos_bias
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        distances = key_minus_query(queries, keys, offset, table.device)
        # A distance beyond the table has the bias at its end.
        return table[(distances + (self.centre - 1)).clamp(0, table.shape[0] - 1)]


class MegaRotaryRelativePositionalBias(nn.Module):
    """A learned function of the distance, defined at any distance (arXiv 2209.10655, section 3.3; HF 4.37.2).

    `sum_k (a1 b1 + a2 b2)_k cos(d theta_k) + (a1 b2 - a2 b1)_k sin(d theta_k)`, with d = i - j, the halves 1 and 2 of
    alpha and beta, and `theta_k = 10000^(-k / (Z / 2))`: alpha rotated to i, times beta rotated to j.
    """

    _float_tensor: Tensor

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, config.shared_representation_size))
        self.b_param = nn.Parameter(torch.empty(1, config.shared_representation_size))
        # Not used; checkpoints of 4.37.2 have it, and load strictly.
        self.register_buffer("_float_tensor", torch.zeros(1))

    def forward(self, queries: int, keys: int, offset: int | Tensor) -> Tensor:
        """As that of the simple bias; at least fp32."""
        alpha, beta = self.alpha, self.b_param
        dtype = torch.promote_types(alpha.dtype, torch.float32)
        distances = key_minus_query(queries, keys, offset, alpha.device)
        with without_autocast(alpha.device):
            a1, a2 = alpha.to(dtype).reshape(-1).chunk(2)
            b1, b2 = beta.to(dtype).reshape(-1).chunk(2)
            half = a1.shape[0]
            theta = 10000.0 ** (-torch.arange(half, device=alpha.device, dtype=dtype) / half)
            angles = -distances.to(dtype)[..., None] * theta
            return angles.cos() @ (a1 * b1 + a2 * b2) + angles.sin() @ (a1 * b2 - a2 * b1)


BIASES = {"rotary": MegaRotaryRelativePositionalBias, "simple": MegaSimpleRelativePositionalBias}


class MegaMultiDimensionDampedEma(nn.Module):
    """`silu(EMA(x) + omega x)` (arXiv 2209.10655, equations 5 and 6; omega and silu as in the public implementations),
    with parameters in fp32: a decay close to one does not survive bf16."""

    carry: Callable[[], Carry | None] | None = None  # what brings the state of other parts, where x is a part of rows

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        rows = config.hidden_size * (2 if config.bidirectional else 1)
        averages = config.ema_projection_size
        self.gates = EAGER
        self.bidirectional = config.bidirectional
        self.truncation = config.truncation
        self.damping_factor = nn.Parameter(torch.empty(rows, averages, 1))
        self.decay_factor = nn.Parameter(torch.empty(rows, averages, 1))
        self.ema_expansion_matrix = nn.Parameter(torch.empty(rows, averages, 1))
        self.kernel_projection_matrix = nn.Parameter(torch.empty(rows, averages))
        self.residual_weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, state: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Average x (B, L, D) over the sequence; also returns h after the last token, none when truncated.

        The mask (B, L) bool is false for positions that the average leaves out (their omega term stays); the state is h
        before the first token, (B, D, N) fp32; resets (B, L) bool are true where a document begins.
        """
        coefficients = ema_coefficients(
            self.damping_factor, self.decay_factor, self.ema_expansion_matrix, self.kernel_projection_matrix
        )
        inputs = x if mask is None else x * mask[..., None]
        y, state = damped_ema(
            inputs,
            coefficients,
            state,
            resets,
            bidirectional=self.bidirectional,
            truncation=self.truncation,
            carry=None if self.carry is None else self.carry(),
        )
        return self.gates.average(y, x, self.residual_weight), state


class MegaEmbeddings(nn.Module):
    """Word embeddings, times sqrt(D) if `scale_embeddings`, plus token type embeddings if the model has them."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.channels = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.padding_idx)
        self.token_type_embeddings = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.add_token_type_embeddings else None
        )
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
        self.dropout = MegaDropout(config.embedding_dropout_prob, config.use_feature_dropout)

    def forward(
        self, input_ids: Tensor | None = None, token_type_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Embed input_ids (B, L), or take inputs_embeds (B, L, D); token types, (B, L) or (1, L), are 0 by default.

        Raises ValueError for both or none of the two, for other shapes or dtypes, and for ids that have no row.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        shape = tuple(given.shape)
        if input_ids is None:
            name, expected = "inputs_embeds", f"(batch, length, {self.channels})"
            fits = shape[2:] == (self.channels,)
        else:
            name, expected = "input_ids", "int64 (batch, length)"
            fits = len(shape) == 2 and given.dtype in _INDICES
        if not fits or shape[1] < 1:
            raise ValueError(f"{name} is {given.dtype} {shape}: expected {expected}, at least one token long")
        types = None if self.token_type_embeddings is None else token_type_ids
        if types is not None and (types.shape not in (shape[:2], (1, shape[1])) or types.dtype not in _INDICES):
            raise ValueError(
                f"token_type_ids is {types.dtype} {tuple(types.shape)}: expected int64 {shape[:2]}, one a token"
            )

        words = self.word_embeddings
        if input_ids is not None and type(words) is nn.Embedding:
            check_ids(input_ids, words.num_embeddings, "input_ids", "vocab_size")
        x = given if input_ids is None else words(input_ids)
        if self.scale != 1.0:
            x = x * self.scale
        if self.token_type_embeddings is not None:
            if types is None:
                types = torch.zeros(shape[:2], dtype=torch.long, device=x.device)
            if type(self.token_type_embeddings) is nn.Embedding:
                check_ids(types, self.token_type_embeddings.num_embeddings, "token_type_ids", "type_vocab_size")
            x = x + self.token_type_embeddings(types)
        return self.dropout(x)


def check_ids(ids: Tensor, rows: int, name: str, size: str) -> None:
    """Refuse ids outside 0 to rows - 1 on a CPU; other devices say so themselves, and later."""
    if not in_memory(ids) or not ids.numel() or not ids.is_cpu:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"{name} holds {low if low < 0 else high}: expected 0 to {rows - 1} ({size}={rows})")


class MegaNormalizedFeedForwardNetwork(nn.Module):
    """`x + dropout(fc2(dropout(act(fc1(norm x)))))`, the norm after the sum when not pre-norm."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.prenorm = config.normalize_before_ffn
        self.activation = ACT2FN[config.activation]
        self.norm = MegaSequenceNorm(config.normalization_type, config.hidden_size, config.norm_affine)
        self.fc1 = nn.Linear(config.hidden_size, config.nffn_hidden_size)
        self.fc2 = nn.Linear(config.nffn_hidden_size, config.hidden_size)
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.nffn_activation_dropout_prob, config.use_feature_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update the residual stream (B, L, D); mask (B, L) bool is true for valid positions, for batch norms."""
        if self.prenorm and not self.norm.over_batch:
            with recomputed(self.norm, x) as normed:
                pre = self.fc1(normed)
        else:
            pre = self.fc1(self.norm(x, mask) if self.prenorm else x)
        with recomputed(self.activation, pre) as active:
            out = x + self.dropout(self.fc2(self.hidden_dropout(active)))
        return out if self.prenorm else self.norm(out, mask)
