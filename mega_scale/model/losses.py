"""Losses of the heads: a sum over the targets that count, divided by their number.

The number may span several micro-batches or ranks, so that the parts add up to the loss of the whole batch. Without
any target the loss is zero and still has a graph, where a mean would be NaN.

Legend: B batch, L length, D channels, V vocabulary, K classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mega_scale.model.layers import plain_linear
from mega_scale.ops.linear import linear_cross_entropy

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def check_labels(labels: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse labels that are no integers, or not one for each of the predictions (`shape`, or as many in a row)."""
    expected = tuple(shape)
    fits = labels.shape == expected or (labels.dim() != len(expected) and labels.numel() == math.prod(expected))
    if labels.dtype not in INTEGERS or not fits:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}: expected integers {expected}, one for each prediction"
        )


def cross_entropy(
    logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy of logits (..., K) with integer labels (...), of which `ignore_index` does not count; in fp32.

    Returns:
        A scalar: the sum in nats, divided by `num_items`, by default the number of labels that count.
    """
    check_labels(labels, logits.shape[:-1])
    labels = labels.reshape(-1).to(logits.device, torch.long)
    flat = logits.reshape(-1, logits.shape[-1]).float()
    total = F.cross_entropy(flat, labels, ignore_index=ignore_index, reduction="sum")
    return mean(total, (labels != ignore_index).sum().clamp(min=1), num_items)


def sequence_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None = None, num_items: Tensor | int | None = None
) -> Tensor:
    """Loss of logits (B, K), one prediction a sequence: mean square, cross-entropy, or binary cross-entropy.

    Labels are (B,) classes, (B, K) zeros and ones for several labels, or (B, K) values of a regression, (B,) if K = 1.
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


def mean(total: Tensor, count: Tensor | int, num_items: Tensor | int | None) -> Tensor:
    """A sum of losses, divided by `num_items` (0 counts as 1), or by the number of targets where that is not given."""
    if num_items is None:
        return total / count
    # A Trainer counts 0 where no label of its batches counts; 0 / 0 would end in every weight.
    if isinstance(num_items, Tensor):
        return total / num_items.to(total.device).masked_fill(num_items.to(total.device) == 0, 1)
    return total / (num_items or 1)


class LanguageModelHead(nn.Linear):
    """A linear layer that can also take targets, whatever hooks it has: what trainers make of it."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of (B, L, D); with targets (B, L) int64, -100 where there is none, the sum of losses."""
        if targets is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, self.bias, targets.to(input.device))


def summed_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a head's logits of x (B, L, D), summed over targets (B, L) but for -100, in fp32 and nats.

    A few tokens at a time, except where the head is not linear itself (quantised, adapted, watched): then of whole
    logits.
    """
    targets = targets.to(x.device)
    if isinstance(head, LanguageModelHead):
        loss: Tensor = head(x, targets)
        return loss
    plain = plain_linear(head)
    if plain is not None:
        return linear_cross_entropy(x, plain.weight, plain.bias, targets)
    logits = head(x).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.to(logits.device).flatten(), ignore_index=-100, reduction="sum")
