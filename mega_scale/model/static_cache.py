"""A cache whose tensors keep their shapes and addresses: one compiled step, or one CUDA graph, decodes every token.

A call of several tokens, as a prompt, goes through a `MegaCache`, whose contents are then copied into the buffers. A
call of one token reads and writes the buffers themselves, and no shape, branch or number on the host depends on the
position.

Legend: B batch, C slots for keys: the chunk, or the most tokens of a model without chunks; M columns of a mask.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn

from mega_scale.model.cache import LayerState, MegaCache, MegaCacheLayer
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.model.rows import DocumentBorders
from mega_scale.ops.attention import ChunkDocuments
from mega_scale.ops.timestep_norm import Moments

_WARM_UP = 3  # steps before a graph is captured: libraries allocate their workspaces in the first


class OpenChunk(NamedTuple):
    """Which slot of its buffer each row writes next, and which it may read. All are written in place."""

    pads: Tensor  # padding before each row's first token, (B,) int64
    first: Tensor  # slot of the first key of each row's document, (B,) int64
    valid: Tensor  # which slots hold keys of valid tokens, (B, C) bool; those after the next slot are of the last chunk
    chunked: bool

    def place(self, position: Any) -> Tensor:
        """The slot of each row's token in column `position`, (B,) int64."""
        token = position - self.pads
        return token % self.valid.shape[1] if self.chunked else token.clamp(min=0)

    def visible(self, place: Tensor) -> Tensor:
        """Which slots the tokens in slots `place` (B,) see, (B, C) bool: valid ones of their documents, up to them."""
        slot = torch.arange(self.valid.shape[1], device=place.device)
        return self.valid & (slot >= self.first[:, None]) & (slot <= place[:, None])

    def write(self, place: Tensor, buffer: Tensor, new: Tensor) -> None:
        """Write new keys or values (B, 1, W), or marks (B, 1), to their slots of a buffer (B, C, W), or (B, C)."""
        buffer[torch.arange(len(place), device=place.device), place] = new[:, 0].to(buffer.dtype)


class MegaStaticCacheLayer(MegaCacheLayer):
    """One block's buffers; `state` is none while they hold nothing."""

    is_compileable = True

    def __init__(self) -> None:
        super().__init__()
        self.buffers: LayerState | None = None

    def remember(self, state: LayerState | None, encoder: tuple[Tensor, Tensor] | None = None) -> None:
        # Keys and values are written by attention; what an encoder said stays.
        assert self.state is not None and state is not None
        self.state.ema.copy_(state.ema)
        if self.state.norm is not None and state.norm is not None:
            _overwrite(self.state.norm, state.norm)

    def reset(self) -> None:
        self.state = None


class _FromStatic(MegaCache):
    """What a static cache held, for a call of several tokens, which ends by writing everything back."""

    static: "MegaStaticCache"

    def end_call(self) -> MegaCache:
        self.static.fill(self)
        return self.static


