"""What a decoder remembers of the rows of a batch between calls.

Legend: B batch, L new tokens, D channels, N moving averages per channel, C chunk, G groups of channels, Z width of
keys, E width of values, S encoder length.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from mega_scale.ops import in_memory
from mega_scale.ops.timestep_norm import Moments

if TYPE_CHECKING:
    from mega_scale.model.rows import DocumentBorders
    from mega_scale.model.static_cache import OpenChunk

_ROWS = ("mask", "documents", "encoder_mask")  # tensors of a cache that say something of its rows
_MOMENTS = tuple(f"norm_{name}" for name in Moments._fields)


@dataclass(eq=False)
class LayerState:
    """State of one block's self-attention: keys and values are those of the open chunk in their places, of which those
    after the last token are unused; without chunks, all of them."""

    ema: Tensor  # h of the moving average, (B, D, N) fp32, or of a complex one pairs of reals (B, D, N, 2)
    keys: Tensor  # (B, C, Z), or (B, position, Z)
    values: Tensor  # (B, C, E), or (B, position, E)
    # Columns seen, padding included; a tensor without dimensions in a static cache, and while a program is exported.
    position: int | Tensor
    norm: Moments | None = None  # of the block's timestep norm, where it has one
    rows: "OpenChunk | None" = None  # of a static cache: where in its buffers the next key and value of each row belong

    def tensors(self) -> dict[str, Tensor]:
        """Those that have a row for each row of the batch, by name."""
        found = {name: getattr(self, name) for name in ("ema", "keys", "values")}
        return found if self.norm is None else found | dict(zip(_MOMENTS, self.norm, strict=True))

    @classmethod
    def of(cls, tensors: dict[str, Tensor], position: int | Tensor) -> "LayerState":
        """What has these `tensors()`."""
        norm = Moments(*(tensors[name] for name in _MOMENTS)) if _MOMENTS[0] in tensors else None
        return cls(tensors["ema"], tensors["keys"], tensors["values"], position, norm)


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

    def remember(self, state: LayerState | None, encoder: tuple[Tensor, Tensor] | None = None) -> None:
        """Keep the states after the new tokens."""
        self.state, self.encoder = state, encoder

    def reset(self) -> None:
        self.state, self.encoder = None, None

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a Mega cache cannot drop tokens: its moving average holds them; start again from an empty cache"
        )

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            changed = {name: function(tensor) for name, tensor in self.state.tensors().items()}
            self.state = LayerState.of(changed, self.state.position)
        if self.encoder is not None:
            self.encoder = function(self.encoder[0]), function(self.encoder[1])


class MegaCache(Cache):
    """One state per block; pass it back as `past_key_values` to go on where the last call ended."""

    layer_class = MegaCacheLayer

    def __init__(self, num_hidden_layers: int) -> None:
        self.states = [self.layer_class() for _ in range(num_hidden_layers)]
        # Of the rows; none where no row has any padding, documents or mask.
        self.pads: Tensor | None = None  # padding before each row's first token, (B,) int64
        self.documents: Tensor | None = None  # number of each remembered key's, (B, position in C, or position) int64
        self.mask: Tensor | None = None  # which of the last tokens are valid, (B, position, or at most C) bool
        self.encoder_mask: Tensor | None = None  # which positions of the encoder's output are valid, (B, S) bool
        self.final_norm: Moments | None = None  # of the model's last norm, where it is a timestep norm
        super().__init__(layers=[*self.states])

    @property
    def is_compileable(self) -> bool:
        """The position is a Python number, so `generate()` does not compile steps by itself."""
        return False

    def begin_call(self, length: int) -> "MegaCache":
        """The cache that the model is to read and write in a call of so many new tokens."""
        return self

    def end_call(self) -> "MegaCache":
        """Called when all states are remembered; the cache to return."""
        return self

    def read_token(
        self, attention_mask: Tensor | None, document_starts: Tensor | None, extras: Mapping[str, Any], x: Tensor
    ) -> "tuple[Tensor | None, Tensor, DocumentBorders | None] | None":
        """What `read_rows` returns for one token, of a cache whose position no host knows; of others, none."""
        return None

    def remember_final_norm(self, moments: Moments) -> None:
        """Keep the moments of the model's last norm after the new tokens."""
        self.final_norm = moments

    @property
    def nbytes(self) -> int:
        """Bytes of all that is remembered of blocks and norms."""
        parts: list[Iterable[Any]] = [
            layer.state.tensors().values() for layer in self.states if layer.state is not None
        ]
        parts += [layer.encoder for layer in self.states if layer.encoder is not None]
        parts += [] if self.final_norm is None else [self.final_norm]
        return sum(tensor.nbytes for part in parts for tensor in part if isinstance(tensor, Tensor))

    def reset(self) -> None:
        super().reset()
        self.pads = self.documents = self.mask = self.encoder_mask = self.final_norm = None

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
        if self.final_norm is not None:
            self.final_norm = Moments(*map(function, self.final_norm))


