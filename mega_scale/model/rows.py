"""What a call says of the rows of a batch: masks, left padding, and documents that share a row.

Legend: B batch, L new tokens, D channels, C chunk, K chunks, S encoder length, T slots, W any width, M columns of the
attention mask, or remembered ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.model.cache import MegaCache
from mega_scale.ops import ANY_LENGTH, chunk_count, in_memory, tracing
from mega_scale.ops.attention import ChunkDocuments


class LeftPadding(NamedTuple):
    """Left-padded rows, moved so that each has its first token at the start of a chunk.

    Slot 0 is the first position of the chunk that is open before the new tokens; slots before `shift` are remembered.
    """

    shift: Tensor  # slot of the first new token, (B,); negative while a row is still padding
    width: int  # T, slots
    length: int  # L, new tokens

    @classmethod
    def lay(cls, pads: Tensor, seen: int | Tensor, remembered: int, length: int, chunk: int | None) -> "LeftPadding":
        """Lay out L tokens after `seen` columns, where `pads` (B,) columns come before each row's first token.

        Without chunks all `seen` columns are remembered; with them, any number says that there is an open chunk.
        """
        shift = seen - pads
        if chunk is None:
            return cls(shift, remembered + length, length)
        most = length + (chunk - 1 if remembered else 0)
        one = tracing() not in ANY_LENGTH and most <= chunk
        width = most if one else chunk_count(most, chunk) * chunk
        return cls(shift - shift.clamp(min=0) // chunk * chunk, width, length)

    def _slot(self) -> Tensor:
        return torch.arange(self.width, device=self.shift.device)

    def in_slots(self, new: Tensor, old: Tensor | None = None) -> Tensor:
        """Queries, keys or values (B, L, W), and remembered ones (B, .., W), in their slots, (B, T, W).

        Other slots hold something finite.
        """
        slot, shift = self._slot(), self.shift[:, None]
        source = (slot - shift).clamp(0, self.length - 1)
        if old is not None:
            source = torch.where(slot < shift, slot, old.shape[1] + source)
            new = torch.cat([old, new], 1)
        return _take(new, source)

    def valid(self, mask: Tensor | None) -> Tensor:
        """Which slots hold a valid key, (B, T) bool; mask (B, M) marks valid ones of the last M columns."""
        token = self._slot() - self.shift[:, None]
        valid = token < self.length
        if mask is not None:
            column = token + mask.shape[1] - self.length
            valid = valid & (mask.gather(1, column.clamp(0, mask.shape[1] - 1)) | (column < 0))
        return valid

    def _new_slots(self) -> Tensor:
        """Slots of the new tokens, (B, L), padding at slot 0."""
        tokens = torch.arange(self.length, device=self.shift.device)
        return (self.shift[:, None] + tokens).clamp(0, self.width - 1)

    def out_of_slots(self, slots: Tensor) -> Tensor:
        """What lies in the slots of the new tokens: (B, T, W) to (B, L, W); padding gets something finite."""
        return _take(slots, self._new_slots())

    def by_column(self, weights: Tensor) -> Tensor:
        """Weights of an unchunked model, (B, 1, I, T) by slots, as (B, 1, L, T) by rows and columns of the input."""
        # The slot of each column, negative for padding.
        slot = self._slot() - (self.width - self.length - self.shift)[:, None]
        if weights.shape[2] > 1:
            weights = weights.gather(2, self._new_slots()[:, None, :, None].expand(-1, 1, -1, self.width))
        source = slot.clamp(min=0)[:, None, None].expand(-1, 1, weights.shape[2], -1)
        return weights.gather(3, source).masked_fill((slot < 0)[:, None, None], 0.0)

    def open_chunk(self, slots: Tensor, chunk: int) -> Tensor:
        """Keys or values (B, T, W) of the chunk that is open after the new tokens, in their places, (B, C, W)."""
        begin = (self.shift + self.length).clamp(min=0) // chunk * chunk
        source = begin[:, None] + torch.arange(chunk, device=slots.device)
        return _take(slots, source.clamp(max=self.width - 1))


def _take(source: Tensor, index: Tensor) -> Tensor:
    return source.gather(1, index[..., None].expand(-1, -1, source.shape[2]))


# Masks


def leading_pads(mask: Tensor) -> Tensor:
    """Masked positions before the first valid one of each row, all of a row of padding: (B, M) bool to (B,) int64."""
    return torch.where(mask.any(1), mask.int().argmax(1), mask.shape[1])


def _checked_mask(mask: Tensor, name: str, batch: int, *lengths: int) -> Tensor:
    """A mask (B, one of `lengths`) of 0 and 1, of any dtype, as bool."""
    if tuple(mask.shape) not in [(batch, length) for length in lengths]:
        expected = " or ".join(str((batch, length)) for length in dict.fromkeys(lengths))
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: expected (batch, length), here {expected}")
    valid = mask != 0
    if mask.dtype != torch.bool and in_memory(mask) and bool((valid & (mask != 1)).any()):
        raise ValueError(f"{name} holds numbers other than 0 and 1: give 1 for tokens and 0 for padding")
    return valid


def encoder_mask(
    attention_mask: Tensor | None, encoder_hidden_states: Tensor | None, cache: MegaCache | None, x: Tensor
) -> Tensor | None:
    """The mask of the encoder's output, (B, S) bool; with a cache, the one that came before where none is given."""
    known = None if cache is None else cache.states[0].encoder
    source = encoder_hidden_states if known is None else known[0]
    if source is None:
        raise ValueError("add_cross_attention=True needs encoder_hidden_states (batch, length, hidden_size)")
    batch, length, channels = x.shape[0], source.shape[1], x.shape[2]
    if encoder_hidden_states is not None and tuple(encoder_hidden_states.shape) != (batch, length, channels):
        shape = tuple(encoder_hidden_states.shape)
        raise ValueError(f"encoder_hidden_states has shape {shape}: expected {(batch, length, channels)}")
    if attention_mask is None:
        return None if cache is None else cache.encoder_mask
    mask = _checked_mask(attention_mask.to(x.device), "encoder_attention_mask", batch, length)
    if cache is not None:
        cache.encoder_mask = mask
    return mask


