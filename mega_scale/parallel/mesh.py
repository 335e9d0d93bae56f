"""The device mesh as arithmetic: how many ranks stand along each axis, and where one rank stands; starts nothing."""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple, NoReturn

# Outermost to innermost: tp ranks are neighbours, so they share a host.
AXES = ("dp_replicate", "dp_shard", "sp", "tp")


class Coordinates(NamedTuple):
    """The index of a rank along each axis, 0 to below the axis's size."""

    dp_replicate: int
    dp_shard: int
    sp: int
    tp: int


class MeshShape(NamedTuple):
    """The number of ranks along each axis; ranks are numbered row-major over AXES, tp fastest.

    Args:
        dp_replicate: copies of the sharded model.
        dp_shard: ranks of a copy that read different rows.
        sp: ranks that share one sequence.
        tp: ranks that share the channels of every layer.
    """

    dp_replicate: int
    dp_shard: int
    sp: int
    tp: int

    @classmethod
    def resolve(
        cls, world_size: int, *, dp_replicate: int = 1, dp_shard: int = -1, sp: int = 1, tp: int = 1
    ) -> "MeshShape":
        """Lay all ranks of a run out on the axes.

        Args:
            world_size: ranks of the run.
            dp_replicate: as `parallel.dp_replicate`.
            dp_shard: as `parallel.dp_shard`; -1 takes what the other axes leave.
            sp: as `parallel.sp`.
            tp: as `parallel.tp`.

        Returns:
            A shape of `world_size` ranks.

        Raises:
            ValueError: a size is impossible, or the axes do not hold all ranks; names keys, values and what would work.
        """
        asked = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "sp": sp, "tp": tp}
        for axis, size in asked.items():
            if size < 1 and (axis, size) != ("dp_shard", -1):
                rest = ", or parallel.dp_shard=-1 for what the other axes leave" if axis == "dp_shard" else ""
                raise ValueError(f"parallel.{axis}={size} is no number of ranks: use parallel.{axis}=1 or more{rest}")
        fixed = {axis: size for axis, size in asked.items() if size != -1}
        taken = prod(fixed.values())
        if world_size % taken or (dp_shard != -1 and taken != world_size):
            _refuse(fixed, world_size)
        return cls(dp_replicate, world_size // (dp_replicate * sp * tp), sp, tp)

    @property
    def size(self) -> int:
        """All ranks."""
        return prod(self)

    @property
    def dp(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks over which the parameters of one copy are sharded."""
        return self.dp_shard * self.sp

    def coordinates(self, rank: int) -> Coordinates:
        """Find where a rank stands.

        Args:
            rank: 0 to size - 1.

        Returns:
            Its index along each axis.
        """
        assert 0 <= rank < self.size, f"rank {rank} of {self.size}"
        indices = []
        for size in reversed(self):
            rank, index = divmod(rank, size)
            indices.append(index)
        return Coordinates(*reversed(indices))

    def dp_rank(self, rank: int) -> int:
        """Number a rank among those that read different rows.

        Args:
            rank: 0 to size - 1.

        Returns:
            0 to dp - 1, the same for all ranks that read the same rows.
        """
        at = self.coordinates(rank)
        return at.dp_replicate * self.dp_shard + at.dp_shard

    def lines(self, axis: str) -> list[list[int]]:
        """List the ranks that differ along one axis only.

        Args:
            axis: one of AXES.

        Returns:
            One list of ranks, in the order of their index along the axis, for every place on the other axes.
        """
        found: dict[Coordinates, list[int]] = {}
        for rank in range(self.size):
            found.setdefault(self.coordinates(rank)._replace(**{axis: 0}), []).append(rank)
        return list(found.values())


def divisors(number: int) -> list[int]:
    """List what divides a number, ascending.

    Args:
        number: at least 1.

    Returns:
        1 to number.
    """
    return [value for value in range(1, number + 1) if number % value == 0]


def nearest(values: Iterable[int], wanted: int, count: int = 2) -> str:
    """Name the values closest to one that is impossible, for the remedy in a refusal.

    Args:
        values: possible values, at least one.
        wanted: the impossible one.
        count: how many to name at most.

    Returns:
        As in "2 or 4", ascending.
    """
    closest = sorted(set(values), key=lambda value: abs(value - wanted))[:count]
    return " or ".join(str(value) for value in sorted(closest))


def multiples(unit: int, wanted: int) -> str:
    """Name the multiples of a number just below and above an impossible value, for the remedy in a refusal.

    Args:
        unit: at least 1.
        wanted: the impossible value.

    Returns:
        As in "16 or 32", ascending and above 0.
    """
    return nearest([max(wanted // unit, 1) * unit, -(-wanted // unit) * unit], wanted)


def _refuse(fixed: dict[str, int], world_size: int) -> NoReturn:
    """Say which of the axes that have a size could have another, or how many processes would fill them."""
    names = " x ".join(f"parallel.{axis}={size}" for axis, size in fixed.items())
    taken = prod(fixed.values())
    others = {axis: size for axis, size in fixed.items() if axis != "dp_shard"}
    inner = prod(others.values())
    remedies = []
    if world_size % inner == 0:
        remedies.append(f"use parallel.dp_shard={world_size // inner}, or parallel.dp_shard=-1")
    else:
        also = "parallel.dp_shard=-1 with " if "dp_shard" in fixed else ""
        for axis, size in others.items():
            beside = inner // size
            if size > 1 and world_size % beside == 0:
                remedies.append(f"use {also}parallel.{axis}={nearest(divisors(world_size // beside), size)}")
    if "dp_shard" in fixed:
        relation, processes = "is not the number of processes", str(taken)
    else:
        relation, processes = "does not divide the number of processes", multiples(taken, world_size)
    remedies.append(f"start {processes} processes")
    raise ValueError(f"{names} = {taken} {relation}, {world_size}: {', or '.join(remedies)}")
