"""Where the tokens of left-padded rows lie: every row counts positions, and so chunks, from its first real token.

Legend: B batch, L new tokens, C chunk, T slots, M columns of the attention mask.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops.tracing import any_length, parts


def leading_pads(mask: Tensor) -> Tensor:
    """Masked positions before the first valid one of each row, all of a row of padding: (B, M) bool to (B,) int64."""
    return torch.where(mask.any(1), mask.int().argmax(1), mask.shape[1])


class Slots(NamedTuple):
    """Rows laid out so that slot 0 is the first position of the chunk that is open before the new tokens.

    Args:
        shift: slot of the first new token, (B,); negative while a row is still padding.
        kept: remembered tokens of the open chunk, (B,): slots 0 to kept - 1.
        column: column of the attention mask that belongs to slot 0, (B,).
        width: T, slots.
        length: L, new tokens.
    """

    shift: Tensor
    kept: Tensor
    column: Tensor
    width: int
    length: int

    @classmethod
    def lay(cls, pads: Tensor, seen: int | Tensor, remembered: int, length: int, chunk: int | None) -> "Slots":
        """Lay out L tokens after `seen` columns, where `pads` (B,) columns come before each row's first token.

        Without chunks all `seen` columns are remembered; with them, any number says that there is an open chunk.
        """
        real = seen - pads
        if chunk is None:
            base, width = torch.zeros_like(real), remembered + length
        else:
            base = real.clamp(min=0) // chunk * chunk
            most = length + (chunk - 1 if remembered else 0)
            width = most if not any_length() and most <= chunk else parts(most, chunk) * chunk
        return cls(real - base, (real - base).clamp(min=0), base + pads, width, length)

    def _slot(self) -> Tensor:
        return torch.arange(self.width, device=self.shift.device)

    def _token(self) -> Tensor:
        """The new token in each slot, (B, T); outside 0 to L - 1 where there is none."""
        return self._slot() - self.shift[:, None]

    def keys(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Remembered keys or values (B, >= kept, W) and new ones (B, L, W) in their slots, (B, T, W)."""
        token = self._token().clamp(0, self.length - 1)
        if old is None:
            return _take(new, token)
        slot = self._slot()
        source = torch.where(slot < self.kept[:, None], slot, old.shape[1] + token)
        return _take(torch.cat([old, new], 1), source)

    def queries(self, new: Tensor) -> Tensor:
        """New queries (B, L, Z) in their slots, (B, T, Z); other slots hold something finite."""
        return _take(new, self._token().clamp(0, self.length - 1))

    def valid(self, mask: Tensor | None, columns: int | Tensor) -> Tensor:
        """Which slots hold a valid key, (B, T) bool; mask (B, M) marks valid ones of the last M of all columns."""
        token = self._token()
        valid = (self._slot() < self.kept[:, None]) | ((token >= 0) & (token < self.length))
        if mask is not None:
            column = self.column[:, None] + self._slot() - (columns - mask.shape[1])
            valid = valid & (mask.gather(1, column.clamp(0, mask.shape[1] - 1)) | (column < 0))
        return valid

    def back(self, slots: Tensor) -> Tensor:
        """What lies in the slots of the new tokens: (B, T, W) to (B, L, W); padding gets something finite."""
        return _take(slots, self.new_slots())

    def new_slots(self) -> Tensor:
        """Slots of the new tokens, (B, L), padding at slot 0."""
        tokens = torch.arange(self.length, device=self.shift.device)
        return (self.shift[:, None] + tokens).clamp(0, self.width - 1)

    def by_column(self, weights: Tensor) -> Tensor:
        """Weights of an unchunked model, (B, 1, I, T) by slots, as (B, 1, L, T) by rows and columns of the input."""
        column = self._slot() - self.column[:, None]  # the slot that each column lies in; negative for padding
        if weights.shape[2] > 1:
            weights = weights.gather(2, self.new_slots()[:, None, :, None].expand(-1, 1, -1, self.width))
        source = column.clamp(min=0)[:, None, None].expand(-1, 1, weights.shape[2], -1)
        return weights.gather(3, source).masked_fill((column < 0)[:, None, None], 0.0)

    def open_chunk(self, slots: Tensor, chunk: int) -> Tensor:
        """Keys or values (B, T, W) of the chunk that is open after the new tokens, in their places, (B, C, W)."""
        begin = (self.shift + self.length).clamp(min=0) // chunk * chunk
        source = begin[:, None] + torch.arange(chunk, device=slots.device)
        return _take(slots, source.clamp(max=self.width - 1))


def align(mask: Tensor | None, columns: int) -> Tensor | None:
    """The mask over `columns` columns: earlier ones that it leaves out are valid."""
    if mask is None or mask.shape[1] == columns:
        return mask
    missing = columns - mask.shape[1]
    return F.pad(mask, (missing, 0), value=True) if missing > 0 else mask[:, -columns:]


def _take(source: Tensor, index: Tensor) -> Tensor:
    return source.gather(1, index[..., None].expand(-1, -1, source.shape[2]))
