"""The layers of a Megalodon model (arXiv 2404.08801): `MegalodonBlock` is the last, its parts come before it.

Legend: B batch, L length, D channels, N moving averages per channel, G groups of channels, H heads, Z width of queries
and keys, E width of values, both of all heads, F width inside the feed-forward network, C chunk, K chunks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mega_scale.model.basic_layers import ChunkedAttention, MegaDropout, linear_layers, products_and_biases
from mega_scale.model.cache import LayerState
from mega_scale.model.configuration_megalodon import MegalodonConfig
from mega_scale.model.rows import DocumentBorders
from mega_scale.ops import runs_triton, tracing
from mega_scale.ops.attention import chunk_attention, turn, turns
from mega_scale.ops.elementwise import EAGER, divide_by_rms, recomputed
from mega_scale.ops.ema import Carry, complex_ema_coefficients, damped_ema_and_residual
from mega_scale.ops.timestep_norm import MomentCarry, Moments, timestep_norm_and_residuals

# Of a layer norm whose kernel holds a token whole.
_MOST_CHANNELS = 4096


class MegalodonTimestepNorm(nn.Module):
    """Normalises by mean and variance over all tokens of a document so far; statistics in fp32 or better."""

    carry: Callable[[], MomentCarry | None] | None = None  # what brings moments, where x is a part of rows

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.groups, self.eps = config.timestep_norm_groups, float(config.norm_eps)
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self,
        x: Tensor,
        state: Moments | None = None,
        resets: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Moments]:
        """Normalise x (B, L, D); arguments and results are those of `timestep_norm_and_residuals`."""
        carry = None if self.carry is None else self.carry()
        return timestep_norm_and_residuals(
            x, self.weight, self.bias, self.groups, self.eps, state, resets, valid, carry=carry
        )


class MegalodonComplexEma(nn.Module):
    """The complex moving average plus omega times its input, with parameters in fp32: angles do not survive bf16."""

    carry: Callable[[], Carry | None] | None = None  # what brings the state of other parts, where x is a part of rows
    sum_gradients: Callable[..., tuple[Tensor, ...]] | None = None  # of parameters, where each rank has a share

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        channels, averages = config.hidden_size, config.ema_projection_size
        self.alpha = nn.Parameter(torch.empty(channels, averages, 1))
        self.delta = nn.Parameter(torch.empty(channels, averages, 1))
        self.theta = nn.Parameter(torch.empty(channels, 1, 1))
        self.gamma = nn.Parameter(torch.empty(channels, averages, 2))
        self.omega = nn.Parameter(torch.empty(channels, 1))

    def forward(
        self, x: Tensor, state: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Average x (B, L, D), padding being zero, over the sequence; also returns x for what else reads it, and h
        after the last token.

        The state is h before the first token, (B, D, N, 2) fp32: real and imaginary parts; resets (B, L) bool are true
        where a document begins.
        """
        parameters: tuple[Tensor, ...] = (self.alpha, self.delta, self.theta, self.gamma, self.omega)
        if self.sum_gradients is not None:
            parameters = self.sum_gradients(*parameters)
        *of_average, omega = parameters
        coefficients = complex_ema_coefficients(*of_average)
        carry = None if self.carry is None else self.carry()
        return damped_ema_and_residual(x, coefficients, state, resets, carry=carry, omega=omega.flatten())


