"""A linear layer over the vocabulary and its cross-entropy, a slice of tokens at a time: logits are never whole.

The gradient of a slice is computed while its logits are there, so nothing is recomputed: the backward pass only scales
what the forward pass left, which is as large as the inputs.

Legend: T tokens, D channels, V words, S tokens of a slice.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.linear import times_transposed
from mega_scale.ops.modes import autocast_dtype, once_differentiable, without_autocast, written_out

# Logits that exist at a time, numbers: on a CPU they should stay in its caches, a GPU needs large products.
_CPU_LOGITS, _GPU_LOGITS = 2**21, 2**26


class VocabularyPart(NamedTuple):
    """The words of one rank, where ranks share the vocabulary.

    Args:
        first: number of the first one.
        words: how many there are; rows beyond them are none.
        reduce: combines a tensor of all ranks, in place.
    """

    first: int
    words: int
    reduce: Callable[[Tensor, Literal["max", "sum"]], None]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    part: VocabularyPart | None = None,
    ignore_index: int = -100,
    slice_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy of `hidden weight^T + bias`, summed over targets; sums are taken in fp32.

    Args:
        hidden: (..., D), fp32 or bf16.
        weight: (V, D); under `part` this rank's rows.
        bias: (V,) or none.
        targets: (...) int64, `ignore_index` where there is none.
        part: this rank's words; none where it has all of them. All ranks return the same loss; the gradient of
            `hidden` is this rank's share.
        ignore_index: see `targets`.
        slice_tokens: S; chosen by device and V if not given.

    Returns:
        A scalar in fp32, nats. Its gradient is computed here, and not twice differentiable. Under a
        compiler or a tracer, logits are whole.

    Raises:
        ValueError: shapes do not fit.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)} do not fit: "
            "expected (..., D), (V, D) and (...)"
        )
    if slice_tokens is None:
        slice_tokens = max((_CPU_LOGITS if hidden.device.type == "cpu" else _GPU_LOGITS) // weight.shape[0], 1)
    dtype = autocast_dtype(hidden.device)
    if dtype is not None:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with without_autocast(hidden.device):
        if part is None and written_out():
            logits = F.linear(hidden, weight, bias).flatten(0, -2)
            logits = logits.to(_at_least_fp32(logits.dtype))
            return F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="sum")
        loss: Tensor = _LinearCrossEntropy.apply(
            hidden.flatten(0, -2), weight, bias, targets.flatten(), part, ignore_index, slice_tokens
        )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        part: VocabularyPart | None,
        ignore_index: int,
        slice_tokens: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        # Sums over slices, in more precision than a slice.
        d_weight = torch.zeros_like(weight, dtype=_at_least_fp32(weight.dtype)) if wanted[1] else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=_at_least_fp32(weight.dtype)) if wanted[2] else None
        total = torch.zeros((), dtype=_at_least_fp32(hidden.dtype), device=hidden.device)
        for begin in range(0, len(hidden), slice_tokens):
            some = slice(begin, begin + slice_tokens)
            x, target = hidden[some], targets[some]
            counts = target != ignore_index
            scores = times_transposed(x, weight, bias).to(total.dtype)
            if part is not None:
                scores[:, part.words :] = -math.inf
            largest = scores.amax(1)
            if part is not None:
                part.reduce(largest, "max")
            scores -= largest[:, None]
            place, mine = _place(target, counts, part)
            hit = scores.gather(1, place)[:, 0].where(mine, 0)
            sums = scores.exp_().sum(1)
            if part is not None:
                part.reduce(both := torch.stack([hit, sums]), "sum")
                hit, sums = both
            total += ((sums.log() - hit) * counts).sum()
            if not any(wanted):
                continue
            slope = scores.mul_((counts / sums)[:, None])
            slope.scatter_add_(1, place, -(mine & counts).to(slope.dtype)[:, None])
            if d_bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(slope, weight, out=d_hidden[some])
            if d_weight is not None:
                if d_weight.dtype == slope.dtype:
                    d_weight.addmm_(slope.t(), x)
                else:
                    d_weight += slope.t() @ x
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden * gradient.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * gradient).to(of_weight),
            None if d_bias is None else (d_bias * gradient).to(of_bias),
            None,
            None,
            None,
            None,
        )


def _place(targets: Tensor, counts: Tensor, part: VocabularyPart | None) -> tuple[Tensor, Tensor]:
    """Column of each target, (S, 1), and whether this rank has it, (S,)."""
    if part is None:
        return targets.where(counts, 0)[:, None], counts
    local = targets - part.first
    mine = counts & (local >= 0) & (local < part.words)
    return local.where(mine, 0)[:, None], mine


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
