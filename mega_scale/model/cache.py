"""What a decoder remembers between calls: bounded by the chunk, whatever the length generated.

Legend: B batch, D channels, N moving averages per channel, C chunk, Z width of keys, E width of values.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin

from mega_scale.ops import in_memory

_STATE, _ENCODER, _ROWS = ("ema", "keys", "values"), ("keys", "values"), ("mask", "documents", "encoder_mask")
_Context = dict[str, Any]


@dataclass(eq=False)
class LayerState:
    """State of one block's self-attention after `position` columns of the input.

    Args:
        ema: h of the moving average, (B, D, N) fp32.
        keys: keys of the open chunk in their places, (B, C, Z), places after the last token being unused; without
            chunks, all keys (B, position, Z).
        values: values likewise, (B, C, E) or (B, position, E).
        position: columns seen, padding included; in a program that is being exported, a tensor without dimensions.
    """

    ema: Tensor
    keys: Tensor
    values: Tensor
    position: int | Tensor


@dataclass(eq=False)
class EncoderState:
    """What one block's cross-attention made of the encoder's output: keys (B, S, Z) and values (B, S, D)."""

    keys: Tensor
    values: Tensor


class MegaCacheLayer(CacheLayerMixin):
    """Holds one block's states behind the interface by which `generate()` handles caches."""

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None
        self.encoder: EncoderState | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first call of the model makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: Mega blocks take and return a whole state."""
        raise ValueError("a Mega cache is updated by its model with whole states, not with keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen; see `LayerState.position`."""
        position: Any = 0 if self.state is None else self.state.position
        return position

    def get_max_length(self) -> int:
        return -1  # there is none

    def reset(self) -> None:
        self.state, self.encoder = None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the moving average cannot be run backwards."""
        raise ValueError(
            "a Mega cache cannot drop tokens: its moving average holds them; start again from an empty cache"
        )

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what the function makes of it."""
        if self.state is not None:
            state = self.state
            self.state = LayerState(function(state.ema), function(state.keys), function(state.values), state.position)
        if self.encoder is not None:
            self.encoder = EncoderState(function(self.encoder.keys), function(self.encoder.values))


class MegaCache(Cache):
    """One state per block; pass it back as `past_key_values` to go on where the last call ended."""

    def __init__(self, num_hidden_layers: int) -> None:
        self.states = [MegaCacheLayer() for _ in range(num_hidden_layers)]
        self.pads: Tensor | None = None
        """Padding before each row's first token, (B,) int64; none where no row has any."""
        self.documents: Tensor | None = None
        """Number of the document of each remembered key, (B, position in the open chunk, or position) int64; none where
        all of a row are of one."""
        self.mask: Tensor | None = None
        """Which of the last tokens are valid, (B, position, or at most C) bool; none where no mask was given."""
        self.encoder_mask: Tensor | None = None
        """Which positions of the encoder's output are valid, (B, S) bool; none where no mask was given."""
        super().__init__(layers=[*self.states])

    @property
    def is_compileable(self) -> bool:
        """The position is a Python number, so `generate()` does not compile steps by itself."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = [part for layer in self.states for part in (layer.state, layer.encoder) if part is not None]
        return sum(tensor.nbytes for part in parts for tensor in vars(part).values() if isinstance(tensor, Tensor))

    def reset(self) -> None:
        super().reset()
        self.pads = self.documents = self.mask = self.encoder_mask = None

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take rows `beam_idx` (B,), as beam search does after each step."""
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda tensor: tensor[indices])

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.states:
            layer.apply(function)
        for name in ("pads", *_ROWS):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))


def check_cache(past: Any, num_hidden_layers: int, batch: int) -> MegaCache:
    """Take a cache from which a model of so many blocks can go on with `batch` rows; refuse (ValueError) others."""
    if not isinstance(past, MegaCache):
        raise ValueError(
            f"past_key_values is a {type(past).__name__}: Mega takes mega_scale.MegaCache, the one that it returns; "
            "leave past_key_values out to begin with an empty one"
        )
    if len(past.states) != num_hidden_layers:
        raise ValueError(f"past_key_values has {len(past.states)} layers, the model {num_hidden_layers}")
    state = past.states[0].state
    if state is not None and state.ema.shape[0] != batch:
        raise ValueError(f"past_key_values holds {state.ema.shape[0]} rows, the input {batch}")
    if (
        state is not None
        and in_memory(state.ema)
        and state.ema.is_inference()
        and not torch.is_inference_mode_enabled()
    ):
        # What inference mode made can, outside of it, neither be written nor take part in gradients.
        for layer in past.states:
            layer.apply(torch.clone)
    return past


def remember(state: LayerState | None, keys: Tensor, values: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Keys and values to remember after new ones (B, L, Z) and (B, L, E), of rows without padding before them."""
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
        if old is None or not old.shape[1]:
            buffer = new.new_zeros(new.shape[0], chunk, new.shape[2])
        else:
            buffer = old.clone() if torch.is_grad_enabled() else old
        fresh = new[:, begin:]
        buffer[:, place : place + fresh.shape[1]] = fresh
        kept.append(buffer)
    return kept[0], kept[1]


def _flatten(cache: MegaCache) -> tuple[list[Any], _Context]:
    keyed, context = _flatten_with_keys(cache)
    return [tensor for _, tensor in keyed], context


def _flatten_with_keys(cache: MegaCache) -> tuple[list[tuple[pytree.KeyEntry, Any]], _Context]:
    """The named tensors of a cache, its position among them, as exporters take them in and give them out."""
    first = cache.states[0]
    rows = [name for name in _ROWS if getattr(cache, name) is not None]
    context = {"layers": len(cache.states), "begun": first.state is not None, "encoder": first.encoder is not None}
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
        for part, names in ((layer.state, _STATE), (layer.encoder, _ENCODER)):
            of = "" if names is _STATE else "encoder_"
            found += [(f"{of}{name}_{number}", getattr(part, name)) for name in names if part is not None]
    return [(pytree.MappingKey(name), value) for name, value in found], {**context, "rows": rows}


def _unflatten(leaves: Iterable[Any], context: _Context) -> MegaCache:
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
            ema, keys, values = (next(left) for _ in _STATE)
            layer.state = LayerState(ema, keys, values, position)
        if context["encoder"]:
            layer.encoder = EncoderState(next(left), next(left))
    return cache


pytree.register_pytree_node(
    MegaCache,
    _flatten,
    _unflatten,
    serialized_type_name=f"{MegaCache.__module__}.{MegaCache.__qualname__}",
    flatten_with_keys_fn=_flatten_with_keys,
)