class MegaStaticCache(MegaCache):
    """A `MegaCache` of fixed-size buffers; `generate(..., cache_implementation="static")` makes one.

    It goes on from any prompt, with padding, documents and an encoder's output as a `MegaCache` does. Buffers are made
    by the first prompt, and made anew only for another number of rows. It is written in place, so it needs
    `torch.no_grad()` or `torch.inference_mode()`.

    Args:
        config: of the model that it is for.
        max_cache_len: most tokens of a row, of a model without chunks; with chunks, any number of tokens has room.
    """

    layer_class = MegaStaticCacheLayer

    def __init__(self, config: BaseConfig, max_cache_len: int | None = None) -> None:
        super().__init__(config.num_hidden_layers)
        self.chunk = config.attention_chunk
        if self.chunk is None and max_cache_len is None:
            raise ValueError("max_cache_len=None for a model without chunks: give the most tokens of a row")
        self.slots: int = self.chunk or max_cache_len or 0
        self.position: Tensor | None = None  # columns seen, int64 without dimensions
        self.rows: OpenChunk | None = None
        self.filled = False
        self.allocations = 0  # of buffers, so that what holds their addresses knows when these are old
        self._norm: Moments | None = None  # the buffers of `final_norm`

    @property
    def is_compileable(self) -> bool:
        """`generate()` compiles steps by itself, on a GPU with CUDA graphs."""
        return True

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Columns seen: a tensor without dimensions, or 0 before the first prompt."""
        return self.position if self.filled else 0

    def reset(self) -> None:
        """Forget everything; buffers stay where they are."""
        super().reset()
        self.filled = False

    def begin_call(self, length: int) -> MegaCache:
        if torch.is_grad_enabled():
            raise ValueError(
                "a static cache is written in place, which gradients exclude: call the model under torch.no_grad(), or "
                "use mega_scale.MegaCache"
            )
        if self.filled and length == 1:
            return self
        if torch.compiler.is_compiling():
            raise ValueError(
                "a static cache takes several tokens, or the first one, outside of torch.compile: compile the steps of "
                "one token that follow them"
            )
        return self._unpacked()

    def end_call(self) -> MegaCache:
        assert self.position is not None
        self.position.add_(1)
        return self

    def remember_final_norm(self, moments: Moments) -> None:
        assert self.final_norm is not None
        _overwrite(self.final_norm, moments)

    def read_token(
        self, attention_mask: Tensor | None, document_starts: Tensor | None, extras: Mapping[str, Any], x: Tensor
    ) -> tuple[Tensor | None, Tensor, DocumentBorders | None]:
        """Note in the buffers what a call says of one new token a row, x (B, 1, D); `read_rows` for a static cache.

        The mask is (B, M), of which the last column counts: earlier ones came with their tokens. `position_ids`
        (B, 1) begin a document where they are 0. Nothing is checked that a host would have to wait for.
        """
        rows, position, batch = self.rows, self.position, x.shape[0]
        assert rows is not None and position is not None
        mask = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
                raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: expected ({batch}, length)")
            mask = attention_mask[:, -1:].to(x.device) != 0
            # A row may have been padding only until now.
            rows.pads.copy_(torch.where(rows.pads >= position, position + (~mask[:, 0]).long(), rows.pads))
        place = rows.place(position)
        rows.write(place, rows.valid, x.new_ones(batch, 1, dtype=torch.bool) if mask is None else mask)
        starts = self._token_starts(document_starts, extras, mask, x)
        first = torch.where(place == 0, 0, rows.first)
        rows.first.copy_(first if starts is None else torch.where(starts[:, 0], place, first))
        if starts is None:
            return mask, rows.pads, None
        return mask, rows.pads, DocumentBorders(starts, ChunkDocuments.all_several(starts[:, None].long()))

    def _token_starts(
        self, given: Tensor | None, extras: Mapping[str, Any], mask: Tensor | None, x: Tensor
    ) -> Tensor | None:
        """Which rows' new tokens begin a document, (B, 1) bool; none: no row's."""
        if others := [key for key in extras if key != "position_ids"]:
            raise ValueError(f"{others[0]} with one token and a static cache: give document_starts instead")
        if given is None and (positions := extras.get("position_ids")) is not None:
            given = (positions[:, -1:].to(x.device) == 0).expand(x.shape[0], 1)
        if given is None:
            return None
        assert self.rows is not None and self.position is not None
        # A row's first token begins its first document whatever is said.
        inner = (self.position > self.rows.pads)[:, None]
        return given & (inner if mask is None else inner & mask)

    def fill(self, cache: MegaCache) -> None:
        """Copy what a `MegaCache` holds into the buffers, for the tokens that follow."""
        first = cache.states[0].state
        assert first is not None
        position, like = int(first.position), first.ema
        if self.chunk is None and position > self.slots:
            raise ValueError(f"{position} tokens are more than max_cache_len={self.slots}: give a larger one")
        pads = like.new_zeros(len(like), dtype=torch.long) if cache.pads is None else cache.pads
        self.position = self._keep(self.position, torch.tensor(position, device=like.device))
        self._keep_rows(pads, _first_keys(cache, pads), self._ring(cache.mask, pads, position))
        for mine, other in zip(self.states, cache.states, strict=True):
            assert isinstance(mine, MegaStaticCacheLayer) and other.state is not None
            old = {} if mine.buffers is None else mine.buffers.tensors()
            new = other.state.tensors()
            for name in ("keys", "values") if self.chunk is None else ():
                new[name] = torch.nn.functional.pad(new[name], (0, 0, 0, self.slots - new[name].shape[1]))
            mine.buffers = LayerState.of({name: self._keep(old.get(name), new[name]) for name in new}, self.position)
            mine.state, mine.buffers.rows = mine.buffers, self.rows
            if other.encoder is not None:
                known = mine.encoder or (None, None)
                mine.encoder = self._keep(known[0], other.encoder[0]), self._keep(known[1], other.encoder[1])
        if cache.final_norm is not None:
            moments = self._norm or (None, None, None)
            self._norm = Moments(*(self._keep(*pair) for pair in zip(moments, cache.final_norm, strict=True)))
        self.final_norm, self.encoder_mask = self._norm, cache.encoder_mask
        self.filled = True

    def _keep(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        """The buffer, or where it does not fit another one, with the numbers of a tensor."""
        fits = buffer is not None and (buffer.shape, buffer.dtype, buffer.device) == (new.shape, new.dtype, new.device)
        if buffer is None or not fits:
            # What inference mode makes could not be written outside of it.
            with torch.inference_mode(False), torch.no_grad():
                buffer = torch.empty_like(new, memory_format=torch.contiguous_format)
            torch._dynamo.mark_static_address(buffer)  # or a compiled step that writes it would not be a CUDA graph
            self.allocations += 1
        buffer.copy_(new)
        return buffer

    def _ring(self, mask: Tensor | None, pads: Tensor, position: int) -> Tensor:
        """Marks (B, C) of the last C columns in their slots, from those of the last M columns, (B, M) bool."""
        if mask is None:
            mask = torch.ones(len(pads), 1, dtype=torch.bool, device=pads.device)
        slot = torch.arange(self.slots, device=pads.device)
        column = mask.shape[1] - 1 - (position - 1 - pads[:, None] - slot) % self.slots
        return mask.gather(1, column.clamp(min=0)) | (column < 0)

    def _keep_rows(self, *new: Tensor) -> None:
        old = self.rows
        kept = (None, None, None) if old is None else (old.pads, old.first, old.valid)
        pads, first, valid = (self._keep(*pair) for pair in zip(kept, new, strict=True))
        self.rows = OpenChunk(pads, first, valid, self.chunk is not None)

    def _unpacked(self) -> MegaCache:
        """The same as a `MegaCache`; reads the position, for which a host waits."""
        cache = _FromStatic(len(self.states))
        cache.static = self
        if not self.filled:
            return cache
        assert self.position is not None and self.rows is not None
        position, rows = int(self.position), self.rows
        remembered = position % self.slots if self.chunk else position
        column = torch.arange(position - min(position, self.slots), position, device=rows.pads.device)
        token = column - rows.pads[:, None]
        marks = rows.valid.gather(1, token % self.slots) & (token >= 0)
        cache.mask = None if bool(marks.all()) else marks
        cache.pads = rows.pads.clone() if bool(rows.pads.any()) else None
        if remembered and bool(rows.first.any()):
            cache.documents = (torch.arange(remembered, device=rows.first.device) >= rows.first[:, None]).long()
        for mine, other in zip(self.states, cache.states, strict=True):
            assert mine.state is not None
            held = {name: tensor.clone() for name, tensor in mine.state.tensors().items()}
            for name in ("keys", "values") if self.chunk is None else ():
                held[name] = held[name][:, :position]
            other.remember(LayerState.of(held, position), mine.encoder)
        cache.final_norm = None if self.final_norm is None else Moments(*(t.clone() for t in self.final_norm))
        cache.encoder_mask = self.encoder_mask
        return cache

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Overwrite every tensor with what the function makes of it; other numbers of rows get buffers of their own."""
        if not self.filled:
            return
        assert self.rows is not None
        self._keep_rows(function(self.rows.pads), function(self.rows.first), function(self.rows.valid))
        for layer in self.states:
            assert isinstance(layer, MegaStaticCacheLayer) and layer.state is not None
            changed = {name: self._keep(tensor, function(tensor)) for name, tensor in layer.state.tensors().items()}
            layer.buffers = LayerState.of(changed, layer.state.position)
            layer.state, layer.buffers.rows = layer.buffers, self.rows
            if layer.encoder is not None:
                keys, values = layer.encoder
                layer.encoder = self._keep(keys, function(keys)), self._keep(values, function(values))
        if self.encoder_mask is not None:
            self.encoder_mask = function(self.encoder_mask)
        if self.final_norm is not None:
            self.final_norm = self._norm = Moments(*(self._keep(t, function(t)) for t in self.final_norm))

    def tensors(self) -> list[Tensor]:
        """All buffers that a step writes."""
        assert self.position is not None and self.rows is not None
        layers = [layer.state.tensors().values() for layer in self.states if layer.state is not None]
        rows = self.rows.pads, self.rows.first, self.rows.valid
        return [self.position, *rows, *(t for layer in layers for t in layer), *(self.final_norm or ())]


