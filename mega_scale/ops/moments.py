"""Moments of runs of tokens: what joins them, what all prefixes of a row hold, and how they travel between its parts.

A run of tokens has a count n, a mean M and a population variance V. Runs A and B make one of n = nA + nB tokens, and
with the share s = nB / n: `M = MA + s (MB - MA)`, `V = VA + s (VB - VA) + s (1 - s) (MB - MA)^2`. A run in which a
document begins holds what follows the last start, and hides what came before. Both are associative: runs are joined
inside blocks, over blocks and over the parts of a row. Between tokens, statistics are in fp64.

Legend: B batch, L length, D channels, G groups, P parts of a row, M blocks of c tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import ANY_LENGTH, chunk_count, join_chunks, split_chunks, tracing

_BLOCK = 64  # tokens
_MOST_BLOCKS = 2**16  # of a program that is made for every length


class Moments(NamedTuple):
    """Statistics of the tokens of a document so far: what the norm hands from one call to the next.

    Where nothing was counted, the mean is 0 and the variance 1, which nothing reads.
    """

    count: Tensor  # type: ignore[assignment]  # (B,) int64: valid tokens
    mean: Tensor  # (B, G), fp32 or fp64
    var: Tensor  # (B, G), population variance, in the dtype of the mean


MomentTurn = Callable[[Tensor, Tensor], Callable[[], tuple[Tensor, Tensor]]]
MomentCarry = Callable[[Moments, Tensor | None, bool], Callable[[], tuple[Moments, MomentTurn]]]
"""How moments travel between the parts of a row that is cut along its length, without autograd. Each of two exchanges
starts early and is awaited late: a call starts it, and returns the function that waits for it.

`arrive = carry(total, begins, whole)` starts to send what this part holds:

* total: the moments of this part's tokens alone, after its last document start if one is in it;
* begins: (B,) bool, true where a document begins in this part; none: nowhere in any part;
* whole: every token of every part counts, and no document begins in them: counts are L and need not travel.

`before, turn = arrive()` waits for the other parts' totals; before: the moments before this part (`part_borders`).

Backward, `finish = turn(d_mean, d_var)` starts to send the gradients of this part's own loss by the mean and variance
before it, (B, G) each; `d_mean, d_var = finish()` waits, and gives the gradients of all later parts' losses by the
moments after this part (`later_gradients`).
"""


class Rules(NamedTuple):
    """What is not differentiated; see `timestep_norm`."""

    groups: int
    eps: float
    resets: Tensor | None
    valid: Tensor | None
    carry: MomentCarry | None
    dtype: torch.dtype  # of arithmetic with tokens: that of x, at least fp32


def known_state(x: Tensor, groups: int, dtype: torch.dtype, state: Moments | None) -> Moments:
    """The state in a dtype; zeros where nothing was counted, whatever an empty state holds."""
    if state is None:
        rows = x.shape[0]  # for exporters and tracers, len(x) would be a constant
        mean = x.new_zeros(rows, groups, dtype=dtype)
        return Moments(torch.zeros(rows, dtype=torch.int64, device=x.device), mean, torch.zeros_like(mean))
    empty = (state.count == 0)[:, None]
    return Moments(state.count, *(t.to(dtype).masked_fill(empty, 0) for t in state[1:]))


def token_counts(rules: Rules, count: Tensor, x: Tensor) -> Tensor:
    """n of every token, (B, L) int64, from that before the first one, (B,)."""
    if rules.valid is None:
        counts = torch.arange(1, x.shape[1] + 1, device=x.device).expand(x.shape[:2])
    else:
        counts = rules.valid.cumsum(1)
    if rules.resets is None:
        return counts + count[:, None]
    before = counts - 1 if rules.valid is None else counts - rules.valid.long()
    begin = torch.where(rules.resets, before, -count[:, None]).cummax(1).values
    return counts - begin


def part_kinds(rules: Rules) -> tuple[Tensor | None, bool]:
    """What a carry is told of a part besides its total."""
    return None if rules.resets is None else rules.resets.any(1), rules.resets is None and rules.valid is None


_Run = tuple[Tensor, ...]
_Join = Callable[[_Run, _Run], _Run]


def _together(before: _Run, after: _Run) -> _Run:
    """Count, mean and variance of two runs of tokens together; counts are of any dtype."""
    (n, mean, var), (more, other, spread) = before, after
    both = n + more
    share = more.to(mean.dtype) / both.clamp(min=1).to(mean.dtype)
    step = other - mean
    return both, mean + share * step, var + share * (spread - var) + share * (1 - share) * step.square()


def _segmented(join: _Join) -> _Join:
    """The same for runs that first say whether they keep out what came before, be it infinite."""

    def joined(before: _Run, after: _Run) -> _Run:
        both = join(before[1:], after[1:])
        return before[0] | after[0], *(torch.where(after[0], own, t) for own, t in zip(after[1:], both, strict=True))

    return joined


def running_moments(rules: Rules, a: Tensor, b: Tensor) -> _Run:
    """What tokens up to each one hold, from the last document start on: whether there is one in the row, (B, L, 1), and
    count (B, L, 1), mean and variance (B, L, G); the first only where documents begin."""
    if rules.valid is None:
        runs = torch.ones_like(a[..., :1]), a, b
    else:
        valid = rules.valid[..., None]
        runs = valid.to(a.dtype), torch.where(valid, a, 0), torch.where(valid, b, 0)
    if rules.resets is None:
        return _prefixes(_together, runs)
    return _prefixes(_segmented(_together), (rules.resets[..., None], *runs))


def moments_after(state: Moments, runs: _Run) -> tuple[Tensor, Tensor]:
    """Mean and variance of every token, (B, L, G), from the state before the first one."""
    before: _Run = state.count[:, None, None], state.mean[:, None], state.var[:, None]
    if len(runs) == 3:
        _, mean, var = _together(before, runs)
    else:
        _, _, mean, var = _segmented(_together)((torch.zeros_like(runs[0][:, :1]), *before), runs)
    return mean, var


def later_sums(rules: Rules, by_var: Tensor, by_mean: Tensor, pivot: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Sums from each token to the end of its document, of `Q = gV / n` and `U = (gM + 2 (pivot - M) gV) / n`.

    The pivot of U is each token's own mean, so that only differences of means appear. Arguments are gV / n, gM / n and
    M of every token, (B, L, G). Returns first whether a document begins behind the token, (B, L, 1); none: nowhere.
    """

    def join(later: _Run, own: _Run) -> _Run:
        q, u, m = later
        return own[0] + q, own[1] + u + 2 * (own[2] - m) * q, own[2]

    runs = tuple(t.flip(1) for t in (by_var, by_mean, pivot))
    if rules.resets is None:
        q, u, _ = _prefixes(join, runs)
        return None, q.flip(1), u.flip(1)
    begins = F.pad(rules.resets[:, 1:], (0, 1))[..., None].flip(1)
    shut, q, u, _ = _prefixes(_segmented(join), (begins, *runs))
    return shut.flip(1), q.flip(1), u.flip(1)


