"""Which part of the global batch this rank is computing, for the modules that need to know.

Legend: B rows, L length of a whole row, P ranks that share a row, C chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

_IGNORED = -100


class Place(NamedTuple):
    """Where a micro-batch lies in the run.

    Args:
        step: optimizer steps before it.
        first_row: number of its first row in the global batch of its step.
    """

    step: int = 0
    first_row: int = 0


START = Place()


class Window:
    """One object for a whole model, whose rows are cut in whole chunks over the ranks of `sp`, one part each.

    Inside a `with` statement the model computes this rank's part of the micro-batch last taken; outside, whole rows.

    Args:
        part: which part is this rank's, 0 to parts - 1.
        parts: P.
        chunk: C, tokens; may be 1 where P = 1.

    Attributes:
        place: of the micro-batch under way.
        first_token: position of this rank's first token in its rows.
        cut: whether the model is given this rank's part of its rows.
    """

    def __init__(self, part: int = 0, parts: int = 1, chunk: int = 1) -> None:
        self.part, self.parts = part, parts
        self.first_token: int
        self._multiple = parts * chunk if parts > 1 else 1
        self._taken = (START, 0)
        self._leave()

    def split(self, tensor: Tensor, fill: int) -> Tensor:
        """This rank's part of whole rows, (B, L, ...) to (B, ceil(L / P C) C, ...); rows are filled up at their end."""
        if self.parts == 1:
            return tensor
        missing = -tensor.shape[1] % self._multiple
        if missing:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing), value=fill)
        return tensor.chunk(self.parts, dim=1)[self.part].contiguous()

    def take(self, place: Place, input_ids: Tensor, shift_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Begin a micro-batch: this rank's part of its inputs and next tokens, (B, L) int64 each.

        What fills rows up has no labels. A causal model needs no mask for it: nothing before it sees it.
        """
        inputs = self.split(input_ids, 0)
        self._taken = (place, inputs.shape[1])
        return inputs, self.split(shift_labels, _IGNORED)

    @contextmanager
    def later(self, tokens: int) -> Iterator[None]:
        """Within it, the model computes tokens that lie so many further on in their rows."""
        before = self.first_token
        self.first_token = before + tokens
        try:
            yield
        finally:
            self.first_token = before

    def __enter__(self) -> None:
        self.place, length = self._taken
        self.first_token, self.cut = self.part * length, self.parts > 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self.place, self.first_token, self.cut = START, 0, False
