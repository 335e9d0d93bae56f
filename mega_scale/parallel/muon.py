"""Muon for the matrices of blocks, AdamW for all else: one optimizer, whatever an engine leaves each rank of a matrix.

Muon (https://kellerjordan.github.io/posts/muon/) moves a matrix by its momentum with all singular values brought near
1, which needs the matrix whole. Each step takes it in rounds of as many matrices as there are ranks: every rank is sent
the momentum of one whole matrix, computes its direction, and sends each rank the numbers that it steps. So one rank
holds two whole matrices at a time, each is computed once, and the result does not depend on the layout. What each rank
holds of a matrix follows from the layout: no rank asks another, and one that has no others plans as one that has.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mega_scale.parallel.shard import MOMENTUM, Held, Shard, flat
from mega_scale.parallel.world import World

# The quintic iteration of the source above: it takes singular values from 0.003 on to between 0.7 and 1.2 in 5 rounds.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# The direction's root mean square beside AdamW's, so that both take one learning rate: https://arxiv.org/abs/2502.16982.
_RMS = 0.2


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring all singular values of a matrix near 1 by Newton-Schulz: (M, N) to (M, N) fp32, computed in `dtype`.

    The nearest matrix with orthonormal rows or columns, up to a factor of 0.7 to 1.2 in each direction; a matrix of
    zeros stays one.
    """
    wide = matrix.float()
    # First by the largest number: squares of those below 1e-23 are 0 in fp32, and the norm would be too.
    wide = wide / torch.linalg.vector_norm(wide, math.inf).clamp(min=torch.finfo(torch.float32).tiny)
    wide = wide.div_(wide.norm().clamp(min=1e-30)).to(dtype)
    x = wide.T if wide.shape[0] > wide.shape[1] else wide
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = _COEFFICIENTS[0] * x + (_COEFFICIENTS[1] * square + _COEFFICIENTS[2] * (square @ square)) @ x
    return (x.T if wide.shape[0] > wide.shape[1] else x).float()


class _Matrix(NamedTuple):
    """A matrix that Muon steps, and this rank's part of it."""

    name: str
    shape: torch.Size
    owner: Tensor  # what the optimizer steps, and has a momentum for
    numbers: slice  # which of its numbers, flattened
    first: bool  # whether this is the first of the ranks that have these numbers