def read_rows(
    attention_mask: Tensor | None,
    document_starts: Tensor | None,
    extras: Mapping[str, Any],
    cache: MegaCache | None,
    x: Tensor,
    *,
    chunk: int | None,
    positional: bool,
) -> tuple[Tensor | None, Tensor | None, "DocumentBorders | None"]:
    """Join what a call says of its rows x (B, L, D) to what the cache remembers of those before, and note it there.

    The other arguments are those of the model, `extras` the `DOCUMENT_KEYS` among them; `chunk` is C, none without
    chunks; `positional` says whether padding before a row's first token moves what is computed. Returns (B, M + L)
    bool, true for valid columns, none where all are; padding before each row's first token, (B,) int64, none where no
    row has any or it moves nothing; documents, none where every row holds one.
    """
    shape = tuple(x.shape[:2])
    if document_starts is not None and (document_starts.dtype != torch.bool or document_starts.shape != shape):
        raise ValueError(
            f"document_starts is {document_starts.dtype} {tuple(document_starts.shape)}: expected bool {shape}, "
            "one for each new token"
        )
    if cache is not None and (read := cache.read_token(attention_mask, document_starts, extras, x)) is not None:
        return read
    mask, pads = _mask_and_pads(attention_mask, chunk, positional, cache, x)
    if extras:
        document_starts = _document_starts(document_starts, extras, mask, pads, cache, x)
    if document_starts is None and cache is not None and cache.documents is not None:
        document_starts = x.new_zeros(shape, dtype=torch.bool)
    borders = None if document_starts is None else _document_borders(document_starts, chunk, cache, pads)
    if cache is not None:
        cache.pads, cache.mask = pads, mask
        # An exporter would keep whether there are more columns than these.
        if mask is not None and chunk is not None and not torch.compiler.is_exporting():
            cache.mask = mask[:, -chunk:].clone()  # no view, which would keep all of it
    return mask, pads, borders


