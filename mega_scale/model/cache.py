"""What a decoder remembers between calls: bounded by the chunk, whatever the length generated.

Legend: B batch, D channels, N moving averages per channel, C chunk, Z width of keys, E width of values.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class LayerState(NamedTuple):
    """State of one block after `position` tokens.

    Args:
        ema: h of the moving average, (B, D, N) fp32.
        keys: keys of the current chunk in their places, (B, C, Z), places from `position % C` on being unused;
            without chunks, all keys (B, position, Z).
        values: values likewise, (B, C, E) or (B, position, E).
        position: tokens seen.
    """

    ema: Tensor
    keys: Tensor
    values: Tensor
    position: int


class MegaCacheLayer(CacheLayerMixin):
    """Holds one block's `LayerState` behind the interface by which `generate()` handles caches."""

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first call of the model makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: Mega blocks take and return a whole state."""
        raise ValueError("a Mega cache is updated by its model with whole states, not with keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys as a full mask would have them, tokens."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return 0 if self.state is None else self.state.position

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the moving average cannot be run backwards."""
        raise ValueError(
            "a Mega cache cannot drop tokens: its moving average holds them; start again from an empty cache"
        )

    def _each(self, function: Any) -> None:
        if self.state is not None:
            ema, keys, values, position = self.state
            self.state = LayerState(function(ema), function(keys), function(values), position)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows `beam_idx` (B,), as beam search does after each step."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._each(lambda tensor: tensor[indices])


class MegaCache(Cache):
    """One `LayerState` per block; pass it back as `past_key_values` to go on where the last call ended."""

    def __init__(self, num_hidden_layers: int) -> None:
        self.states = [MegaCacheLayer() for _ in range(num_hidden_layers)]
        super().__init__(layers=[*self.states])

    @property
    def is_compileable(self) -> bool:
        """The position is a Python number, so a step is compiled for one place in the chunk at a time."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        states = (layer.state for layer in self.states if layer.state is not None)
        return sum(tensor.nbytes for state in states for tensor in state[:3])


def remember(state: LayerState | None, ema: Tensor, keys: Tensor, values: Tensor, chunk: int | None) -> LayerState:
    """The state after the tokens whose keys (B, L, Z) and values (B, L, E) follow those of `state`.

    Args:
        state: the state before; none before the first token.
        ema: h after the last token.
        keys: of the new tokens.
        values: of the new tokens.
        chunk: C, tokens; none without chunks.
    """
    before = 0 if state is None else state.position
    position = before + keys.shape[1]
    if chunk is None:
        if state is not None:
            keys, values = torch.cat([state.keys, keys], 1), torch.cat([state.values, values], 1)
        return LayerState(ema, keys, values, position)
    begin = max(0, position // chunk * chunk - before)  # the new tokens of the chunk that is open now
    place = (before + begin) % chunk
    kept = []
    for old, new in zip((None, None) if state is None else state[1:3], (keys, values), strict=True):
        if old is None:
            buffer = new.new_zeros(new.shape[0], chunk, new.shape[2])
        else:
            buffer = old.clone() if torch.is_grad_enabled() else old
        fresh = new[:, begin:]
        buffer[:, place : place + fresh.shape[1]] = fresh
        kept.append(buffer)
    return LayerState(ema, kept[0], kept[1], position)
