"""Sequence parallelism: every rank computes whole chunks of a row, and only states of the moving average travel.

Rank r averages its part of a row from zero, and gets the end states S_j of all others in one all-gather. With Q the
fade of a state over one part, the state before part r is `sum_{j<r} Q^(r-1-j) S_j`. Backward, the gradients G_r of
those states travel the same way, and `dS_j = sum_{r>j} Q^(r-1-j) G_r`. Attention stays inside chunks.

Legend: P ranks of the axis, B rows, L length of a whole row, C chunk, R channels (twice as many when bidirectional),
N moving averages per channel.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mega_scale.model import MegaConfig
from mega_scale.model.layers import MegaMultiDimensionDampedEma
from mega_scale.ops.ema import EmaCoefficients, damped_ema
from mega_scale.ops.modes import once_differentiable
from mega_scale.parallel.shard import on_meta, replace_modules
from mega_scale.parallel.world import Axis, Pending, start_gather

_IGNORED = -100


class Place(NamedTuple):
    """Where a micro-batch lies in the run."""

    step: int = 0  # optimizer steps before it
    first_row: int = 0  # number of its first row in the global batch of its step


START = Place()


class RowSlice:
    """Which part of the global batch this rank computes: its whole chunks of rows that the ranks of `sp` share.

    One object serves a whole model. Inside a `with` statement the model computes this rank's part of the micro-batch
    last taken; outside, whole rows.

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
    def shifted(self, tokens: int) -> Iterator[None]:
        """Shift positions by `tokens` inside the context."""
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


class ReceivedStates:
    """States that a block received in its forward pass, so that recomputing it needs no communication.

    `contexts` is the `context_fn` of PyTorch's checkpointing: it is called once for every forward of a block.
    """

    def __init__(self) -> None:
        self._record: Callable[[Tensor], None] | None = None
        self._replay: Callable[[], Tensor] | None = None

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a block's forward and of its recomputation."""
        received: deque[Tensor] = deque()
        return self._recording(received.append), self._replaying(received.popleft)

    @contextmanager
    def _recording(self, append: Callable[[Tensor], None]) -> Iterator[None]:
        self._record = append
        try:
            yield
        finally:
            self._record = None

    @contextmanager
    def _replaying(self, popleft: Callable[[], Tensor]) -> Iterator[None]:
        self._replay = popleft
        try:
            yield
        finally:
            self._replay = None

    def gather(self, x: Tensor, axis: Axis) -> Pending:
        """As `start_gather`, except in a recomputation."""
        if self._replay is not None:
            return Pending(self._replay(), None)
        pending = start_gather(x, axis)
        if self._record is not None:
            self._record(pending.buffer)
        return pending


class StateExchange:
    """Brings every part of a row the state before it: the `carry` of `damped_ema`, over the ranks that share a row."""

    def __init__(self, axis: Axis, received: ReceivedStates | None = None) -> None:
        self._axis = axis
        self._received = received or ReceivedStates()

    def __call__(
        self, end: Tensor, log_fade: Tensor, passes: Tensor | None, bidirectional: bool
    ) -> Callable[[], Tensor]:
        """See `Carry`."""
        box: list[Pending] = []
        flags = None
        if passes is not None:
            # One collective more, of one byte a row, where documents begin inside of rows.
            flags = self._received.gather(passes.to(torch.uint8), self._axis)
        buffer = _Send.apply(end, self._axis, self._received, box, bidirectional)

        def arrive() -> Tensor:
            through = None if flags is None else flags.wait().bool()
            return _Receive.apply(buffer, log_fade, through, self._axis, box, bidirectional)

        return arrive


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, end: Tensor, axis: Axis, received: ReceivedStates, box: list[Pending], bidirectional: bool
    ) -> Tensor:
        """Starts to send (B, R, N); hands out the buffer (P, B, R, N) before it is full."""
        ctx.axis, ctx.box, ctx.bidirectional = axis, box, bidirectional
        box.append(received.gather(end, axis))
        return box[0].buffer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        # What comes along the graph only stands in for the gradients of all ranks, which are on their way.
        gathered, weights = ctx.box.pop().wait(), ctx.box.pop()
        return torch.einsum("pbrn,pbrn->brn", gathered, weights.buffer), None, None, None, None


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
        return torch.einsum("pbrn,pbrn->brn", buffer, _into(axis, log_fade, passes, bidirectional)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        buffer, log_fade, passes = ctx.saved_tensors
        axis = ctx.axis
        # Each rank counts the paths that end at it; the sum over ranks, which all parameters get, counts every one.
        weights, distance = _into(axis, log_fade, passes, ctx.bidirectional)
        d_log_fade = torch.einsum("pbrn,brn,pbrn,pr->rn", buffer, gradient, weights, distance)
        ctx.box.append(Pending(_out_of(axis, log_fade, passes, ctx.bidirectional), None))
        ctx.box.append(start_gather(gradient, axis))
        return buffer, d_log_fade, None, None, None, None


def _into(axis: Axis, log_fade: Tensor, passes: Tensor | None, bidirectional: bool) -> tuple[Tensor, Tensor]:
    """How much of each rank's end state reaches this part, (P, B or 1, R, N), and over how many parts, (P, R)."""
    return _weights(axis.rank, torch.arange(axis.size, device=log_fade.device), log_fade, passes, bidirectional, True)


def _out_of(axis: Axis, log_fade: Tensor, passes: Tensor | None, bidirectional: bool) -> Tensor:
    """How much of this part's end state reaches each rank, (P, B or 1, R, N)."""
    ranks = torch.arange(axis.size, device=log_fade.device)
    return _weights(axis.rank, ranks, log_fade, passes, bidirectional, False)[0]


def _weights(
    own: int, others: Tensor, log_fade: Tensor, passes: Tensor | None, bidirectional: bool, arriving: bool
) -> tuple[Tensor, Tensor]:
    """Q^k for the k parts between two ranks, zero against the direction, and where a part between lets nothing pass."""
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


class SequenceParallelEma(MegaMultiDimensionDampedEma):
    """The moving average of one part of a row; of whole rows where the model is given those, as in generation."""

    def __init__(self, config: MegaConfig, row_slice: RowSlice, exchange: StateExchange) -> None:
        super().__init__(config)
        self.row_slice, self.exchange = row_slice, exchange

    def average(
        self, x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `MegaMultiDimensionDampedEma.average`."""
        if not self.row_slice.cut:
            return super().average(x, coefficients, state, resets)
        if state is not None:
            raise ValueError("a part of a row that is cut over ranks cannot begin with a cached state: give whole rows")
        return damped_ema(x, coefficients, None, resets, bidirectional=self.bidirectional, carry=self.exchange)


def apply_sequence_parallelism(
    model: nn.Module, config: MegaConfig, row_slice: RowSlice, exchange: StateExchange
) -> None:
    """Have the moving averages of a model on the meta device continue across the parts of a row.

    Args:
        model: changed in place; parameters keep their names.
        config: of the model.
        row_slice: tells when the model is given parts of rows.
        exchange: brings states from part to part.
    """

    def build(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) is not MegaMultiDimensionDampedEma:
            return None
        return on_meta(SequenceParallelEma, config, row_slice, exchange)

    replace_modules(model, build)
