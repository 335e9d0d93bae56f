"""Dropout whose mask is a function of the element's place in the global batch, and of nothing else.

However a batch is cut over ranks, rows, tokens or channels, every element meets the same fate. The random number of an
element is a hash of (key, row, position, column); nothing has to be replayed when activations are recomputed.

Legend: B rows, L positions, D columns.
"""

import torch
from torch import Tensor

# Multipliers of 32-bit integer hashes that mix well (lowbias32, found by C. Wellons' search); as signed numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
_MASK = 2**32 - 1


def positional_dropout(x: Tensor, p: float, key: int, rows: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Zero elements with probability p, and divide the others by 1 - p.

    Args:
        x: (B, L, D), any floating dtype.
        p: probability, 0 to below 1.
        key: tells sites and steps apart, 0 to 2^32 - 1.
        rows: (B,) int64, numbers of the rows in the global batch.
        positions: (L,) int64 of the global sequence; (1,) drops whole features, L then being any.
        columns: (D,) int64 of the whole layer.

    Returns:
        Like x.
    """
    return x * keep_mask(p, key, rows, positions, columns).to(x.dtype).div_(1.0 - p)


def keep_mask(p: float, key: int, rows: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Which elements stay, (B, L, D) bool; arguments as in `positional_dropout`."""
    place = _mix64(_mix64(rows + key)[:, None] + positions)  # (B, L)
    mixed = _as_int32(place)[..., None] ^ _as_int32(_mix64(columns + (key ^ 0x9E3779B9)))
    # On 32-bit numbers that wrap, the only arrays of the full size. A shift of a signed number repeats its sign, which
    # is cut off: else no mixed number would be negative.
    for multiplier, shift in ((_FIRST, 16), (_SECOND, 15)):
        mixed ^= (mixed >> shift).bitwise_and_(2 ** (32 - shift) - 1)
        mixed *= multiplier
    mixed ^= (mixed >> 16).bitwise_and_(2**16 - 1)
    return mixed >= round(p * 2**32) - 2**31


def _mix64(numbers: Tensor) -> Tensor:
    """Hash int64 numbers to 0 .. 2^32 - 1, with products that stay below 2^63."""
    numbers = numbers & _MASK
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        numbers = ((numbers ^ (numbers >> 16)) * multiplier) & _MASK
    return numbers ^ (numbers >> 15)


def _as_int32(numbers: Tensor) -> Tensor:
    """Numbers of 0 .. 2^32 - 1 as signed 32-bit numbers, the highest bit flipped; two of them flip it back."""
    return (numbers - 2**31).to(torch.int32)
