"""Layers that both families are made of: products, dropout, the output layer; and the checks of token ids.

Legend: B batch, L length, D channels, V vocabulary, W outputs of a linear layer.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mega_scale.ops import in_memory
from mega_scale.ops.linear import linear, linear_cross_entropy

INDICES = (torch.int64, torch.int32)  # dtypes of token ids


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


class LanguageModelHead(nn.Linear):
    """A linear layer that can also take targets, whatever hooks it has: what trainers make of it."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of (B, L, D); with targets (B, L) int64, -100 where there is none, the sum of losses."""
        if targets is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, self.bias, targets.to(input.device))


def use_own_linear(model: PreTrainedModel) -> None:
    """Make plain linear layers `MegaLinear`, and the output a `LanguageModelHead`, in place; parameters and ties stay.

    For models that this project runs: programs that look for `nn.Linear` itself, to quantise it, find none.
    """
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                with torch.device("meta"):
                    kind = LanguageModelHead if layer is head else MegaLinear
                    new = kind(layer.in_features, layer.out_features, layer.bias is not None)
                new.weight, new.bias = layer.weight, layer.bias
                parent.add_module(name, new)


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, channels: int) -> Tensor:
    """The one of input_ids (B, L) int64 and inputs_embeds (B, L, D) that is given.

    Raises ValueError for both or none of the two, and for other shapes or dtypes.
    """
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    shape = tuple(given.shape)
    if input_ids is None:
        name, expected = "inputs_embeds", f"(batch, length, {channels})"
        fits = shape[2:] == (channels,)
    else:
        name, expected = "input_ids", "int64 (batch, length)"
        fits = len(shape) == 2 and given.dtype in INDICES
    if not fits or shape[1] < 1:
        raise ValueError(f"{name} is {given.dtype} {shape}: expected {expected}, at least one token long")
    return given


def check_ids(ids: Tensor, rows: int, name: str, size: str) -> None:
    """Refuse ids outside 0 to rows - 1 on a CPU; other devices say so themselves, and later."""
    if not in_memory(ids) or not ids.numel() or not ids.is_cpu:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"{name} holds {low if low < 0 else high}: expected 0 to {rows - 1} ({size}={rows})")
