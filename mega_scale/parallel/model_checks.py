"""Models and lengths that cannot be spread over tensor- or sequence-parallel ranks."""

from math import gcd
from typing import Any, NamedTuple

from mega_scale.parallel.mesh import multiples


class _Rule(NamedTuple):
    broken: bool
    setting: str
    why: str
    remedy: str


def check_tensor_parallel(model: Any, tp: int) -> None:
    """Refuse a model whose channels cannot be shared.

    Args:
        model: a MegaConfig, or the `model` section of a run, which has its keys.
        tp: ranks that share the channels of every layer.

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
    why = "what attends to an encoder is not spread over ranks"
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
