"""Sequence parallelism: every rank computes whole chunks of a row, and only states of the moving average travel.

Rank r averages its part of a row from zero, and gets the end states S_j of all others in one all-gather. With Q the
fade of a state over one part, the state before part r is `sum_{j<r} Q^(r-1-j) S_j`. Backward, the gradients G_r of
those states travel the same way, and `dS_j = sum_{r>j} Q^(r-1-j) G_r`. Attention stays inside chunks.

Legend: P ranks of the axis, B rows, R channels (twice as many when bidirectional), N moving averages per channel.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops import once_differentiable
from mega_scale.parallel.world import Axis, Pending, start_gather, with_backward


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

    def __call__(
        self, end: Tensor, log_fade: Tensor, passes: Tensor | None, bidirectional: bool
    ) -> Callable[[], Tensor]:
        """See `Carry`: starts to send this part's end state (B, R, N); returns what waits for the state before it."""
        box: list[Pending] = []
        # One collective more, of one byte a row, where documents begin inside of rows.
        flags = None if passes is None else self._gather(passes.to(torch.uint8))

        def send(end: Tensor) -> Tensor:
            box.append(self._gather(end))
            return box[0].buffer  # (P, B, R, N), before it is full

        def gradient_of_end(gradient: Tensor) -> Tensor:
            # What comes along the graph only stands in for the gradients of all ranks, which are on their way.
            gathered, weights = box.pop().wait(), box.pop()
            return torch.einsum("pbrn,pbrn->brn", gathered, weights.buffer)

        buffer = with_backward(end, send, gradient_of_end)

        def arrive() -> Tensor:
            through = None if flags is None else flags.wait().bool()
            return _Receive.apply(buffer, log_fade, through, self._axis, box, bidirectional)

        return arrive


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        buffer: Tensor,
        log_fade: Tensor,
        passes: Tensor | None,
        axis: Axis,
        box: list[Pending],
        bidirectional: bool,
    ) -> Tensor:
        """The state before this part, (B, R, N), from the end states of all, (P, B, R, N)."""
        ctx.axis, ctx.box, ctx.bidirectional = axis, box, bidirectional
        box.pop().wait()
        ctx.save_for_backward(buffer, log_fade, passes)
        return torch.einsum("pbrn,pbrn->brn", buffer, _weights(axis, log_fade, passes, bidirectional, True)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        buffer, log_fade, passes = ctx.saved_tensors
        axis = ctx.axis
        # Each rank counts the paths that end at it; the sum over ranks, which all parameters get, counts every one.
        weights, distance = _weights(axis, log_fade, passes, ctx.bidirectional, True)
        d_log_fade = torch.einsum("pbrn,brn,pbrn,pr->rn", buffer, gradient, weights, distance)
        ctx.box.append(Pending(_weights(axis, log_fade, passes, ctx.bidirectional, False)[0], None))
        ctx.box.append(start_gather(gradient, axis))
        return buffer, d_log_fade, None, None, None, None


def _weights(
    axis: Axis, log_fade: Tensor, passes: Tensor | None, bidirectional: bool, arriving: bool
) -> tuple[Tensor, Tensor]:
    """How much of each rank's end state reaches this part if `arriving`, or of this part's reaches each rank.

    Q^k for the k parts between the two, zero against the direction, and where a part between lets nothing pass.

    Returns:
        (P, B or 1, R, N), and over how many parts, (P, R).
    """
    own, others = axis.rank, torch.arange(axis.size, device=log_fade.device)
    ahead = (own - others if arriving else others - own) - 1  # parts between, from left to right
    halves = [ahead, -ahead - 2] if bidirectional else [ahead]
    channels = log_fade.shape[0] // len(halves)
    between = torch.stack(halves, 1).repeat_interleave(channels, 1)  # (P, R)
    distance = between.clamp(min=0).to(log_fade.dtype)
    weights = torch.exp(log_fade * distance[..., None]) * (between >= 0)[..., None]
    if passes is None:
        return weights[:, None], distance
    # Every part strictly between the two must pass; a running count of closed ones says how many there are.
    closed = torch.cat([torch.zeros_like(passes[:1], dtype=torch.long), (~passes).cumsum(0)])  # (P + 1, B)
    low, high = others.clamp(max=own), others.clamp(min=own)
    inside = closed[high] - closed[torch.minimum(low + 1, high)]  # (P, B)
    return weights[:, None] * (inside == 0)[:, :, None, None], distance
