"""Sequence parallelism: every rank computes whole chunks of a row, and only states of averages and norms travel.

Moving averages. Rank r averages its part of a row from zero, and gets the end states S_j of all others in one
all-gather a direction. With Q the fade of a state over one part, the state before part r is
`sum_{j<r} Q^(r-1-j) S_j`. Backward, the gradients G_r of those states travel the same way, and
`dS_j = sum_{r>j} conj(Q)^(r-1-j) G_r`. Complex states travel as pairs of reals.

Timestep norms. Rank r gets counts, means and variances of all other parts, and joins those before its own. Backward,
the gradients of every rank's loss by the moments before its part travel; `ops.timestep_norm` has the arithmetic.

Attention stays inside chunks.

Legend: P ranks of the axis, B rows, R channels, N moving averages per channel, G groups of channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import register_constant

from mega_scale.ops import operator, tracing
from mega_scale.ops.ema import Fade, Turn, forget
from mega_scale.ops.timestep_norm import Moments, MomentTurn, later_gradients, part_borders
from mega_scale.parallel.world import Axis, Pending, collective, start_gather

# Integers that hold the bits of a number.
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


class _Exchange:
    """What travels over an axis; two over the same are one to a compiler, which makes one graph for all blocks."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._axis == vars(other)["_axis"]

    def __hash__(self) -> int:
        return hash((type(self), self._axis))

    def start(self, x: Tensor, forward: bool = True) -> Pending:
        """Start to collect the x of all ranks, (P, *x.shape), in the forward pass or in the backward pass."""
        if tracing() is not None:  # a compiler: an operator waits at once
            return Pending(collective(x, self._axis, "gather", forward), None)
        # A recomputed block gets again what it received in its forward pass.
        return self._axis.start(lambda: start_gather(x, self._axis)) if forward else start_gather(x, self._axis)


def _like(x: Tensor, received: Tensor) -> Tensor:
    return torch.empty_like(x)


@operator(_like)
def _keep_gather(x: Tensor, received: Tensor) -> Tensor:
    """x, made to depend on what was received: a compiler would leave out a gather whose outcome this rank does not
    need, as the first or the last one, and the others would wait for it."""
    return x.clone()


class StateExchange(_Exchange):
    """Brings every part of a row the state before it: the `carry` of `damped_ema`, over the ranks that share a row."""

    def __call__(self, end: Tensor, fade: Fade, resets: Tensor | None, back: bool) -> tuple[Tensor, Turn]:
        """See `Carry`: end (B, R, N), or pairs (B, R, N, 2)."""
        axis, pairs = self._axis, fade.angle is not None

        def numbers(reals: Tensor) -> Tensor:
            return torch.view_as_complex(reals.contiguous()) if pairs else reals

        def reals(numbers: Tensor) -> Tensor:
            return torch.view_as_real(numbers.resolve_conj()) if pairs else numbers

        # A document that begins this part keeps what lies to its right from what lies to its left.
        shut = resets[:, 0] if back and resets is not None else None
        # One collective more, of one byte a row, where documents begin inside of rows.
        flags = None if resets is None else self.start((~resets.any(1)).to(torch.uint8))
        pending = self.start(end if shut is None else forget(end, shut))
        passes = None if flags is None else flags.wait().bool()
        weights, distance = _weights(axis, fade, passes, not back, end.dtype)

        def turn(d_state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            returning = self.start(d_state, forward=False)
            # Each rank counts the paths that end at it; the sum over ranks, which all parameters get, counts every one.
            # A power w = exp((log + i angle) k) has the gradients Re and -Im of k conj(dw) w.
            d_fade = torch.einsum(
                "pbrn,brn,pbrn,p->rn", numbers(pending.buffer), numbers(d_state).conj(), weights, distance
            )
            onward, _ = _weights(axis, fade, passes, back, end.dtype)
            d_end = reals(torch.einsum("pbrn,pbrn->brn", numbers(returning.wait()), onward.conj()))
            parts = (d_fade.real, -d_fade.imag) if pairs else (d_fade,)
            return d_end if shut is None else forget(d_end, shut), tuple(part.to(fade.log.dtype) for part in parts)

        return reals(torch.einsum("pbrn,pbrn->brn", numbers(pending.wait()), weights)), turn


class MomentExchange(_Exchange):
    """Brings every part of a row the moments before it: the `carry` of `timestep_norm`, over ranks that share a row."""

    def __call__(self, total: Moments, begins: Tensor | None, whole: bool) -> Callable[[], tuple[Moments, MomentTurn]]:
        """See `MomentCarry`: 2 G numbers a row travel, and one more unless `whole`; back, 2 G numbers."""
        axis, dtype, groups = self._axis, total.mean.dtype, total.mean.shape[1]
        integers = _INTEGERS[dtype]
        sent = [total.mean.view(integers), total.var.view(integers)]
        if not whole:
            # A count, of at least 0, or its complement where a document begins.
            code = total.count if begins is None else torch.where(begins, ~total.count, total.count)
            sent.append(code.to(integers)[:, None])
        pending = self.start(torch.cat(sent, 1))

        def arrive() -> tuple[Moments, MomentTurn]:
            received = pending.wait()
            mean, var = received[..., : 2 * groups].view(dtype).chunk(2, 2)
            counts, began = total.count.expand(axis.size, -1), None
            if not whole:
                code = received[..., -1].long()
                counts, began = torch.where(code < 0, ~code, code), None if begins is None else code < 0
            borders = part_borders(Moments(counts, mean, var), began)

            def turn(d_mean: Tensor, d_var: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
                returning = self.start(torch.cat([d_mean, d_var], 1), forward=False)

                def finish() -> tuple[Tensor, Tensor]:
                    others = returning.wait()
                    of_mean, of_var = later_gradients(axis.rank, borders, began, *others.chunk(2, 2))
                    return of_mean if tracing() is None else _keep_gather(of_mean, others), of_var

                return finish

            count, mean, var = (tensor[axis.rank] for tensor in borders)
            return Moments(count, mean if tracing() is None else _keep_gather(mean, received), var), turn

        return arrive


register_constant(StateExchange)
register_constant(MomentExchange)


def _weights(
    axis: Axis, fade: Fade, passes: Tensor | None, from_left: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """How much of each rank's states, of a real dtype, reaches this part from the left, or from the right.

    Q^k for the k parts between the two, zero from the other side, and where a part between lets nothing pass.

    Returns:
        (P, B or 1, R, N), complex if Q is, and over how many parts, (P,) likewise.
    """
    own, others = axis.rank, torch.arange(axis.size, device=fade.log.device)
    between = (own - others if from_left else others - own) - 1
    distance = between.clamp(min=0)
    powers = fade.power(distance[:, None, None].to(fade.log.dtype)).value(dtype)
    powers = powers if fade.angle is None else torch.view_as_complex(powers)
    distance, weights = distance.to(powers.dtype), powers * (between >= 0)[:, None, None]
    if passes is None:
        return weights[:, None], distance
    # Every part strictly between the two must pass; a running count of closed ones says how many there are.
    closed = torch.cat([torch.zeros_like(passes[:1], dtype=torch.long), (~passes).cumsum(0)])  # (P + 1, B)
    low, high = others.clamp(max=own), others.clamp(min=own)
    inside = closed[high] - closed[torch.minimum(low + 1, high)]  # (P, B)
    return weights[:, None] * (inside == 0)[:, :, None, None], distance
