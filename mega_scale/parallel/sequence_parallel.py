"""Sequence parallelism: every rank computes whole chunks of a row, and only states of the moving average travel.

Rank r averages its part of a row from zero, and gets the end states S_j of all others in one all-gather a direction.
With Q the fade of a state over one part, the state before part r is `sum_{j<r} Q^(r-1-j) S_j`. Backward, the gradients
G_r of those states travel the same way, and `dS_j = sum_{r>j} Q^(r-1-j) G_r`. Attention stays inside chunks.

Legend: P ranks of the axis, B rows, R channels, N moving averages per channel.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from mega_scale.ops.ema import Fade, Turn
from mega_scale.parallel.world import Axis, Pending, start_gather


class StateExchange:
    """Brings every part of a row the state before it: the `carry` of `damped_ema`, over the ranks that share a row."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._received: deque[Tensor] | None = None  # in the forward pass of a block that is recomputed
        self._again = False

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a block's forward and of its recomputation, which takes what the forward received."""
        received: deque[Tensor] = deque()
        return self._keeping(received, again=False), self._keeping(received, again=True)

    @contextmanager
    def _keeping(self, received: deque[Tensor], again: bool) -> Iterator[None]:
        self._received, self._again = received, again
        try:
            yield
        finally:
            self._received = None

    def _gather(self, x: Tensor) -> Pending:
        if self._received is not None and self._again:
            return Pending(self._received.popleft(), None)
        pending = start_gather(x, self._axis)
        if self._received is not None:
            self._received.append(pending.buffer)
        return pending

    def __call__(self, end: Tensor, fade: Fade, resets: Tensor | None, back: bool) -> tuple[Tensor, Turn]:
        """See `Carry`: end (B, R, N)."""
        log_fade = fade.log
        # A document that begins this part keeps what lies to its right from what lies to its left.
        shut = resets[:, :1, None] if back and resets is not None else None
        # One collective more, of one byte a row, where documents begin inside of rows.
        flags = None if resets is None else self._gather((~resets.any(1)).to(torch.uint8))
        pending = self._gather(end if shut is None else end.masked_fill(shut, 0))
        passes = None if flags is None else flags.wait().bool()
        weights, distance = _weights(self._axis, log_fade, passes, not back)

        def turn(d_state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            returning = start_gather(d_state, self._axis)
            # Each rank counts the paths that end at it; the sum over ranks, which all parameters get, counts every one.
            d_log_fade = torch.einsum("pbrn,brn,pbrn,p->rn", pending.buffer, d_state, weights, distance)
            onward, _ = _weights(self._axis, log_fade, passes, back)
            d_end = torch.einsum("pbrn,pbrn->brn", returning.wait(), onward)
            return d_end if shut is None else d_end.masked_fill(shut, 0), (d_log_fade,)

        return torch.einsum("pbrn,pbrn->brn", pending.wait(), weights), turn


def _weights(axis: Axis, log_fade: Tensor, passes: Tensor | None, from_left: bool) -> tuple[Tensor, Tensor]:
    """How much of each rank's states reaches this part from the left, or from the right.

    Q^k for the k parts between the two, zero from the other side, and where a part between lets nothing pass.

    Returns:
        (P, B or 1, R, N), and over how many parts, (P,).
    """
    own, others = axis.rank, torch.arange(axis.size, device=log_fade.device)
    between = (own - others if from_left else others - own) - 1
    distance = between.clamp(min=0).to(log_fade.dtype)
    weights = torch.exp(log_fade * distance[:, None, None]) * (between >= 0)[:, None, None]
    if passes is None:
        return weights[:, None], distance
    # Every part strictly between the two must pass; a running count of closed ones says how many there are.
    closed = torch.cat([torch.zeros_like(passes[:1], dtype=torch.long), (~passes).cumsum(0)])  # (P + 1, B)
    low, high = others.clamp(max=own), others.clamp(min=own)
    inside = closed[high] - closed[torch.minimum(low + 1, high)]  # (P, B)
    return weights[:, None] * (inside == 0)[:, :, None, None], distance