def check_cache(past: Cache, layers: int, batch: int, *, norms: bool) -> MegaCache:
    """The cache given to a model of so many layers for `batch` rows. Raises ValueError where it is another's.

    `norms` says whether blocks of the model's family keep moments of a timestep norm.
    """
    if not isinstance(past, MegaCache):
        raise ValueError(
            f"past_key_values is a {type(past).__name__}: Mega takes mega_scale.MegaCache, the one that it returns; "
            "leave past_key_values out to begin with an empty one"
        )
    if len(past.states) != layers:
        raise ValueError(f"past_key_values has {len(past.states)} layers, the model {layers}")
    if (state := past.states[0].state) is not None:
        if (state.norm is not None) != norms:
            raise ValueError("past_key_values is of a model of another family: start again from an empty cache")
        if state.ema.shape[0] != batch:
            raise ValueError(f"past_key_values holds {state.ema.shape[0]} rows, the input {batch}")
        if in_memory(state.ema) and state.ema.is_inference() and not torch.is_inference_mode_enabled():
            # What inference mode made can, outside of it, neither be written nor take part in gradients.
            past.apply(torch.clone)
    return past


def is_empty_wrapper(past: Cache | None) -> bool:
    """Whether HF's encoder-decoder wrapper hands in an empty cache of its own kind, and takes back what we return."""
    return isinstance(past, EncoderDecoderCache) and not any(
        getattr(layer, "is_initialized", False) for layer in past.self_attention_cache.layers
    )


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
            found += [(f"{name}_{number}", tensor) for name, tensor in layer.state.tensors().items()]
        if layer.encoder is not None:
            found += zip((f"encoder_keys_{number}", f"encoder_values_{number}"), layer.encoder, strict=True)
    if cache.final_norm is not None:
        found += zip((f"final_{name}" for name in _MOMENTS), cache.final_norm, strict=True)
    context = {
        "layers": len(cache.states),
        "state": None if first.state is None else list(first.state.tensors()),
        "encoder": first.encoder is not None,
        "final_norm": cache.final_norm is not None,
        "rows": rows,
    }
    return [(pytree.MappingKey(name), value) for name, value in found], context


def _flatten(cache: MegaCache) -> tuple[list[Any], dict[str, Any]]:
    keyed, context = _flatten_with_keys(cache)
    return [tensor for _, tensor in keyed], context


def _unflatten(leaves: Iterable[Any], context: dict[str, Any]) -> MegaCache:
    cache, left = MegaCache(context["layers"]), iter(leaves)
    for name in context["rows"]:
        setattr(cache, name, next(left))
    names = context["state"]
    position: Any = None if names is None else next(left)
    if names is not None and cache.documents is None:
        cache.pads = next(left)
    if isinstance(position, Tensor) and in_memory(position):
        position = int(position)
        cache.pads = None if cache.pads is None or not bool(cache.pads.any()) else cache.pads
    for layer in cache.states:
        if names is not None:
            layer.state = LayerState.of({name: next(left) for name in names}, position)
        if context["encoder"]:
            layer.encoder = next(left), next(left)
    if context["final_norm"]:
        cache.final_norm = Moments(*(next(left) for _ in _MOMENTS))
    return cache


pytree.register_pytree_node(
    MegaCache,
    _flatten,
    _unflatten,
    serialized_type_name=f"{MegaCache.__module__}.{MegaCache.__qualname__}",
    flatten_with_keys_fn=_flatten_with_keys,
)