def _mask_and_pads(
    attention_mask: Tensor | None, chunk: int | None, positional: bool, cache: MegaCache | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    batch, length = x.shape[:2]
    seen: Any = 0 if cache is None else cache.get_seq_length()
    # Nobody knows how many columns come before a program that is being exported: a mask of another length than the new
    # tokens is of all columns.
    exporting = isinstance(seen, Tensor)
    mask, before, pads = None, None, None
    if cache is not None:
        before, pads = cache.mask, cache.pads
    if attention_mask is not None and exporting:
        mask = attention_mask != 0
        if mask.shape[1] != length:
            return mask, leading_pads(mask)
    elif attention_mask is not None:
        mask = _checked_mask(attention_mask.to(x.device), "attention_mask", batch, length, seen + length)
    if pads is None and (exporting or (cache is not None and mask is None and torch.compiler.is_compiling())):
        # Positions then live in tensors, and one graph serves every place in the chunk.
        pads = torch.zeros(batch, dtype=torch.long, device=x.device)
    if not exporting and not seen:
        if mask is not None and positional:
            pads = leading_pads(mask) if not in_memory(mask) or not bool(mask[:, 0].all()) else None
        return mask, pads
    if mask is None:
        if before is None:
            return None, pads
        mask = x.new_ones(batch, length, dtype=torch.bool)
    if before is None and not exporting:
        before = mask.new_ones(batch, seen if chunk is None else min(seen, chunk))
    if before is not None and mask.shape[1] > length:
        past, mask = mask[:, :-length], mask[:, -length:]
        if in_memory(past):
            same = bool((leading_pads(past) == (0 if pads is None else pads)).all())
            if not same or not torch.equal(past[:, past.shape[1] - before.shape[1] :], before):
                raise ValueError(
                    "attention_mask says of cached tokens something else than the masks with which they came: pass "
                    "those again before the mask of the new tokens, or the mask of the new tokens alone"
                )
    if pads is not None:  # a row may have been padding only until now
        pads = torch.where(pads >= seen, seen + leading_pads(mask), pads)
    return mask if before is None else torch.cat([before, mask], 1), pads


# Documents


@dataclass(frozen=True)
class DocumentBorders:
    """What blocks need to keep documents apart; no tuple, so that engines hand it on as it is."""

    starts: Tensor  # (B, L) bool, true where a document begins
    chunks: ChunkDocuments  # of keys as attention lays them out, (B, K, C), or (B, 1, remembered + L) in one chunk

    def between(self, begin: int, end: int) -> "DocumentBorders":
        """Of the tokens from `begin` to before `end`, where chunks begin; of rows without remembered keys."""
        chunk = self.chunks.numbers.shape[2]
        numbers = self.chunks.numbers[:, begin // chunk : -(-end // chunk)]
        # One chunk of a few tokens is no wider than they are.
        numbers = numbers[..., : end - begin] if end - begin < chunk else numbers
        return DocumentBorders(self.starts[:, begin:end], ChunkDocuments.of(numbers))


def _document_starts(
    starts: Tensor | None,
    given: Mapping[str, Any],
    mask: Tensor | None,
    pads: Tensor | None,
    cache: MegaCache | None,
    x: Tensor,
) -> Tensor | None:
    """Where documents begin, (B, L) bool, by all that says so; none where every row holds, or goes on with, one."""
    seen = 0 if cache is None else cache.get_seq_length()
    batch, length = x.shape[:2]
    valid = x.new_ones(batch, length, dtype=torch.bool) if mask is None else mask[:, -length:]
    if pads is None:
        pads = torch.zeros(batch, dtype=torch.long, device=x.device) if seen else leading_pads(valid)
    # Columns since the row's first valid token, which begins its first document whatever is said.
    column = seen + torch.arange(length, device=x.device) - pads[:, None]
    inner = valid & (column > 0)
    found = {} if starts is None else {"document_starts": starts & inner}
    for key, value in given.items():
        if key.startswith("max_"):
            continue
        if key != "position_ids" and seen:
            raise ValueError(f"{key} does not say whether a cached row goes on with its document: use document_starts")
        if key.startswith("cu_"):
            found[key] = _starts_of_spans(key, torch.as_tensor(value, device=x.device), valid) & inner
            continue
        shape = tuple(value.shape)
        one_each = shape in ((batch, length), (1, length))
        if not one_each or value.is_floating_point() or value.dtype == torch.bool:
            raise ValueError(f"{key} is {value.dtype} {shape}: expected integers {(batch, length)}, one a token")
        numbers = value.to(x.device, torch.long).expand(batch, -1)
        if key == "position_ids":
            _check_positions(numbers, valid, column)
            found[key] = (numbers == 0) & inner
        else:
            found[key] = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True) & inner
    name, first = next(iter(found.items()), ("", torch.zeros_like(inner)))
    if not in_memory(first):
        return first if starts is None else starts
    for key, value in found.items():
        if not torch.equal(value, first):
            raise ValueError(f"{key} and {name} say that documents begin at different tokens: give one")
    if not seen and first.numel() and bool(valid.all()):
        begins = F.pad(first[:, 1:], (1, 0), value=True).flatten().nonzero()[:, 0]
        longest = int(F.pad(begins, (0, 1), value=first.numel()).diff().max())
        for key in ("max_length_q", "max_length_k"):
            if int(given.get(key, longest)) < longest:
                raise ValueError(f"{key}={int(given[key])} is less than the {longest} tokens of the longest document")
    if starts is not None:
        return starts
    return first if bool(first.any()) else None


def _check_positions(positions: Tensor, valid: Tensor, column: Tensor) -> None:
    """Refuse positions (B, L) that do not count up by one from token to token, or begin again at 0."""
    before = F.pad(positions[:, :-1], (1, 0), value=-1)
    follows = F.pad(valid[:, :-1], (1, 0), value=False)
    # After padding inside a row, and after cached tokens, any position that so many columns can have.
    counted = torch.where(follows, positions == before + 1, (positions > 0) & (positions <= column))
    wrong = valid & (positions != 0) & ~counted
    if in_memory(wrong) and bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids{place} is {positions[tuple(place)]}: they count up by one from 0 in every document; "
            "the model knows no other positions, so leave them out"
        )


