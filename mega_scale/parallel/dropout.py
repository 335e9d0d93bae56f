"""Dropout of a parallel model: every element's fate depends on its position in the global batch only.

Legend: B rows, L tokens of this rank, D channels of this rank, K chunks, I queries, J keys.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mega_scale.model.layers import MegaAttentionDropout, MegaDropout
from mega_scale.ops.elementwise import positional_dropout
from mega_scale.parallel.sequence_parallel import RowSlice
from mega_scale.parallel.shard import replace_modules
from mega_scale.parallel.world import Axis


class _Site(NamedTuple):
    """Where in the model something is dropped: name of the module, seed of the run, position of the rank's part."""

    name: str
    seed: int
    row_slice: RowSlice
    tp: Axis

    def drop(self, x: Tensor, p: float, featurewise: bool, sharded: bool) -> Tensor:
        """x (B, L, D); featurewise: one draw for a feature of a row; sharded: D are this rank's columns of more."""
        place = self.row_slice.place
        digest = hashlib.blake2b(f"{self.seed}:{place.step}:{self.name}".encode(), digest_size=4).digest()

        def count(first: int, number: int) -> Tensor:
            return torch.arange(first, first + number, device=x.device)

        rows = count(place.first_row, x.shape[0])
        positions = count(0, 1) if featurewise else count(self.row_slice.first_token, x.shape[1])
        columns = count(self.tp.rank * x.shape[2] if sharded else 0, x.shape[2])
        return positional_dropout(x, p, int.from_bytes(digest, "little"), rows, positions, columns)


class PositionalDropout(MegaDropout):
    """`MegaDropout` by position."""

    def __init__(self, p: float, featurewise: bool, site: _Site) -> None:
        super().__init__(p, featurewise)
        self._site = site

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D)."""
        if not self.drops:
            return x
        return self._site.drop(x, self.p, self.featurewise, sharded=True)


class PositionalAttentionDropout(MegaAttentionDropout):
    """`MegaAttentionDropout` by position; fused attention cannot do it, so weights are then computed one by one."""

    def __init__(self, p: float, site: _Site) -> None:
        super().__init__(p)
        self._site = site

    def rule(self) -> float | Callable[[Tensor], Tensor]:
        """A function of weights (B, K, I, J), or 0."""
        if not self.training or self.p == 0.0:
            return 0.0
        return self._drop

    def _drop(self, weights: Tensor) -> Tensor:
        flat = self._site.drop(weights.flatten(1, 2), self.p, featurewise=False, sharded=False)
        return flat.view_as(weights)


def make_dropout_positional(model: nn.Module, seed: int, row_slice: RowSlice, tp: Axis) -> None:
    """Have every dropout of a model depend on the position in the global batch, not on ranks.

    Args:
        model: changed in place.
        seed: of the run.
        row_slice: which part of the global batch the model computes.
        tp: ranks over which channels are sharded.
    """

    def build(name: str, module: nn.Module) -> nn.Module | None:
        site = _Site(name, seed, row_slice, tp)
        if isinstance(module, MegaDropout):
            return PositionalDropout(module.p, module.featurewise, site)
        if isinstance(module, MegaAttentionDropout):
            return PositionalAttentionDropout(module.p, site)
        return None

    replace_modules(model, build)
