"""Shorter sequences at first: the length of a step's rows, without moving any row of the run.

What a run reads is always rows of `data.sequence_length` tokens. At a step of length l, each is read as
sequence_length / l rows, one behind the other in the same micro-batch. So a batch has as many tokens at every length,
every token is read once, and the position stays a function of the step, whatever the schedule was before.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class LengthSchedule:
    """Lengths by step.

    Args:
        stages: (step, length) pairs: from that step on rows have so many tokens; the first step is 0, steps ascend.
        sequence_length: L, tokens; every length divides it.

    Raises:
        ValueError: Names the pair that cannot be.
    """

    def __init__(self, stages: Sequence[Any], sequence_length: int) -> None:
        key = f"data.length_schedule={stages!r}"
        if not stages or any(not isinstance(stage, list | tuple) or len(stage) != 2 for stage in stages):
            raise ValueError(f"{key}: give pairs [first step, tokens], such as [[0, 512], [1000, 1024]]")
        self._steps = [stage[0] for stage in stages]
        self.lengths = [stage[1] for stage in stages]
        if self._steps[0] != 0 or any(a >= b for a, b in zip(self._steps, self._steps[1:], strict=False)):
            raise ValueError(f"{key}: steps {self._steps} must begin at 0 and ascend; sort them, the first being 0")
        for length in self.lengths:
            if length < 2 or sequence_length % length:
                near = [n for n in range(2, sequence_length + 1) if sequence_length % n == 0]
                near = sorted(sorted(near, key=lambda n: abs(n - length))[:3])
                raise ValueError(
                    f"{key}: a length of {length} does not divide data.sequence_length={sequence_length}, the rows "
                    f"that are read; take one of {', '.join(map(str, near))}, or another sequence_length"
                )

    def at(self, step: int) -> int:
        """The length of a step's rows, tokens; `step` is the number of steps done before."""
        return next(
            length for first, length in zip(reversed(self._steps), reversed(self.lengths), strict=True) if first <= step
        )

    def cut(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Cut the rows of a micro-batch, (B, L) each, to the step's length l, (B L / l, l); nothing is copied."""
        return {name: tensor.view(-1, self.at(step)) for name, tensor in batch.items()}
