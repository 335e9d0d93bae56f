"""Dropout of a model that is spread over ranks: every element's fate depends on its place in the global batch only.

Legend: B rows, L tokens of this rank, D channels of this rank, K chunks, I queries, J keys.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mega_scale.model.layers import MegaAttentionDropout, MegaDropout
from mega_scale.ops.dropout import positional_dropout
from mega_scale.parallel.collectives import Axis
from mega_scale.parallel.window import Window


class _Site:
    """Where in the model something is dropped.

    Args:
        name: of the module.
        seed: of the run.
        window: where in the global batch the model computes.
        tp: ranks over which channels are cut.
    """

    def __init__(self, name: str, seed: int, window: Window, tp: Axis) -> None:
        self._name, self._seed, self._window, self._tp = name, seed, window, tp

    def drop(self, x: Tensor, p: float, featurewise: bool, cut: bool) -> Tensor:
        """x (B, L, D); featurewise: one draw for a feature of a row; cut: D are this rank's columns of more."""
        place = self._window.place
        digest = hashlib.blake2b(f"{self._seed}:{place.step}:{self._name}".encode(), digest_size=4).digest()

        def count(first: int, number: int) -> Tensor:
            return torch.arange(first, first + number, device=x.device)

        rows = count(place.first_row, x.shape[0])
        positions = count(0, 1) if featurewise else count(self._window.first_token, x.shape[1])
        columns = count(self._tp.rank * x.shape[2] if cut else 0, x.shape[2])
        return positional_dropout(x, p, int.from_bytes(digest, "little"), rows, positions, columns)


class PositionalDropout(MegaDropout):
    """`MegaDropout` by place."""

    site: _Site

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D)."""
        if not self.drops:
            return x
        return self.site.drop(x, self.p, self.featurewise, cut=True)


class PositionalAttentionDropout(MegaAttentionDropout):
    """`MegaAttentionDropout` by place; a fused attention cannot do it, so weights are then computed one by one."""

    site: _Site

    def rule(self) -> float | Callable[[Tensor], Tensor]:
        """A function of weights (B, K, I, J), or 0."""
        if not self.training or self.p == 0.0:
            return 0.0
        return self._drop

    def _drop(self, weights: Tensor) -> Tensor:
        flat = self.site.drop(weights.flatten(1, 2), self.p, featurewise=False, cut=False)
        return flat.view_as(weights)


def drop_by_place(model: nn.Module, seed: int, window: Window, tp: Axis) -> None:
    """Have every dropout of a model depend on the place in the global batch, not on ranks.

    Args:
        model: changed in place.
        seed: of the run.
        window: where in the global batch the model computes.
        tp: ranks over which channels are cut.
    """
    for name, module in model.named_modules():
        site = _Site(name, seed, window, tp)
        if isinstance(module, MegaDropout):
            module.__class__ = PositionalDropout
            module.site = site  # type: ignore[assignment]
        elif isinstance(module, MegaAttentionDropout):
            module.__class__ = PositionalAttentionDropout
            module.site = site  # type: ignore[assignment]
