"""Documents that share a row: where a block forgets what came before, and which keys a query does not see.

Chunks are the row's: a document that begins inside a chunk has its first chunk border where the row has it, and sees
in that chunk, and counts, its own tokens only.

Legend: B batch, L new tokens, C chunk, K chunks, M remembered keys of the open chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.model.cache import MegaCache
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.slots import leading_pads
from mega_scale.ops.attention import ChunkDocuments
from mega_scale.ops.tracing import any_length, in_memory

DOCUMENT_KEYS = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class DocumentBorders:
    """What blocks need to keep documents apart; no tuple, so that engines hand it on as it is.

    Args:
        starts: (B, L) bool, true where a document begins.
        chunks: of the keys as attention lays them out, (B, K, C), or (B, 1, remembered + L) where one chunk has all.
    """

    starts: Tensor
    chunks: ChunkDocuments

    def between(self, begin: int, end: int) -> "DocumentBorders":
        """Of the tokens from `begin` to before `end`, where chunks begin; of rows without remembered keys."""
        chunk = self.chunks.numbers.shape[2]
        numbers = self.chunks.numbers[:, begin // chunk : -(-end // chunk)]
        # One chunk of a few tokens is no wider than they are.
        numbers = numbers[..., : end - begin] if end - begin < chunk else numbers
        return DocumentBorders(self.starts[:, begin:end], ChunkDocuments.of(numbers))


def said_starts(
    starts: Tensor | None,
    extras: Mapping[str, Any],
    mask: Tensor | None,
    pads: Tensor | None,
    cache: MegaCache | None,
    x: Tensor,
) -> Tensor | None:
    """Where documents begin, by `document_starts` and by what transformers' flattened batches say (`DOCUMENT_KEYS`).

    Args:
        starts: (B, L) bool, true where a document begins; none: not given.
        extras: keyword arguments, see `MegaModel`.
        mask: (B, at least L) bool, true for valid columns; none where all are.
        pads: padding before each row's first token, (B,); none where no row has any.
        cache: of the tokens before.
        x: the new tokens, (B, L, D).

    Returns:
        (B, L) bool; none where every row holds, or goes on with, one document.

    Raises:
        ValueError: values of another shape or meaning, or that contradict each other.
    """
    given = {key: extras[key] for key in DOCUMENT_KEYS if extras.get(key) is not None}
    if not given:
        return starts
    row = _Rows.of(mask, pads, 0 if cache is None else cache.get_seq_length(), x)
    said = {} if starts is None else {"document_starts": _checked_starts(starts, x)}
    for key, value in given.items():
        if key == "position_ids":
            said[key] = row.restarts(row.of_tokens(key, value))
        elif key == "seq_idx":
            row.refuse_cache(key)
            numbers = row.of_tokens(key, value)
            said[key] = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
        elif key.startswith("cu_"):
            row.refuse_cache(key)
            said[key] = row.spans(key, torch.as_tensor(value, device=x.device))
    inner = {key: value & row.inner for key, value in said.items()}
    first = next(iter(inner.values()), torch.zeros_like(row.inner))
    if not in_memory(first):
        return first if starts is None else starts
    for key, value in inner.items():
        if not torch.equal(value, first):
            raise ValueError(f"{key} and {next(iter(inner))} say that documents begin at different tokens: give one")
    row.check_lengths(first, given)
    if starts is not None:
        return starts
    return first if bool(first.any()) else None


@dataclass(frozen=True)
class _Rows:
    """New tokens among those of their rows.

    Args:
        valid: (B, L) bool.
        inner: valid, and not the first valid token of its row.
        column: number of columns since the row's first valid token, (B, L).
        seen: columns before.
    """

    valid: Tensor
    inner: Tensor
    column: Tensor
    seen: int

    @classmethod
    def of(cls, mask: Tensor | None, pads: Tensor | None, seen: int, x: Tensor) -> "_Rows":
        batch, length = x.shape[:2]
        valid = x.new_ones(batch, length, dtype=torch.bool) if mask is None else mask[:, -length:]
        if pads is None:
            pads = torch.zeros(batch, dtype=torch.long, device=x.device) if seen else leading_pads(valid)
        column = seen + torch.arange(length, device=x.device) - pads[:, None]
        return cls(valid, valid & (column > 0), column, seen)

    def of_tokens(self, key: str, value: Tensor) -> Tensor:
        batch, length = self.valid.shape
        if (
            value.dim() != 2
            or value.shape[0] not in (1, batch)
            or value.shape[1] != length
            or value.is_floating_point()
            or value.dtype == torch.bool
        ):
            shape = tuple(value.shape)
            raise ValueError(f"{key} is {value.dtype} {shape}: expected integers {(batch, length)}, one a token")
        return value.to(self.valid.device, torch.long).expand(batch, -1)

    def refuse_cache(self, key: str) -> None:
        if self.seen:
            raise ValueError(f"{key} does not say whether a cached row goes on with its document: use document_starts")

    def restarts(self, positions: Tensor) -> Tensor:
        """Where positions (B, L) begin again at 0; from one token to the next they count up by one."""
        before = F.pad(positions[:, :-1], (1, 0), value=-1)
        follows = F.pad(self.valid[:, :-1], (1, 0), value=False)
        # After padding inside a row, and after cached tokens, any position that so many columns can have.
        counted = torch.where(follows, positions == before + 1, (positions > 0) & (positions <= self.column))
        wrong = self.valid & (positions != 0) & ~counted
        if in_memory(wrong) and bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"position_ids{place} is {positions[tuple(place)]}: they count up by one from 0 in every document; "
                "Mega knows no other positions, so leave them out"
            )
        return positions == 0

    def spans(self, key: str, ends: Tensor) -> Tensor:
        """Starts (B, L) of the documents that `ends` (documents + 1,) bound in the flattened batch."""
        total = self.valid.numel()
        if ends.dim() != 1 or ends.is_floating_point() or not ends.numel():
            raise ValueError(f"{key} is {ends.dtype} {tuple(ends.shape)}: expected integers (documents + 1,)")
        ends = ends.long()
        if in_memory(ends) and not bool((ends[0] == 0) & (ends[-1] == total) & (ends.diff() >= 0).all()):
            raise ValueError(f"{key} must rise from 0 to the {total} tokens of the batch")
        marks = torch.zeros(total + 1, dtype=torch.bool, device=ends.device).index_fill(0, ends, True)
        starts = marks[:-1].view(self.valid.shape)
        if in_memory(starts) and not bool(starts[:, 0].all()):
            raise ValueError(f"{key} has a document that goes on from one row into the next")
        return starts

    def check_lengths(self, starts: Tensor, given: Mapping[str, Any]) -> None:
        """Refuse a document that is longer than `max_length_q` or `max_length_k` says."""
        if self.seen or not starts.numel() or not bool(self.valid.all()):
            return
        begins = F.pad(starts[:, 1:], (1, 0), value=True).flatten().nonzero()[:, 0]
        longest = int(F.pad(begins, (0, 1), value=starts.numel()).diff().max())
        for key in ("max_length_q", "max_length_k"):
            if int(given.get(key, longest)) < longest:
                raise ValueError(f"{key}={int(given[key])} is less than the {longest} tokens of the longest document")


def _checked_starts(starts: Tensor, x: Tensor) -> Tensor:
    shape = tuple(x.shape[:2])
    if starts.dtype != torch.bool or starts.shape != shape:
        raise ValueError(
            f"document_starts is {starts.dtype} {tuple(starts.shape)}: expected bool {shape}, one for each new token"
        )
    return starts


def document_borders(
    starts: Tensor | None, config: MegaConfig, cache: MegaCache | None, pads: Tensor | None, x: Tensor
) -> DocumentBorders | None:
    """Lay out the documents of new tokens as attention lays out its keys, and note in the cache what goes on.

    Args:
        starts: (B, L) bool, true where a document begins; none: nowhere.
        config: of the model.
        cache: of the tokens before; changed in place.
        pads: padding before each row's first token, which documents exclude; none where no row has any.
        x: the new tokens, (B, L, D).

    Returns:
        What blocks need; none where every row holds one document.

    Raises:
        ValueError: the starts do not fit x, or the model or the batch cannot keep documents apart.
    """
    shape = tuple(x.shape[:2])
    if starts is None:
        if cache is None or cache.documents is None:
            return None
        starts = torch.zeros(shape, dtype=torch.bool, device=x.device)
    _checked_starts(starts, x)
    if pads is not None:
        raise ValueError("document_starts with rows that are padded on the left: pad rows on the right")
    if config.truncation is not None or config.add_cross_attention:
        key = "add_cross_attention" if config.truncation is None else "truncation"
        raise ValueError(
            f"document_starts with {key}={getattr(config, key)}: a truncated moving average cannot begin anew inside a "
            "row, and an encoder's output belongs to a whole row; give each document a row"
        )
    chunk = config.chunk_size if config.use_chunking else None
    numbers = starts.cumsum(1)
    if cache is not None:
        seen = cache.get_seq_length()
        remembered = cache.documents
        if remembered is None:
            remembered = numbers.new_zeros(shape[0], seen % chunk if chunk else seen)
        before = remembered[:, -1:] if remembered.shape[1] else 0
        numbers = torch.cat([remembered, numbers + before], 1)
        kept = numbers if chunk is None else numbers[:, numbers.shape[1] // chunk * chunk :]
        cache.documents = kept if not in_memory(kept) or bool((kept != kept[:, -1:]).any()) else None
    return DocumentBorders(starts, ChunkDocuments.of(_in_chunks(numbers, chunk)))


def _in_chunks(numbers: Tensor, chunk: int | None) -> Tensor:
    """Numbers (B, M + L) as attention lays out keys, (B, K, C); what fills the last chunk is of its last document."""
    total = numbers.shape[1]
    if chunk is None or (not any_length() and total <= chunk):
        return numbers[:, None]
    return torch.cat([numbers, numbers[:, -1:].expand(-1, -total % chunk)], 1).unflatten(1, (-1, chunk))
