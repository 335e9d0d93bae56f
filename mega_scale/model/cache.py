"""The rows of a batch: what a decoder remembers of them between calls, left padding, and documents that share a row.

Legend: B batch, L new tokens, D channels, N moving averages per channel, C chunk, K chunks, Z width of keys, E width of
values, S encoder length, T slots, M columns of the attention mask, or remembered ones.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin

from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.ops import ANY_LENGTH, chunk_count, in_memory, tracing
from mega_scale.ops.attention import ChunkDocuments

_ROWS = ("mask", "documents", "encoder_mask")  # tensors of a cache that say something of its rows
# What transformers' flattened batches say of documents.
DOCUMENT_KEYS = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(eq=False)
class LayerState:
    """State of one block's self-attention: keys and values are those of the open chunk in their places, of which those
    after the last token are unused; without chunks, all of them."""

    ema: Tensor  # h of the moving average, (B, D, N) fp32
    keys: Tensor  # (B, C, Z), or (B, position, Z)
    values: Tensor  # (B, C, E), or (B, position, E)
    position: int | Tensor  # columns seen, padding included; a tensor without dimensions while a program is exported


class MegaCacheLayer(CacheLayerMixin):
    """One block's states, behind the interface by which `generate()` handles caches."""

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None
        # Keys (B, S, Z) and values (B, S, D) that cross-attention made of the encoder's output.
        self.encoder: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first call of the model makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("a Mega cache is updated by its model with whole states, not with keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        position: Any = 0 if self.state is None else self.state.position
        return position

    def get_max_length(self) -> int:
        return -1  # there is none

    def reset(self) -> None:
        self.state, self.encoder = None, None

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a Mega cache cannot drop tokens: its moving average holds them; start again from an empty cache"
        )

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            state = self.state
            self.state = LayerState(function(state.ema), function(state.keys), function(state.values), state.position)
        if self.encoder is not None:
            self.encoder = function(self.encoder[0]), function(self.encoder[1])


