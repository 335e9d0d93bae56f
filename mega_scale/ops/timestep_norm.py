"""The timestep norm (arXiv 2404.08801, section 3.2): group statistics over all tokens of the document so far.

Channels form G groups of D / G. Token t is normalised by the mean M_t and the population variance V_t of all numbers of
its group in the n_t valid tokens of its document up to itself. With a_t and b_t, mean and variance of token t alone:

    M_t = sum_{s<=t} a_s / n_t,   V_t = sum_{s<=t} (b_s + (a_s - M_t)^2) / n_t
    y_t = (x_t - M_t) / sqrt(V_t + eps) (weight + 1) + bias

* recurrent: one token after the other, by Welford's update. The truth that all other forms are tested against.
* blocked: statistics of runs of tokens, joined two by two inside blocks and then over blocks; a backward pass by hand.

Legend: B batch, L length, D channels, G groups, P parts of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import (
    ANY_LENGTH,
    chunk_count,
    join_chunks,
    once_differentiable,
    split_chunks,
    tracing,
    without_autocast,
)

IMPLEMENTATIONS = ("auto", "recurrent", "blocked")
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


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    state: Moments | None = None,
    resets: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    carry: MomentCarry | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Moments]:
    """Normalise each token by the statistics of its document up to itself, per group of channels.

    Args:
        x: (B, L, D), L at least 1, any floating dtype.
        weight: (D,); the scale is weight + 1.
        bias: (D,).
        groups: G, contiguous groups of D / G channels, at least 2 in each.
        eps: added to the variance.
        state: moments before the first token; none: no token came before.
        resets: (B, L) bool, true where a document begins: moments are forgotten before that token.
        valid: (B, L) bool, false for padding, which does not count and gives zeros; none: all true.
        carry: where x is one part of a longer row, brings the moments before it, in place of `state`.
        impl: auto, recurrent (the reference) or blocked. auto is recurrent for one token, else blocked.

    Returns:
        y (B, L, D) in the dtype of x, and the moments after the last token, in the widest of fp32, the dtype of x and
        that of the state. A state in fp64 so stays in it, as 10^5 tokens that are decoded one by one need: their fp32
        means would be off by 1e-5 of the deviation, by more where the mean is larger.

    Raises:
        ValueError: a shape, a dtype or the number of groups does not fit, or the implementation is unknown.
    """
    _check(x, weight, bias, groups, state, resets, valid, impl)
    if carry is not None and state is not None:
        raise ValueError(f"carry brings the state: it excludes a state of counts {tuple(state.count.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = wide if state is None else torch.promote_types(wide, state.mean.dtype)
    rules = _Rules(groups, eps, resets, valid, carry, wide)
    with without_autocast(x.device):
        if impl == "auto":
            impl = "blocked" if x.shape[1] > 1 or carry is not None or tracing() == "trace" else "recurrent"
        if impl == "recurrent":
            if carry is not None:
                raise ValueError("impl='recurrent' takes no carry: use impl='blocked'")
            form, known = _recurrent, _known(x, groups, dtype, state)
        else:
            form = _traced if tracing() == "trace" else _Norm.apply
            known = _known(x, groups, torch.float64, state)
        y, count, mean, var = form(rules, x, weight, bias, *known)
        empty = (count == 0)[:, None]
        return y, Moments(count, mean.to(dtype).masked_fill(empty, 0), var.to(dtype).masked_fill(empty, 1))


class _Rules(NamedTuple):
    """What is not differentiated; see `timestep_norm`."""

    groups: int
    eps: float
    resets: Tensor | None
    valid: Tensor | None
    carry: MomentCarry | None
    dtype: torch.dtype  # of arithmetic with tokens: that of x, at least fp32


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    state: Moments | None,
    resets: Tensor | None,
    valid: Tensor | None,
    impl: str,
) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}")
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (batch, length of at least 1, channels)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}: expected a floating dtype")
    batch, length, channels = x.shape
    if groups < 1 or channels % groups or groups == channels:
        raise ValueError(
            f"groups={groups} does not suit {channels} channels: choose a divisor of {channels} below it, as a group "
            "of one channel has no variance at the first token"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != (channels,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {(channels,)}")
    for name, flags in (("resets", resets), ("valid", valid)):
        if flags is not None and (tuple(flags.shape) != (batch, length) or flags.dtype != torch.bool):
            raise ValueError(f"{name} is {flags.dtype} {tuple(flags.shape)}: expected bool {(batch, length)}")
    if state is None:
        return
    if tuple(state.count.shape) != (batch,) or state.count.dtype != torch.int64:
        raise ValueError(f"state.count is {state.count.dtype} {tuple(state.count.shape)}: expected int64 {(batch,)}")
    for name, tensor in (("mean", state.mean), ("var", state.var)):
        if tuple(tensor.shape) != (batch, groups) or not tensor.is_floating_point():
            raise ValueError(
                f"state.{name} is {tensor.dtype} {tuple(tensor.shape)}: expected floating {(batch, groups)}"
            )


def _known(x: Tensor, groups: int, dtype: torch.dtype, state: Moments | None) -> Moments:
    """The state in a dtype; zeros where nothing was counted, whatever an empty state holds."""
    if state is None:
        mean = x.new_zeros(len(x), groups, dtype=dtype)
        return Moments(torch.zeros(len(x), dtype=torch.int64, device=x.device), mean, torch.zeros_like(mean))
    empty = (state.count == 0)[:, None]
    return Moments(state.count, *(t.to(dtype).masked_fill(empty, 0) for t in state[1:]))


def _recurrent(
    rules: _Rules, x: Tensor, weight: Tensor, bias: Tensor, count: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    """Welford's update: `n' = n + 1`, `M' = M + (a - M) / n'`, `V' = V + (b - V) / n' + n (a - M)^2 / n'^2`.

    Returns y, and count, mean and variance after the last token.
    """
    a, b = _token_moments(rules, x, mean.dtype)
    means, variances = [], []
    for t in range(x.shape[1]):
        if rules.resets is not None:
            begins = rules.resets[:, t]
            count = count.masked_fill(begins, 0)
            mean, var = (moment.masked_fill(begins[:, None], 0) for moment in (mean, var))
        share = 1 / (count + 1).to(mean.dtype)[:, None]
        step = a[:, t] - mean
        after = mean + share * step, var + share * (b[:, t] - var) + share * (1 - share) * step.square()
        if rules.valid is None:
            count, (mean, var) = count + 1, after
        else:
            counts = rules.valid[:, t]
            count = count + counts
            mean, var = (torch.where(counts[:, None], *pair) for pair in zip(after, (mean, var), strict=True))
        means.append(mean)
        variances.append(var)
    return _normalised(rules, x, weight, bias, torch.stack(means, 1), torch.stack(variances, 1)), count, mean, var


def _token_moments(rules: _Rules, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group's channels of every token, (B, L, G) each, in `dtype`."""
    tokens = x.to(rules.dtype).unflatten(2, (rules.groups, -1))
    mean = tokens.mean(3)
    centred = tokens - mean[..., None]
    rest = centred.mean(3).to(dtype)  # what the mean was rounded by
    return mean.to(dtype) + rest, centred.square().mean(3).to(dtype) - rest.square()


