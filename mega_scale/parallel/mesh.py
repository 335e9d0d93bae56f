"""The device mesh as arithmetic: ranks along each dimension, and which models and lengths fit; starts nothing."""

from collections.abc import Iterable
from math import gcd, prod
from typing import Any, NamedTuple, NoReturn

# Outermost to innermost: tp ranks are neighbours, so they share a host.
AXES = ("dp_replicate", "dp_shard", "sp", "tp")


class Coordinates(NamedTuple):
    """The index of a rank along each dimension, 0 to below its size."""

    dp_replicate: int
    dp_shard: int
    sp: int
    tp: int


class MeshShape(NamedTuple):
    """The number of ranks along each dimension; ranks are numbered row-major over AXES, tp fastest.

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
        """Lay all ranks of a run out on the mesh; dp_shard=-1 takes what the other dimensions leave.

        Raises:
            ValueError: a size is impossible, or the mesh does not hold all ranks; names keys, values and what would
                work.
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
        """The index of a rank, 0 to size - 1, along each dimension."""
        assert 0 <= rank < self.size, f"rank {rank} of {self.size}"
        indices = []
        for size in reversed(self):
            rank, index = divmod(rank, size)
            indices.append(index)
        return Coordinates(*reversed(indices))

    def dp_rank(self, rank: int) -> int:
        """The number of a rank among those that read different rows, 0 to dp - 1."""
        at = self.coordinates(rank)
        return at.dp_replicate * self.dp_shard + at.dp_shard

    def lines(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ along one dimension only, each in the order of their index along it."""
        found: dict[Coordinates, list[int]] = {}
        for rank in range(self.size):
            found.setdefault(self.coordinates(rank)._replace(**{axis: 0}), []).append(rank)
        return list(found.values())


def divisors(number: int) -> list[int]:
    """The divisors of a number of at least 1, ascending."""
    return [value for value in range(1, number + 1) if number % value == 0]


def nearest(values: Iterable[int], wanted: int, count: int = 2) -> str:
    """Name the `count` possible values closest to an impossible one, ascending, as in "2 or 4", for a remedy."""
    closest = sorted(set(values), key=lambda value: abs(value - wanted))[:count]
    return " or ".join(str(value) for value in sorted(closest))


def multiples(unit: int, wanted: int) -> str:
    """Name the multiples of `unit` just below and above an impossible value, as in "16 or 32", for a remedy."""
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


class _Rule(NamedTuple):
    broken: bool
    setting: str
    why: str
    remedy: str


def check_tensor_parallel(model: Any, tp: int) -> None:
    """Refuse a model whose channels `tp` ranks cannot share.

    Args:
        model: a MegaConfig, or the `model` section of a run, which has its keys.

    Raises:
        ValueError: names the keys, their values and what would work.
    """
    if tp == 1:
        return
    why = "only the causal moving average shares its channels"
    both_ways = _Rule(model.bidirectional, "model.bidirectional=True", why, "model.bidirectional=false")
    _refuse_broken(f"parallel.tp={tp}", [_norm(model), both_ways, _cross_attention(model)])
    widths = {"hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size}
    if model.use_normalized_ffn:
        widths["nffn_hidden_size"] = model.nffn_hidden_size
    for key, width in widths.items():
        if width % tp:
            raise ValueError(
                f"parallel.tp={tp} does not divide model.{key}={width}: use model.{key}={multiples(tp, width)}, or "
                f"parallel.tp={gcd(tp, *widths.values())}"
            )


def check_sequence_parallel(model: Any, length: int, sp: int) -> None:
    """Refuse a model or a length of which not every rank can have some whole chunks.

    A length that does not fill the ranks is no obstacle: its end is padded.

    Args:
        model: a MegaConfig, or the `model` section of a run, which has its keys.
        length: of one sequence, in tokens.
        sp: ranks that share it.

    Raises:
        ValueError: names the keys, their values and what would work.
    """
    if sp == 1:
        return
    truncation = _truncation(model, "rank to rank")
    unchunked = _Rule(
        not model.use_chunking,
        "model.use_chunking=False",
        "attention would reach over all ranks",
        f"model.use_chunking=true with model.chunk_size={_chunk_that_fits(length, sp, model.max_positions)}",
    )
    _refuse_broken(f"parallel.sp={sp}", [_norm(model), _cross_attention(model), truncation, unchunked])
    if _reaches_last_rank(length, model.chunk_size, sp):
        return
    padded = _share(length, model.chunk_size, sp) * sp
    raise ValueError(
        f"data.sequence_length={length} is too short for parallel.sp={sp} with model.chunk_size={model.chunk_size}: "
        f"the last rank's whole chunks would hold only padding; use data.sequence_length={padded}, or model.chunk_size="
        f"{_chunk_that_fits(length, sp, model.chunk_size)}"
    )


def check_segments(model: Any, segment: int, every: int, sp: int) -> None:
    """Refuse a model whose blocks cannot be computed a segment at a time.

    Args:
        model: a MegaConfig, or the `model` section of a run, which has its keys.
        segment: tokens; 0 for whole rows.
        every: which blocks are recomputed, 0 for none.
        sp: ranks that share a row.

    Raises:
        ValueError: names the keys, their values and what would work.
    """
    name = f"parallel.activation_checkpoint_segment={segment}"
    if segment < 0:
        raise ValueError(f"{name} is negative: choose 0 for whole rows, or a multiple of model.chunk_size")
    if segment == 0:
        return
    if every == 0:
        raise ValueError(
            f"{name} with parallel.activation_checkpoint=0: only blocks that are recomputed are computed in segments; "
            "use parallel.activation_checkpoint=1, or parallel.activation_checkpoint_segment=0"
        )
    rules = [
        _norm(model),
        _cross_attention(model),
        _truncation(model, "segment to segment"),
        _Rule(not model.use_chunking, "model.use_chunking=False", "attention would reach over all segments",
              "model.use_chunking=true"),
        _Rule(model.bidirectional, "model.bidirectional=True", "states would cross segments in both directions",
              "model.bidirectional=false"),
        _Rule(sp > 1, f"parallel.sp={sp}", "ranks pass one state for their whole part of a row", "parallel.sp=1"),
    ]  # fmt: skip
    _refuse_broken(name, rules, off=0)
    if segment % model.chunk_size:
        raise ValueError(
            f"{name} is not a multiple of model.chunk_size={model.chunk_size}: "
            f"use {multiples(model.chunk_size, segment)}"
        )


def _refuse_broken(axis: str, rules: list[_Rule], off: int = 1) -> None:
    for rule in rules:
        if rule.broken:
            name = axis.partition("=")[0]
            raise ValueError(f"{axis} with {rule.setting}: {rule.why}; use {rule.remedy}, or {name}={off}")


def _truncation(model: Any, way: str) -> _Rule:
    return _Rule(
        model.truncation is not None,
        f"model.truncation={model.truncation}",
        f"a truncated moving average has no state to pass from {way}",
        "model.truncation=null",
    )


def _norm(model: Any) -> _Rule:
    return _Rule(
        model.normalization_type in ("batchnorm", "syncbatchnorm"),
        f"model.normalization_type={model.normalization_type!r}",
        "its statistics run over the tokens of a batch, which differ between ranks",
        "model.normalization_type=scalenorm, layernorm or rmsnorm",
    )


def _cross_attention(model: Any) -> _Rule:
    why = "what attends to an encoder is not shared by ranks"
    return _Rule(model.add_cross_attention, "model.add_cross_attention=True", why, "model.add_cross_attention=false")


def _share(length: int, chunk: int, sp: int) -> int:
    """Tokens of a rank: the fewest whole chunks with which all ranks hold the sequence."""
    return -(-length // (sp * chunk)) * chunk


def _reaches_last_rank(length: int, chunk: int, sp: int) -> bool:
    return length > (sp - 1) * _share(length, chunk, sp)


def _chunk_that_fits(length: int, sp: int, at_most: int) -> int:
    """Find the longest chunk of which every rank has some tokens; 1 where no chunk is that short."""
    lengths = range(min(at_most, -(-length // sp)), 0, -1)
    return next((chunk for chunk in lengths if _reaches_last_rank(length, chunk, sp)), 1)