def _prefixes(join: _Join, runs: _Run) -> _Run:
    """Each token's run joined with all before it: tensors (B, L, ...); zeros are a run of no tokens."""
    length = runs[0].shape[1]
    static = tracing() not in ANY_LENGTH
    if static and length <= _BLOCK:
        return _joined(join, runs, length)
    blocks = chunk_count(length, _BLOCK)
    padding = (0, 0, 0, blocks * _BLOCK - length)
    batch = runs[0].shape[0]
    inside = tuple(split_chunks(F.pad(t, padding), _BLOCK).flatten(0, 1) for t in runs)
    inside = tuple(t.unflatten(0, (batch, -1)) for t in _joined(join, inside, _BLOCK))  # (B, M, c, ...)
    totals = tuple(t[:, :, -1] for t in inside)
    ends = _joined(join, totals, blocks if static else _MOST_BLOCKS)
    # No size here is one less than another: an exporter would keep whether it is 1.
    place = torch.arange(blocks, device=runs[0].device)
    before = tuple(
        torch.where((place > 0)[:, None], t[:, (place - 1).clamp(min=0)], torch.zeros_like(t))[:, :, None] for t in ends
    )
    return tuple(join_chunks(t, 0, length) for t in join(before, inside))


def _joined(join: _Join, runs: _Run, most: int) -> _Run:
    """The same in steps that double the length of runs, which is at most `most`."""
    distance = 1
    while distance < most:
        if tracing() in ANY_LENGTH:
            place = torch.arange(runs[0].shape[1], device=runs[0].device)
            both = join(tuple(t[:, (place - distance).clamp(min=0)] for t in runs), runs)
            runs = tuple(torch.where((place >= distance)[:, None], *pair) for pair in zip(both, runs, strict=True))
        else:
            both = join(tuple(t[:, :-distance] for t in runs), tuple(t[:, distance:] for t in runs))
            runs = tuple(torch.cat([t[:, :distance], own], 1) for t, own in zip(runs, both, strict=True))
        distance *= 2
    return runs


def part_borders(totals: Moments, begins: Tensor | None) -> Moments:
    """Moments between the parts of a row, from those of its parts alone: (P, B, ...) to (P + 1, B, ...).

    Entry r lies before part r, so the last one after the row; begins (P, B) as in `MomentCarry`.
    """
    join: _Join = _together
    runs: _Run = totals.count[..., None], totals.mean, totals.var
    if begins is not None:
        join, runs = _segmented(_together), (begins[..., None], *runs)
    found = [tuple(torch.zeros_like(t[0]) for t in runs)]
    for part in range(len(totals.mean)):
        found.append(join(found[-1], tuple(t[part] for t in runs)))
    count, mean, var = (torch.stack(t) for t in list(zip(*found, strict=True))[-3:])
    return Moments(count[..., 0], mean, var)


def later_gradients(
    part: int, borders: Moments, begins: Tensor | None, d_mean: Tensor, d_var: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of all later parts' losses by the mean and variance after part `part`, (B, G) each.

    With n, M after this part and n_s, M_s before part s: `G_V = n sum_s gV_s / n_s`, `G_M = n sum_s (gM_s + 2 (M - M_s)
    gV_s) / n_s`, up to the first later part in which a document begins; its tokens before that start count.

    Args:
        part: the number of this part.
        borders: (P + 1, B, ...), of `part_borders`.
        begins: (P, B) bool, as there.
        d_mean: (P, B, G), gradients of each part's own loss by the mean before it.
        d_var: (P, B, G), those by the variance.
    """
    count, mean, _ = (t[part + 1] for t in borders)
    of_mean, of_var = torch.zeros_like(mean), torch.zeros_like(mean)
    reached = count > 0
    for later in range(part + 1, len(d_mean)):
        n, before = (t.to(mean.dtype) for t in (count, borders.count[later].clamp(min=1)))
        share = torch.where(reached, n / before, 0)[:, None]
        of_var = of_var + share * d_var[later]
        of_mean = of_mean + share * (d_mean[later] + 2 * (mean - borders.mean[later]) * d_var[later])
        if begins is not None:
            reached = reached & ~begins[later]
    return of_mean, of_var
