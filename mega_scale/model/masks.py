"""Masks of padding: one rule for their shapes and values, and what a cache remembers of them.

Legend: B batch, L new tokens, S encoder length, M remembered columns, D channels.
"""

import torch
from torch import Tensor

from mega_scale.model.cache import MegaCache
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.slots import leading_pads
from mega_scale.ops.tracing import in_memory


def checked_mask(mask: Tensor, name: str, batch: int, *lengths: int) -> Tensor:
    """Take a mask (B, one of `lengths`), of any dtype, as bool.

    Raises:
        ValueError: another shape, or numbers other than 0 and 1.
    """
    if tuple(mask.shape) not in [(batch, length) for length in lengths]:
        expected = " or ".join(str((batch, length)) for length in dict.fromkeys(lengths))
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: expected (batch, length), here {expected}")
    valid = mask != 0
    if mask.dtype != torch.bool and in_memory(mask) and bool((valid & (mask != 1)).any()):
        raise ValueError(f"{name} holds numbers other than 0 and 1: give 1 for tokens and 0 for padding")
    return valid


def mask_and_pads(
    attention_mask: Tensor | None, config: MegaConfig, cache: MegaCache | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Join the mask of new tokens to what the cache remembers of those before.

    Args:
        attention_mask: (B, L), of the new tokens, or (B, past + L); none: all new tokens are valid.
        config: of the model.
        cache: of the tokens before.
        x: the new tokens, (B, L, D).

    Returns:
        (B, M + L) bool, true for valid columns, or none where all are; and the padding before each row's first token,
        (B,) int64, where positions depend on it and some row has any.

    Raises:
        ValueError: the mask does not fit, or has other past columns than the calls that filled the cache.
    """
    batch, length = x.shape[:2]
    seen: int | Tensor = 0 if cache is None else cache.get_seq_length()
    pads = None if cache is None else cache.pads
    if isinstance(seen, Tensor):
        assert cache is not None
        return _of_any_call(attention_mask, cache, seen, x)
    mask = None
    if attention_mask is not None:
        mask = checked_mask(attention_mask.to(x.device), "attention_mask", batch, length, seen + length)
    if not seen:
        if mask is None:
            if cache is not None and torch.compiler.is_compiling():
                # Positions then live in tensors, and one graph serves every place in the chunk.
                pads = torch.zeros(batch, dtype=torch.long, device=x.device)
        elif config.is_decoder or config.use_chunking:
            pads = leading_pads(mask) if not in_memory(mask) or not bool(mask[:, 0].all()) else None
        return mask, pads
    assert cache is not None
    if mask is None:
        if torch.compiler.is_compiling() and pads is None:
            pads = torch.zeros(batch, dtype=torch.long, device=x.device)
        if cache.mask is None:
            return None, pads
        mask = x.new_ones(batch, length, dtype=torch.bool)
    before = cache.mask
    if before is None:
        window = min(seen, config.chunk_size) if config.use_chunking else seen
        before = mask.new_ones(batch, window)
    if mask.shape[1] > length:
        _check_past(mask[:, :-length], before, pads)
        mask = mask[:, -length:]
    if pads is not None:  # a row may have been padding only until now
        pads = torch.where(pads >= seen, seen + leading_pads(mask), pads)
    return torch.cat([before, mask], 1), pads


def _of_any_call(
    attention_mask: Tensor | None, cache: MegaCache, seen: Tensor, x: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The same for a program that is being exported, where nobody knows how many columns came before: a mask of another
    length than the new tokens is of all columns."""
    batch, length = x.shape[:2]
    mask = None if attention_mask is None else attention_mask != 0
    if mask is not None and mask.shape[1] != length:
        return mask, leading_pads(mask)
    pads = x.new_zeros(batch, dtype=torch.long) if cache.pads is None else cache.pads
    if mask is None and cache.mask is None:
        return None, pads
    if mask is None:
        mask = x.new_ones(batch, length, dtype=torch.bool)
    pads = torch.where(pads >= seen, seen + leading_pads(mask), pads)
    return mask if cache.mask is None else torch.cat([cache.mask, mask], 1), pads


def remember_mask(cache: MegaCache, mask: Tensor | None, pads: Tensor | None, config: MegaConfig) -> None:
    """Note in the cache what `mask_and_pads` returned, as far as later tokens can see it."""
    cache.pads = pads
    # An exporter would keep whether there are more columns than these.
    if mask is not None and config.use_chunking and not torch.compiler.is_exporting():
        mask = mask[:, -config.chunk_size :].clone()  # no view, which would keep all of it
    cache.mask = mask


def encoder_mask(
    attention_mask: Tensor | None, encoder_hidden_states: Tensor | None, cache: MegaCache | None, x: Tensor
) -> Tensor | None:
    """The mask of the encoder's output, (B, S) bool; with a cache, the one that came before where none is given.

    Raises:
        ValueError: no encoder's output, or shapes that do not fit it.
    """
    encoder = None if cache is None else cache.states[0].encoder
    batch, _, channels = x.shape
    if encoder_hidden_states is None and encoder is None:
        raise ValueError("add_cross_attention=True needs encoder_hidden_states (batch, length, hidden_size)")
    source = encoder_hidden_states if encoder is None else encoder.keys
    assert source is not None
    length = source.shape[1]
    if encoder_hidden_states is not None and tuple(encoder_hidden_states.shape) != (batch, length, channels):
        shape = tuple(encoder_hidden_states.shape)
        raise ValueError(f"encoder_hidden_states has shape {shape}: expected {(batch, length, channels)}")
    if attention_mask is None:
        return None if cache is None else cache.encoder_mask
    mask = checked_mask(attention_mask.to(x.device), "encoder_attention_mask", batch, length)
    if cache is not None:
        cache.encoder_mask = mask
    return mask


def _check_past(past: Tensor, before: Tensor, pads: Tensor | None) -> None:
    if not in_memory(past):
        return
    begins = leading_pads(past)
    same = bool((begins == (0 if pads is None else pads)).all())
    if not same or not torch.equal(past[:, past.shape[1] - before.shape[1] :], before):
        raise ValueError(
            "attention_mask says of cached tokens something else than the masks with which they came: pass those again "
            "before the mask of the new tokens, or the mask of the new tokens alone"
        )