class MegalodonRMSNorm(nn.Module):
    """`(weight + 1) x / rms(x)`; statistics in fp32."""

    weight: nn.Parameter | None

    def __init__(self, channels: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.eps = float(eps)
        self.register_parameter("weight", nn.Parameter(torch.empty(channels)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        return divide_by_rms(x, _gain(self.weight, x), self.eps)


class MegalodonLayerNorm(nn.Module):
    """`(weight + 1) (x - mean(x)) / std(x) + bias`; statistics in fp32."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, channels: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.eps = float(eps)
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(channels)) if affine else None)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        """Normalise x, or for a compiler x plus what a layer left out, (D,): the kernel that sums its gradient."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        gain = _gain(self.weight, x)
        if more is not None:
            # It imports triton, which not everyone has.
            from mega_scale.ops.layer_norm_triton import layer_norm_of_sum  # noqa: PLC0415

            return layer_norm_of_sum(x, more, gain, bias, self.eps)
        return F.layer_norm(x.to(dtype), x.shape[-1:], gain, bias, self.eps).to(x.dtype)


def _gain(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """The scale of x in fp32 or better: a weight is small beside the one that it is added to."""
    return None if weight is None else weight.to(torch.promote_types(x.dtype, torch.float32)) + 1


class RotaryTurns:
    """By what the new tokens' queries and keys turn, once for all layers; neither tuple nor dataclass, of which FSDP
    would round the numbers."""

    def __init__(self, turns: Tensor) -> None:
        self.turns = turns  # of `ops.attention.turns`: (L, dh / 2, 2), or (B, L, dh / 2, 2)

    @classmethod
    def at(cls, seen: Any, pads: Tensor | None, x: Tensor, config: MegalodonConfig) -> "RotaryTurns":
        """Those of x (B, L, D) after `seen` columns; chunks count from the first token behind `pads` (B,) columns."""
        column = torch.arange(x.shape[1], device=x.device) + seen
        # Padding before a row's first token is in no chunk, and has any turn.
        position = column if pads is None else (column - pads[:, None]).clamp(min=0)
        width = config.shared_representation_size // config.num_attention_heads
        dtype = torch.promote_types(x.dtype, torch.float32)
        return cls(turns(position % config.chunk_size, width, config.rope_base, dtype))

    def between(self, begin: int, end: int) -> "RotaryTurns":
        """Of the tokens from `begin` to before `end`."""
        return RotaryTurns(self.turns[..., begin:end, :, :])


class MegalodonAttention(ChunkedAttention):
    """Timestep norm, complex average, normalized attention in chunks, and gates: the first hop of a block."""

    # Brings all channels of what layers read, where x has a rank's, and what they make of them.
    read_by: Callable[..., tuple[Tensor, ...]] | None = None

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.gates = EAGER
        channels, keys, values = config.hidden_size, config.shared_representation_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.dropout = MegaDropout(config.dropout_prob)
        self.ema_dropout = MegaDropout(config.hidden_dropout_prob)
        self.hidden_dropout = MegaDropout(config.hidden_dropout_prob)
        self.timenorm = MegalodonTimestepNorm(config)
        self.cema = MegalodonComplexEma(config)
        self.rmsnorm = MegalodonRMSNorm(channels, config.norm_eps, config.norm_affine)
        self.wv = nn.Linear(channels, values)
        self.wz = nn.Linear(channels, keys)
        self.wr = nn.Linear(channels, values)
        self.wh1 = nn.Linear(channels, channels)
        self.wh2 = nn.Linear(values, channels, bias=False)
        self.gamma = nn.Parameter(torch.empty(2, keys))
        self.beta = nn.Parameter(torch.empty(2, keys))

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTurns,
        mask: Tensor | None = None,
        pads: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        borders: DocumentBorders | None = None,
        leaves_bias: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, LayerState | None]:
        """The residual stream (B, L, D) plus attention, after `state`; a bias (D,) that this lacks, where `leaves_bias`
        says that the second hop adds it and a compiler has a kernel for that, or none; x for the second hop to read;
        and the state after x, or none.

        The mask (B, L) bool, after a state also of columns before, is true for valid positions; `pads` (B,) int64 is
        the padding before each row's first token, from which chunks count; `borders` are of documents in rows without
        such padding.
        """
        valid = None if mask is None else mask[:, -x.shape[1] :]
        resets = None if borders is None else borders.starts
        normed, (x, residual), moments = self.timenorm(x, None if state is None else state.norm, resets, valid)
        if self.read_by is not None:
            normed, pre = self.read_by(normed, self.wv)
        averaged, normed, ema_state = self.cema(normed, None if state is None else state.ema, resets)
        bias = None
        if mask is None and pads is None and self._has_kernels(averaged):
            values = products_and_biases(normed, self.wv) if self.read_by is None else ((pre,), (None,))
            candidate, bias, kept = self._attend_by_kernels(values, averaged, rotary, state, return_state, borders)
            if bias is not None and not (leaves_bias and self.dropout.p == 0):
                candidate, bias = candidate + bias.to(candidate.dtype), None
        else:
            if self.read_by is None:
                pre = self.wv(normed)
            with recomputed(self.rmsnorm, averaged) as averaged_normed:
                m = self.ema_dropout(averaged_normed)
                z, gate, candidate = linear_layers(m, self.wz, self.wr, self.wh1)
            with recomputed(F.silu, pre) as v:
                rules = self.heads, self.config.norm_eps
                q, k = self.gates.normalized_queries_and_keys(z, self.gamma, self.beta, *rules)
                q, k = self.turn(q, k, rotary)
                attended, _, kept = self.attend(q, k, v, mask, pads, state, return_state, False, borders)
            with recomputed(self.gates.gate, attended, gate) as gated:
                candidate = candidate + self.wh2(self.hidden_dropout(gated))
        out = self.dropout(candidate, x)
        if not return_state:
            return out, bias, residual, None
        assert kept is not None and ema_state is not None
        return out, bias, residual, LayerState(ema_state, *kept, moments)

    def _has_kernels(self, x: Tensor) -> bool:
        """Whether a compiler makes kernels for a GPU, among which those of `_attend_by_kernels` fit."""
        # They import triton, which not everyone has.
        if tracing() != "compile" or not self.training or not runs_triton(x, compiled=True):
            return False
        from mega_scale.ops.queries_triton import MOST_CHANNELS  # noqa: PLC0415

        width: int = self.config.shared_representation_size // self.config.num_attention_heads
        return x.dtype != torch.float64 and width <= MOST_CHANNELS

    def _attend_by_kernels(
        self,
        values: tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]],
        averaged: Tensor,
        rotary: RotaryTurns,
        state: LayerState | None,
        return_state: bool,
        borders: DocumentBorders | None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Any] | None]:
        """What `forward` adds to x (B, L, D) but for a bias (D,) or none, that, and what it remembers.

        Queries and keys are one kernel each way, and those of gates sum gradients of biases, which products leave out.
        `values` are the `products_and_biases` of values.
        """
        from mega_scale.ops.gates_triton import silu_of_sum  # noqa: PLC0415
        from mega_scale.ops.queries_triton import turned_queries_and_keys  # noqa: PLC0415

        m = self.ema_dropout(self.rmsnorm(averaged))
        (z, gate, candidate), (of_z, of_gate, of_candidate) = products_and_biases(m, self.wz, self.wr, self.wh1)
        (pre,), (of_values,) = values
        v = F.silu(pre) if of_values is None else silu_of_sum(pre, of_values)
        turns = rotary.turns.to(z.device)
        q, k = turned_queries_and_keys(z, of_z, self.gamma, self.beta, turns, self.heads, self.config.norm_eps)
        # Gradients of what is dropped would be written for the gate's kernel, which costs what its sum saves.
        inside = None if of_gate is None or self.hidden_dropout.p else (gate, of_gate)
        gated, _, kept = self.attend(q, k, v, None, None, state, return_state, False, borders, inside)
        if inside is None:
            gated = self.gates.gate(gated, gate if of_gate is None else gate + of_gate.to(gate.dtype))
        return candidate + self.wh2(self.hidden_dropout(gated)), of_candidate, kept

    @staticmethod
    def turn(q: Tensor, k: Tensor, rotary: RotaryTurns) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, L, H, dh) at their positions, (B, L, Z)."""
        turns = rotary.turns.to(q.device)  # where layers are on several
        return turn(q, turns).flatten(2), turn(k, turns).flatten(2)

    def attend_chunks(self, q: Tensor, k: Tensor, v: Tensor, **rules: Any) -> tuple[Tensor, Tensor | None]:
        q, k, v = (self._by_head(t) for t in (q, k, v))
        if (gate := rules["gate"]) is not None:
            rules["gate"] = self._by_head(gate[0]), gate[1]
        out, weights = chunk_attention(q, k, v, scale=1.0, **rules)
        return out.transpose(2, 3).flatten(3), weights

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(2, 3)


class MegalodonFeedForward(nn.Module):
    """`x + alpha dropout(fc2(dropout(f)))` of the block's input x and its first hop y: the second hop of a block.

    f is `silu(fc1(norm y))`, with SwiGLU times `fc3(norm y)`; alpha is 1 without `rescale_nffn`.
    """

    alpha: nn.Parameter | None
    # Brings all channels of what layers read, where y has a rank's, and what they make of them.
    read_by: Callable[..., tuple[Tensor, ...]] | None = None

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.gates = layer, EAGER
        channels, inner = config.hidden_size, config.nffn_hidden_size
        self.dropout = MegaDropout(config.dropout_prob)
        self.hidden_dropout = MegaDropout(config.hidden_dropout_prob)
        self.norm = MegalodonLayerNorm(channels, config.norm_eps, config.norm_affine)
        self.fc1 = nn.Linear(channels, inner, bias=False)
        self.fc2 = nn.Linear(inner, channels, bias=False)
        self.fc3 = nn.Linear(channels, inner, bias=False) if config.swiglu else None
        self.register_parameter("alpha", nn.Parameter(torch.empty(channels)) if config.rescale_nffn else None)

    def forward(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y and x (B, L, D) to (B, L, D); of y plus a bias (D,) that the first hop left out, see `adds_bias`."""
        with recomputed(self.norm, *((y,) if bias is None else (y, bias))) as normed:
            layers = (self.fc1,) if self.fc3 is None else (self.fc1, self.fc3)
            inner = linear_layers(normed, *layers) if self.read_by is None else self.read_by(normed, *layers)[1:]
        with recomputed(F.silu if self.fc3 is None else self.gates.swiglu, *inner) as active:
            out = self.fc2(self.hidden_dropout(active))
        if self.alpha is None:
            return self.dropout(out, x)
        return torch.addcmul(x, self.alpha.to(x.dtype), self.dropout(out))

    def adds_bias(self) -> bool:
        """Whether the norm has a kernel for what the first hop leaves out; its gradient is then summed there."""
        return type(self.norm) is MegalodonLayerNorm and self.fc1.in_features <= _MOST_CHANNELS


class MegalodonBlock(GradientCheckpointingLayer):
    """One layer of a Megalodon model: the unit of activation checkpointing and of sharding."""

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        self.mega = MegalodonAttention(config)
        self.nffn = MegalodonFeedForward(config, layer)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTurns,
        mask: Tensor | None = None,
        pads: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        borders: DocumentBorders | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Update the residual stream; arguments as in `MegalodonAttention`."""
        y, bias, residual, state = self.mega(x, rotary, mask, pads, state, return_state, borders, self.nffn.adds_bias())
        return self.nffn(y, residual, bias), state