class Muon(torch.optim.AdamW):
    """AdamW for groups whose `muon` is false; the others' parameters are stepped by Muon, with decoupled decay too.

    Muon's momentum is the exponential mean of gradients, with `momentum` the share kept, and Nesterov's look ahead.
    An engine calls `attach` once its tensors are what they stay; without it, no matrix moves.
    """

    def __init__(self, groups: Any, *, momentum: float, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(groups, **options)
        self._momentum, self._dtype = momentum, dtype
        self._matrices: dict[int, list[_Matrix]] = {}
        self._world: World | None = None
        self._held: Callable[[str, int], Held] | None = None
        self._parts: dict[str, list[Held]] = {}  # by rank, of the matrices that this one computes

    def attach(
        self,
        tensors: Iterable[tuple[str, torch.Size, Tensor, slice]],
        held: Callable[[str, int], Held],
        world: World,
    ) -> None:
        """Say which numbers of which matrices this rank steps, with the same names on all ranks; not collective.

        Each matrix has its name and whole shape, the tensor that is stepped, which has a momentum, and which of its
        numbers, flattened. `held` says what any rank holds of a name, the same on all.
        """
        self._world, self._held = world, held
        for name, shape, owner, numbers in tensors:
            local, begin = held(name, world.rank), numbers.start or 0  # the slice may end in padding
            own = slice(begin, begin + local.stop - local.start)
            self._matrices.setdefault(id(owner), []).append(_Matrix(name, shape, owner, own, local.copy == 0))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all tensors of `param_groups` that have a gradient; collective."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        todo = [
            (group, matrix)
            for group in groups
            if group["muon"]
            for owner in group["params"]
            if owner.grad is not None
            for matrix in self._matrices.get(id(owner), ())
        ]
        # In one order on all ranks; those of a round take about as long.
        todo.sort(key=lambda one: (-one[1].shape.numel(), one[1].name))
        size = 1 if self._world is None else self._world.size
        for first in range(0, len(todo), size):
            some = todo[first : first + size]
            moves = self._round([matrix for _, matrix in some])
            for (group, matrix), move in zip(some, moves, strict=True):
                weight = flat(matrix.owner)[matrix.numbers]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(move.to(weight.device), alpha=group["lr"] * _RMS * max(matrix.shape) ** 0.5)

    def _round(self, matrices: list[_Matrix]) -> list[Tensor]:
        """This rank's numbers of the directions of some matrices, at most one a rank; updates their momentum."""
        assert self._world is not None
        world, rank = self._world, self._world.rank
        momenta = [self._look_ahead(matrix) for matrix in matrices]
        if world.size == 1:
            return [self._direction(matrix, [numbers])[0] for matrix, numbers in zip(matrices, momenta, strict=True)]
        none = momenta[0][:0]
        sent = [numbers if matrix.first else none for matrix, numbers in zip(matrices, momenta, strict=True)]
        mine = matrices[rank] if rank < len(matrices) else None
        coming = [0] * world.size
        if mine is not None:
            coming = [0 if one.copy else one.stop - one.start for one in self._parts_of(mine)]
        received = _exchange(sent + [none] * (world.size - len(sent)), coming)
        answers = [none] * world.size if mine is None else self._direction(mine, received)
        return _exchange(answers, [len(numbers) for numbers in momenta] + [0] * (world.size - len(momenta)))[
            : len(momenta)
        ]

    def _parts_of(self, matrix: _Matrix) -> list[Held]:
        """What each rank holds of a matrix that this one computes; raises RuntimeError where that is not just all."""
        assert self._world is not None and self._held is not None
        if matrix.name not in self._parts:
            parts = [self._held(matrix.name, rank) for rank in range(self._world.size)]
            if sum(part.stop - part.start for part in parts if not part.copy) != matrix.shape.numel():
                raise RuntimeError(f"ranks do not hold every number of {matrix.name} once: use optimizer.name=adamw")
            self._parts[matrix.name] = parts
        return self._parts[matrix.name]

    def _look_ahead(self, matrix: _Matrix) -> Tensor:
        """Take the gradient into the momentum; this rank's numbers of what is orthogonalised, on the device."""
        assert matrix.owner.grad is not None and self._world is not None
        gradient = flat(matrix.owner.grad)[matrix.numbers]
        momentum = flat(self.state[matrix.owner][MOMENTUM])[matrix.numbers]
        momentum.lerp_(gradient, 1 - self._momentum)
        return gradient.lerp(momentum, self._momentum).to(self._world.device)

    def _direction(self, matrix: _Matrix, received: list[Tensor]) -> list[Tensor]:
        """From the numbers that each rank has sent, those of the whole matrix's direction that each rank steps."""
        parts, held = dict[Shard, Tensor](), self._parts_of(matrix)
        for one, numbers in zip(held, received, strict=True):
            if len(numbers):
                part = parts.setdefault(one.shard, numbers.new_empty(one.shard.numel))
                part[one.start : one.stop] = numbers
        whole = received[0].new_empty(matrix.shape)
        for shard, part in parts.items():
            shard.of(whole).copy_(part.view(shard.sizes))
        move = orthogonalise(whole, self._dtype)
        flattened = {shard: shard.of(move).reshape(-1) for shard in dict.fromkeys(one.shard for one in held)}
        wanted = [(one.shard, one.start, one.stop) for one in held]  # of copies, the same
        pieces = {one: flattened[one[0]][one[1] : one[2]] for one in dict.fromkeys(wanted)}
        return [pieces[one] for one in wanted]


def _exchange(sent: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Send each rank a 1-D tensor, and receive so many numbers from each; collective."""
    received = sent[0].new_empty(sum(counts))
    dist.all_to_all_single(received, torch.cat(sent), counts, [len(numbers) for numbers in sent])
    return list(received.split(counts))