class MegaCache(Cache):
    """One state per block; pass it back as `past_key_values` to go on where the last call ended."""

    def __init__(self, num_hidden_layers: int) -> None:
        self.states = [MegaCacheLayer() for _ in range(num_hidden_layers)]
        # Of the rows; none where no row has any padding, documents or mask.
        self.pads: Tensor | None = None  # padding before each row's first token, (B,) int64
        self.documents: Tensor | None = None  # number of each remembered key's, (B, position in C, or position) int64
        self.mask: Tensor | None = None  # which of the last tokens are valid, (B, position, or at most C) bool
        self.encoder_mask: Tensor | None = None  # which positions of the encoder's output are valid, (B, S) bool
        super().__init__(layers=[*self.states])

    @property
    def is_compileable(self) -> bool:
        """The position is a Python number, so `generate()` does not compile steps by itself."""
        return False

    @property
    def nbytes(self) -> int:
        parts: list[Iterable[Any]] = [vars(layer.state).values() for layer in self.states if layer.state is not None]
        parts += [layer.encoder for layer in self.states if layer.encoder is not None]
        return sum(tensor.nbytes for part in parts for tensor in part if isinstance(tensor, Tensor))

    def reset(self) -> None:
        super().reset()
        self.pads = self.documents = self.mask = self.encoder_mask = None

    def reorder_cache(self, beam_idx: Any) -> None:
        self.apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.apply(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.apply(lambda tensor: tensor[indices])

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what the function makes of it."""
        for layer in self.states:
            layer.apply(function)
        for name in ("pads", *_ROWS):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))


def remember(state: LayerState | None, keys: Tensor, values: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Keys and values to remember after new ones (B, L, Z) and (B, L, E), of rows without padding before them.

    Where the new ones leave the open chunk open, they are written to the state's own tensors, which spares a decoding
    step the copy of a chunk; but a tensor with a gradient must not change.
    """
    if chunk is None:
        if state is None:
            return keys, values
        return torch.cat([state.keys, keys], 1), torch.cat([state.values, values], 1)
    before: Any = 0 if state is None else state.position
    begin = max(0, (before + keys.shape[1]) // chunk * chunk - before)  # the new tokens of the chunk that is open now
    place = (before + begin) % chunk
    kept = []
    olds = (None, None) if state is None else (state.keys, state.values)
    for old, new in zip(olds, (keys, values), strict=True):
        if begin or old is None or not old.shape[1]:
            buffer = new.new_zeros(new.shape[0], chunk, new.shape[2])
        else:
            buffer = old.clone() if torch.is_grad_enabled() else old
        fresh = new[:, begin:]
        buffer[:, place : place + fresh.shape[1]] = fresh
        kept.append(buffer)
    return kept[0], kept[1]


def _flatten_with_keys(cache: MegaCache) -> tuple[list[tuple[pytree.KeyEntry, Any]], dict[str, Any]]:
    """The named tensors of a cache, its position among them, as exporters take them in and give them out."""
    first = cache.states[0]
    rows = [name for name in _ROWS if getattr(cache, name) is not None]
    found: list[tuple[str, Any]] = [(name, getattr(cache, name)) for name in rows]
    if first.state is not None:
        position = first.state.position
        found.append(("position", position if isinstance(position, Tensor) else torch.tensor(position)))
        if cache.documents is None:
            # Always there, as a program takes caches of one structure, and the same tensor each time.
            if cache.pads is None:
                cache.pads = first.state.ema.new_zeros(len(first.state.ema), dtype=torch.long)
            found.append(("pads", cache.pads))
    for number, layer in enumerate(cache.states):
        if layer.state is not None:
            found += [(f"{name}_{number}", getattr(layer.state, name)) for name in ("ema", "keys", "values")]
        if layer.encoder is not None:
            found += zip((f"encoder_keys_{number}", f"encoder_values_{number}"), layer.encoder, strict=True)
    context = {"layers": len(cache.states), "begun": first.state is not None, "encoder": first.encoder is not None}
    return [(pytree.MappingKey(name), value) for name, value in found], {**context, "rows": rows}


def _flatten(cache: MegaCache) -> tuple[list[Any], dict[str, Any]]:
    keyed, context = _flatten_with_keys(cache)
    return [tensor for _, tensor in keyed], context


def _unflatten(leaves: Iterable[Any], context: dict[str, Any]) -> MegaCache:
    cache, left = MegaCache(context["layers"]), iter(leaves)
    for name in context["rows"]:
        setattr(cache, name, next(left))
    position: Any = next(left) if context["begun"] else None
    if context["begun"] and cache.documents is None:
        cache.pads = next(left)
    if isinstance(position, Tensor) and in_memory(position):
        position = int(position)
        cache.pads = None if cache.pads is None or not bool(cache.pads.any()) else cache.pads
    for layer in cache.states:
        if context["begun"]:
            layer.state = LayerState(next(left), next(left), next(left), position)
        if context["encoder"]:
            layer.encoder = next(left), next(left)
    return cache


pytree.register_pytree_node(
    MegaCache,
    _flatten,
    _unflatten,
    serialized_type_name=f"{MegaCache.__module__}.{MegaCache.__qualname__}",
    flatten_with_keys_fn=_flatten_with_keys,
)


# Left padding


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
    config: MegaConfig,
    cache: MegaCache | None,
    x: Tensor,
) -> tuple[Tensor | None, Tensor | None, "DocumentBorders | None"]:
    """Join what a call says of its rows x (B, L, D) to what the cache remembers of those before, and note it there.

    The other arguments are those of `MegaModel`, `extras` the `DOCUMENT_KEYS` among them. Returns (B, M + L) bool, true
    for valid columns, none where all are; padding before each row's first token, (B,) int64, none where no row has any
    or positions do not depend on it; documents, none where every row holds one.
    """
    mask, pads = _mask_and_pads(attention_mask, config, cache, x)
    shape = tuple(x.shape[:2])
    if document_starts is not None and (document_starts.dtype != torch.bool or document_starts.shape != shape):
        raise ValueError(
            f"document_starts is {document_starts.dtype} {tuple(document_starts.shape)}: expected bool {shape}, "
            "one for each new token"
        )
    if extras:
        document_starts = _document_starts(document_starts, extras, mask, pads, cache, x)
    if document_starts is None and cache is not None and cache.documents is not None:
        document_starts = x.new_zeros(shape, dtype=torch.bool)
    borders = None if document_starts is None else _document_borders(document_starts, config, cache, pads)
    if cache is not None:
        cache.pads, cache.mask = pads, mask
        # An exporter would keep whether there are more columns than these.
        if mask is not None and config.use_chunking and not torch.compiler.is_exporting():
            cache.mask = mask[:, -config.chunk_size :].clone()  # no view, which would keep all of it
    return mask, pads, borders


def _mask_and_pads(
    attention_mask: Tensor | None, config: MegaConfig, cache: MegaCache | None, x: Tensor
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
        if mask is not None and (config.is_decoder or config.use_chunking):
            pads = leading_pads(mask) if not in_memory(mask) or not bool(mask[:, 0].all()) else None
        return mask, pads
    if mask is None:
        if before is None:
            return None, pads
        mask = x.new_ones(batch, length, dtype=torch.bool)
    if before is None and not exporting:
        before = mask.new_ones(batch, min(seen, config.chunk_size) if config.use_chunking else seen)
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
            "Mega knows no other positions, so leave them out"
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
    starts: Tensor, config: MegaConfig, cache: MegaCache | None, pads: Tensor | None
) -> DocumentBorders:
    """Lay out the documents of new tokens as attention lays out its keys, and note in the cache what goes on."""
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
