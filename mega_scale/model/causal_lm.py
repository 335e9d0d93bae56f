"""What causal language models of both families share: losses, the step from hidden states to logits, generation.

Legend: B batch, L length, D channels, V vocabulary, K classes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mega_scale.model.basic_layers import LanguageModelHead
from mega_scale.ops.linear import linear_cross_entropy

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # dtypes of labels


def mean(total: Tensor, count: Tensor | int, num_items: Tensor | int | None) -> Tensor:
    """A sum of losses over the number of targets that count, or over `num_items` where given: the number in several
    micro-batches or ranks, so that parts add up to the whole batch's loss. Without any target the loss is 0, not NaN.
    """
    divisor = count if num_items is None else num_items
    if isinstance(divisor, Tensor):
        divisor = divisor.to(total.device)
        return total / divisor.masked_fill(divisor == 0, 1)
    return total / (divisor or 1)


def check_labels(labels: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse labels that are no integers, or not one for each of the predictions (`shape`, or as many in a row)."""
    expected = tuple(shape)
    fits = labels.shape == expected or (labels.dim() != len(expected) and labels.numel() == math.prod(expected))
    if labels.dtype not in INTEGERS or not fits:
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}: expected integers {expected}, one for each prediction"
        )


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """The `mean` cross-entropy of logits (..., K) with integer labels (...), but for -100, in nats, fp32 or better."""
    check_labels(labels, logits.shape[:-1])
    labels = labels.reshape(-1).to(logits.device, torch.long)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    total = F.cross_entropy(wide, labels, reduction="sum")
    return mean(total, (labels != -100).sum(), num_items)


def sliced_cross_entropy(head: nn.Module, x: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """`cross_entropy(head(x), labels, num_items)`, a few tokens of x (B, L, D) at a time, so that logits are never
    whole; but of whole logits where calling the head is more than its product: replaced, adapted, watched."""
    check_labels(labels, x.shape[:-1])
    labels = labels.to(x.device)
    if isinstance(head, LanguageModelHead):
        return mean(head(x, labels), (labels != -100).sum(), num_items)
    if (
        type(head) is not nn.Linear
        or torch.compiler.is_compiling()
        or "forward" in vars(head)
        or head._compiled_call_impl is not None
        or head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
        or _has_any_global_hook()
    ):  # fmt: skip
        return cross_entropy(head(x), labels, num_items)
    return mean(linear_cross_entropy(x, head.weight, head.bias, labels), (labels != -100).sum(), num_items)


class CausalLanguageModel:
    """The head's part of a causal language model; stands before `GenerationMixin` among the bases."""

    lm_head: nn.Module

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() then leaves the cache to forward(), which makes a MegaCache.
        return False

    def predict(
        self,
        hidden: Tensor,
        following: Tensor | None,
        num_items: Tensor | int | None = None,
        skip_logits: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss of hidden states (B, L, D) against the tokens that follow (B, L), and logits; either may be none."""
        if following is not None and skip_logits:
            return sliced_cross_entropy(self.lm_head, hidden, following, num_items), None
        logits = self.lm_head(hidden)
        return None if following is None else cross_entropy(logits, following, num_items), logits


def following_tokens(labels: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The next token of every position, (B, L): `shift_labels` among the keywords, or labels moved by one."""
    following: Tensor | None = kwargs.get("shift_labels")
    if following is None and labels is not None:
        following = F.pad(labels[:, 1:], (0, 1), value=-100)
    return following


def kept_positions(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The last n of hidden states (B, L, D), all for 0; or those at the given positions."""
    return hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
