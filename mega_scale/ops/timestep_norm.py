"""The timestep norm (arXiv 2404.08801, section 3.2): group statistics over all tokens of the document so far.

Channels form G groups of D / G. Token t is normalised by the mean M_t and the population variance V_t of all numbers of
its group in the n_t valid tokens of its document up to itself. With a_t and b_t, mean and variance of token t alone:

    M_t = sum_{s<=t} a_s / n_t,   V_t = sum_{s<=t} (b_s + (a_s - M_t)^2) / n_t
    y_t = (x_t - M_t) / sqrt(V_t + eps) (weight + 1) + bias

* recurrent: one token after the other, by Welford's update. The truth that all other forms are tested against.

Legend: B batch, L length, D channels, G groups, P parts of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mega_scale.ops import without_autocast

IMPLEMENTATIONS = ("auto", "recurrent")


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
        impl: auto or recurrent (the reference).

    Returns:
        y (B, L, D) in the dtype of x, and the moments after the last token, in the widest of fp32, the dtype of x and
        that of the state; statistics are computed in this dtype whatever autocast says.

    Raises:
        ValueError: a shape, a dtype or the number of groups does not fit, or the implementation is unknown.
    """
    _check(x, weight, bias, groups, state, resets, valid, impl)
    if carry is not None and state is not None:
        raise ValueError(f"carry brings the state: it excludes a state of counts {tuple(state.count.shape)}")
    if carry is not None:
        raise ValueError("carry is not implemented")
    given, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    if state is not None:
        dtype = torch.promote_types(dtype, state.mean.dtype)
    with without_autocast(x.device):
        state = _known(x.to(dtype), groups, state)
        y, end = _recurrent(x.to(dtype), weight.to(dtype), bias.to(dtype), groups, eps, state, resets, valid)
        empty = (end.count == 0)[:, None]
        return y.to(given), Moments(end.count, end.mean.masked_fill(empty, 0), end.var.masked_fill(empty, 1))


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


def _known(x: Tensor, groups: int, state: Moments | None) -> Moments:
    """The state in the dtype of x; zeros where nothing was counted, whatever an empty state holds."""
    if state is None:
        mean = x.new_zeros(len(x), groups)
        return Moments(torch.zeros(len(x), dtype=torch.int64, device=x.device), mean, torch.zeros_like(mean))
    empty = (state.count == 0)[:, None]
    return Moments(state.count, *(t.to(x.dtype).masked_fill(empty, 0) for t in state[1:]))


def _recurrent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    state: Moments,
    resets: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Moments]:
    """Welford's update: `n' = n + 1`, `M' = M + (a - M) / n'`, `V' = V + (b - V) / n' + n (a - M)^2 / n'^2`."""
    count, mean, var = state
    tokens = x.unflatten(2, (groups, -1))
    means, variances = [], []
    for t in range(x.shape[1]):
        if resets is not None:
            begins = resets[:, t]
            count = count.masked_fill(begins, 0)
            mean, var = (moment.masked_fill(begins[:, None], 0) for moment in (mean, var))
        a = tokens[:, t].mean(2)
        b = (tokens[:, t] - a[..., None]).square().mean(2)
        share = 1 / (count + 1).to(x.dtype)[:, None]
        step = a - mean
        after = count + 1, mean + share * step, var + share * (b - var) + share * (1 - share) * step.square()
        if valid is None:
            count, mean, var = after
        else:
            counts = valid[:, t]
            count = torch.where(counts, after[0], count)
            mean = torch.where(counts[:, None], after[1], mean)
            var = torch.where(counts[:, None], after[2], var)
        means.append(mean)
        variances.append(var)
    y = _normalised(x, weight, bias, torch.stack(means, 1), torch.rsqrt(torch.stack(variances, 1) + eps))
    return y if valid is None else torch.where(valid[..., None], y, 0), Moments(count, mean, var)


def _normalised(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """`(x - mean) rstd (weight + 1) + bias`: x (B, L, D), mean and rstd (B, L, G)."""
    tokens = x.unflatten(2, (mean.shape[2], -1))
    return ((tokens - mean[..., None]) * rstd[..., None]).flatten(2) * (weight + 1) + bias


def part_borders(totals: Moments, begins: Tensor | None) -> Moments:
    """Moments between the parts of a row, from those of its parts alone: (P, B, ...) to (P + 1, B, ...).

    Entry r lies before part r, so the last one after the row; begins (P, B) as in `MomentCarry`.
    """
    found = [(torch.zeros_like(totals.count[0]), torch.zeros_like(totals.mean[0]), torch.zeros_like(totals.var[0]))]
    for part in range(len(totals.count)):
        after = tuple(t[part] for t in totals)
        joined = _together(found[-1], after)
        if begins is not None:
            # A document start hides what came before, be it infinite.
            shut = begins[part]
            joined = tuple(
                torch.where(shut if own.dim() == 1 else shut[:, None], own, both)
                for own, both in zip(after, joined, strict=True)
            )
        found.append(joined)
    return Moments(*(torch.stack(t) for t in zip(*found, strict=True)))


def _together(before: Any, after: Any) -> Any:
    """Count, mean and variance of two runs of tokens together."""
    (n, mean, var), (more, other, spread) = before, after
    both = n + more
    share = (more.to(mean.dtype) / both.clamp(min=1).to(mean.dtype))[:, None]
    step = other - mean
    return both, mean + share * step, var + share * (spread - var) + share * (1 - share) * step.square()


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