def _normalised(rules: _Rules, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """`(x - mean) / sqrt(var + eps) (weight + 1) + bias` in the dtype of x, zero in padding; mean and var (B, L, G)."""
    high, rstd = mean.to(rules.dtype), torch.rsqrt(var + rules.eps).to(rules.dtype)
    tokens = x.to(rules.dtype).unflatten(2, (rules.groups, -1)) - high[..., None]
    if mean.dtype != rules.dtype:  # the difference is nearly exact, and large where the deviation is small
        tokens = tokens - (mean - high).to(rules.dtype)[..., None]
    y = (tokens * rstd[..., None]).flatten(2)
    y = (y * (weight.to(rules.dtype) + 1) + bias.to(rules.dtype)).to(x.dtype)
    return y if rules.valid is None else torch.where(rules.valid[..., None], y, 0)


def _traced(
    rules: _Rules, x: Tensor, weight: Tensor, bias: Tensor, count: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    """The blocked form by PyTorch's operators alone, differentiable any number of times."""
    means, variances = _after(Moments(count, mean, var), _runs(rules, *_token_moments(rules, x, mean.dtype)))
    y = _normalised(rules, x, weight, bias, means, variances)
    return y, _counts(rules, count, x)[:, -1], means[:, -1], variances[:, -1]


class _Norm(torch.autograd.Function):
    """The blocked form; keeps x and two numbers a token and group."""

    @staticmethod
    def forward(
        ctx: Any, rules: _Rules, x: Tensor, weight: Tensor, bias: Tensor, count: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.rules = rules
        ctx.turn = None
        a, b = _token_moments(rules, x, mean.dtype)
        if rules.carry is None:
            runs = _runs(rules, a, b)
        else:
            begins = None if rules.resets is None else rules.resets.any(1)
            arrive = rules.carry(_total(rules, a, b), begins, begins is None and rules.valid is None)
            runs = _runs(rules, a, b)
            before, ctx.turn = arrive()
            count, mean, var = _known(x, rules.groups, mean.dtype, before)
        means, variances = _after(Moments(count, mean, var), runs)
        rstd = torch.rsqrt(variances + rules.eps)
        ctx.save_for_backward(x, weight, bias, means.to(rules.dtype), rstd.to(rules.dtype), count, mean)
        end = _counts(rules, count, x)[:, -1].clone()
        ctx.mark_non_differentiable(end)
        y = _normalised(rules, x, weight, bias, means, variances)
        return y, end, means[:, -1].clone(), variances[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, d_count: None, d_mean: Tensor | None, d_var: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, means, rstd, count, mean = ctx.saved_tensors
        rules: _Rules = ctx.rules
        dy = torch.zeros_like(x) if dy is None else dy
        counts = _counts(rules, count, x)[..., None]
        share = torch.where(counts > 0, 1 / counts.to(rstd.dtype), 0)
        of_mean, of_var, d_weight, d_bias = _slopes(rules, x, dy, weight, means, rstd)
        if d_mean is not None:
            of_mean[:, -1] += d_mean.to(rules.dtype)
        if d_var is not None:
            of_var[:, -1] += d_var.to(rules.dtype)
        shut, by_var, by_mean = _later(rules, of_var * share, of_mean * share, means)
        reach = count.to(rstd.dtype)[:, None]
        if rules.resets is not None:  # a document that begins the row keeps the state out
            reach = reach.masked_fill(rules.resets[:, :1], 0)
        first = by_var[:, 0]
        d_before = reach * (by_mean[:, 0] + 2 * (mean.to(rules.dtype) - means[:, 0]) * first), reach * first
        if ctx.turn is not None:
            end_mean, end_var = (t.to(rules.dtype)[:, None] * share[:, -1:] for t in ctx.turn(*d_before)())
            end_mean, end_var = end_mean + 2 * (means - means[:, -1:]) * end_var, end_var.expand_as(means)
            if shut is not None:
                end_mean, end_var = (t.masked_fill(shut, 0) for t in (end_mean, end_var))
            by_mean, by_var = by_mean + end_mean, by_var + end_var
        dx = _tokens_gradient(rules, x, dy, weight, means, rstd, by_mean, by_var)
        d_state = (None, None) if ctx.turn is not None else [t.to(mean.dtype) for t in d_before]
        return None, dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, *d_state


def _counts(rules: _Rules, count: Tensor, x: Tensor) -> Tensor:
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


def _total(rules: _Rules, a: Tensor, b: Tensor) -> Moments:
    """Moments of the tokens after the last document start, by plain sums."""
    counted = torch.ones_like(a[..., 0], dtype=torch.bool) if rules.valid is None else rules.valid
    if rules.resets is not None:
        later = rules.resets.flip(1).cumsum(1).flip(1) - rules.resets.long()
        counted = counted & (later == 0)
    count = counted.sum(1)
    share = 1 / count.clamp(min=1).to(a.dtype)[:, None]
    mean = torch.where(counted[..., None], a, 0).sum(1) * share
    squares = torch.where(counted[..., None], b + (a - mean[:, None]).square(), 0)
    return Moments(count, mean.to(rules.dtype), (squares.sum(1) * share).to(rules.dtype))


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


def _runs(rules: _Rules, a: Tensor, b: Tensor) -> _Run:
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


def _after(state: Moments, runs: _Run) -> tuple[Tensor, Tensor]:
    """Mean and variance of every token, (B, L, G), from the state before the first one."""
    before: _Run = state.count[:, None, None], state.mean[:, None], state.var[:, None]
    if len(runs) == 3:
        _, mean, var = _together(before, runs)
    else:
        _, _, mean, var = _segmented(_together)((torch.zeros_like(runs[0][:, :1]), *before), runs)
    return mean, var


def _slopes(
    rules: _Rules, x: Tensor, dy: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each token's own output asks of its mean and variance, (B, L, G), and gradients of weight and bias."""
    dy = dy.to(mean.dtype)
    centred = x.to(mean.dtype).unflatten(2, (rules.groups, -1)) - mean[..., None]
    if rules.valid is not None:
        dy, centred = torch.where(rules.valid[..., None], dy, 0), torch.where(rules.valid[..., None, None], centred, 0)
    slopes = (dy * (weight.to(mean.dtype) + 1)).view(centred.shape)
    of_mean = -rstd * slopes.sum(3)
    of_var = -0.5 * rstd**3 * (slopes * centred).sum(3)
    d_weight = (dy * (centred * rstd[..., None]).flatten(2)).sum((0, 1))
    return of_mean, of_var, d_weight, dy.sum((0, 1))


def _later(rules: _Rules, by_var: Tensor, by_mean: Tensor, pivot: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
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


def _tokens_gradient(
    rules: _Rules, x: Tensor, dy: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, by_mean: Tensor, by_var: Tensor
) -> Tensor:
    """`dx = dy (weight + 1) rstd + (U + 2 (x - M) Q) G / D`, in the dtype of x."""
    slopes = (dy.to(mean.dtype) * (weight.to(mean.dtype) + 1)).unflatten(2, (rules.groups, -1))
    centred = x.to(mean.dtype).unflatten(2, (rules.groups, -1)) - mean[..., None]
    size = slopes.shape[3]
    dx = slopes * rstd[..., None] + (by_mean / size)[..., None] + centred * (2 / size * by_var)[..., None]
    dx = dx.flatten(2).to(x.dtype)
    return dx if rules.valid is None else torch.where(rules.valid[..., None], dx, 0)


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