def _starts_of_spans(key: str, ends: Tensor, valid: Tensor) -> Tensor:
    """Starts (B, L) of the documents that `ends` (documents + 1,) bound in the flattened batch."""
    total = valid.numel()
    if ends.dim() != 1 or ends.is_floating_point() or not ends.numel():
        raise ValueError(f"{key} is {ends.dtype} {tuple(ends.shape)}: expected integers (documents + 1,)")
    ends = ends.long()
    if in_memory(ends) and not bool((ends[0] == 0) & (ends[-1] == total) & (ends.diff() >= 0).all()):
        raise ValueError(f"{key} must rise from 0 to the {total} tokens of the batch")
    marks = torch.zeros(total + 1, dtype=torch.bool, device=ends.device).index_fill(0, ends, True)
    starts = marks[:-1].view(valid.shape)
    if in_memory(starts) and not bool(starts[:, 0].all()):
        raise ValueError(f"{key} has a document that goes on from one row into the next")
    return starts


def _document_borders(
    starts: Tensor, chunk: int | None, cache: MegaCache | None, pads: Tensor | None
) -> DocumentBorders:
    """Lay out the documents of new tokens as attention lays out its keys, and note in the cache what goes on."""
    if pads is not None:
        raise ValueError("document_starts with rows that are padded on the left: pad rows on the right")
    numbers = starts.cumsum(1)
    if cache is not None:
        seen, remembered = cache.get_seq_length(), cache.documents
        if remembered is None:
            remembered = numbers.new_zeros(len(numbers), seen % chunk if chunk else seen)
        before = remembered[:, -1:] if remembered.shape[1] else 0
        numbers = torch.cat([remembered, numbers + before], 1)
        kept = numbers if chunk is None else numbers[:, numbers.shape[1] // chunk * chunk :]
        cache.documents = kept if not in_memory(kept) or bool((kept != kept[:, -1:]).any()) else None
    total = numbers.shape[1]
    if chunk is None or (tracing() not in ANY_LENGTH and total <= chunk):
        return DocumentBorders(starts, ChunkDocuments.of(numbers[:, None]))
    # What fills the last chunk is of its last document.
    numbers = torch.cat([numbers, numbers[:, -1:].expand(-1, -total % chunk)], 1).unflatten(1, (-1, chunk))
    return DocumentBorders(starts, ChunkDocuments.of(numbers))