class DecodingGraph:
    """The decoding step of a model as one CUDA graph: captured here, replayed for every token.

    The cache holds a prompt by then, and goes on from it; the graph serves later prompts in the same cache, too, of as
    many rows.
    """

    def __init__(self, model: nn.Module, cache: MegaStaticCache) -> None:
        """Capture a step. Raises ValueError where the cache holds no prompt, or is not on a GPU."""
        if not cache.filled:
            raise ValueError("the cache is empty: call the model with a prompt and this cache first")
        kept = cache.tensors()
        device = kept[0].device
        if device.type != "cuda":
            raise ValueError(f"the cache is on {device}, which has no CUDA graphs: compile the step by torch.compile")
        self.cache, self.allocations = cache, cache.allocations
        self.ids = torch.zeros(len(kept[1]), 1, dtype=torch.long, device=device)
        before = [tensor.clone() for tensor in kept]
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.inference_mode():
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    model(self.ids, past_key_values=cache, use_cache=True)
            torch.cuda.current_stream(device).wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.logits: Tensor = model(self.ids, past_key_values=cache, use_cache=True).logits
        for tensor, old in zip(kept, before, strict=True):
            tensor.copy_(old)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (B, 1, V) after tokens (B, 1), which the next call overwrites."""
        if self.allocations != self.cache.allocations or not self.cache.filled:
            raise ValueError("the cache has other buffers than at the capture, or is empty: capture its step anew")
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


def _first_keys(cache: MegaCache, pads: Tensor) -> Tensor:
    """Slot of the first key of the last document of each row, (B,) int64."""
    if cache.documents is None or not cache.documents.shape[1]:
        return torch.zeros_like(pads)
    return (cache.documents != cache.documents[:, -1:]).sum(1)


def _overwrite(kept: Moments, new: Moments) -> None:
    for buffer, tensor in zip(kept, new, strict=True):
        buffer.copy_(tensor)
