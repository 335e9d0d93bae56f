"""The timestep norm (arXiv 2404.08801, section 3.2): group statistics over all tokens of the document so far.

Channels form G groups of D / G. Token t is normalised by the mean M_t and the population variance V_t of all numbers of
its group in the n_t valid tokens of its document up to itself. With a_t and b_t, mean and variance of token t alone:

    M_t = sum_{s<=t} a_s / n_t,   V_t = sum_{s<=t} (b_s + (a_s - M_t)^2) / n_t
    y_t = (x_t - M_t) / sqrt(V_t + eps) (weight + 1) + bias

* recurrent: one token after the other, by Welford's update. The truth that all other forms are tested against.
* blocked: statistics of runs of tokens, joined two by two inside blocks and then over blocks; a backward pass by hand.
* native: C++ on CPUs, one pass over memory forward and one backward.
* triton: `timestep_norm_triton.py`, two passes each way.

Legend: B batch, L length, D channels, G groups, P parts of a row.
"""

import ctypes
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops import (
    constant_to_compilers,
    device_kind,
    in_memory,
    load_or_warn,
    once_differentiable,
    opaque,
    operator,
    runs_native,
    runs_triton,
    threads_for,
    tracing,
    without_autocast,
)
from mega_scale.ops.moments import (
    MomentCarry,
    Moments,
    MomentTurn,
    Rules,
    known_state,
    later_gradients,
    later_sums,
    moments_after,
    part_borders,
    part_kinds,
    running_moments,
    token_counts,
)

__all__ = [
    "MomentCarry",
    "MomentTurn",
    "Moments",
    "later_gradients",
    "part_borders",
    "timestep_norm",
    "timestep_norm_and_residuals",
]
IMPLEMENTATIONS = ("auto", "recurrent", "blocked", "native", "triton")
_SOURCE = Path(__file__).with_name("timestep_norm.cpp")


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
        impl: auto, recurrent (the reference), blocked, native or triton. Outside tracers and exporters, auto is
            native on a CPU where a C++ compiler is found (else it warns), and triton on an NVIDIA GPU of compute
            capability 8 or newer where triton is installed, for more than one token; else recurrent for one token;
            else blocked.

    Returns:
        y (B, L, D) in the dtype of x, and the moments after the last token, in the widest of fp32, the dtype of x and
        that of the state. A state in fp64 so stays in it, as 10^5 tokens that are decoded one by one need: their fp32
        means would be off by 1e-5 of the deviation, by more where the mean is larger.

    Raises:
        ValueError: a shape, a dtype or the number of groups does not fit, or the implementation is unknown.
    """
    y, _, moments = timestep_norm_and_residuals(
        x, weight, bias, groups, eps, state, resets, valid, carry=carry, impl=impl
    )
    return y, moments


def timestep_norm_and_residuals(
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
) -> tuple[Tensor, tuple[Tensor, Tensor], Moments]:
    """As `timestep_norm`, and between its results x twice, for what else reads it: the residuals of two hops.

    Triton's backward pass then adds the gradients of these as it writes that of x, in place of kernels that would read
    them again.
    """
    _check(x, weight, bias, groups, state, resets, valid, impl)
    if carry is not None and state is not None:
        raise ValueError(f"carry brings the state: it excludes a state of counts {tuple(state.count.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = wide if state is None else torch.promote_types(wide, state.mean.dtype)
    with without_autocast(x.device):
        if impl == "auto":
            impl = _best(x, carry, weight, bias, *(state or ()))
        known = known_state(x, groups, dtype if impl == "recurrent" else torch.float64, state)
        run = _run
        if tracing() == "compile":
            impl, run = _NODES.get(impl, (impl, _run))
        y, first, second, count, mean, var = run(impl, groups, eps, carry, resets, valid, x, weight, bias, *known)
        empty = (count == 0)[:, None]
        moments = Moments(count, mean.to(dtype).masked_fill(empty, 0), var.to(dtype).masked_fill(empty, 1))
        return y, (first, second), moments


def _run(
    impl: str,
    groups: int,
    eps: float,
    carry: MomentCarry | None,
    resets: Tensor | None,
    valid: Tensor | None,
    x: Tensor,
    *others: Tensor,
) -> tuple[Tensor, ...]:
    """y, x twice for others to read, and count, mean and variance after the last token, by one form."""
    rules = Rules(groups, eps, resets, valid, carry, torch.promote_types(x.dtype, torch.float32))
    if impl == "triton":
        # Not before it is needed: triton may not be installed.
        from mega_scale.ops.timestep_norm_triton import triton_norm  # noqa: PLC0415

        return triton_norm(rules, x, *others)
    form: Any = _traced if impl == "blocked" and tracing() == "trace" else _FORMS[impl]
    y, *end = form(rules, x, *others)
    return y, x, x, *end


def _best(x: Tensor, carry: MomentCarry | None, *others: Tensor) -> str:
    """The implementation that `auto` takes."""
    walks = runs_native(x, *others) or tracing() == "compile"
    if walks and device_kind(x) == "cpu" and _has_library():
        return "native"
    if x.shape[1] > 1 and runs_triton(x, compiled=True):
        return "triton"
    one = x.shape[1] == 1 and carry is None and tracing() != "trace"
    return "recurrent" if one else "blocked"


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


def _recurrent(
    rules: Rules, x: Tensor, weight: Tensor, bias: Tensor, count: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    """Welford's update: `n' = n + 1`, `M' = M + (a - M) / n'`, `V' = V + (b - V) / n' + n (a - M)^2 / n'^2`.

    Returns y, and count, mean and variance after the last token.
    """
    if rules.carry is not None:
        raise ValueError("impl='recurrent' takes no carry: use impl='blocked'")
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


def _token_moments(rules: Rules, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group's channels of every token, (B, L, G) each, in `dtype`."""
    tokens = x.to(rules.dtype).unflatten(2, (rules.groups, -1))
    mean = tokens.mean(3)
    centred = tokens - mean[..., None]
    rest = centred.mean(3).to(dtype)  # what the mean was rounded by
    return mean.to(dtype) + rest, centred.square().mean(3).to(dtype) - rest.square()


def _normalised(rules: Rules, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """`(x - mean) / sqrt(var + eps) (weight + 1) + bias` in the dtype of x, zero in padding; mean and var (B, L, G)."""
    high, rstd = mean.to(rules.dtype), torch.rsqrt(var + rules.eps).to(rules.dtype)
    tokens = x.to(rules.dtype).unflatten(2, (rules.groups, -1)) - high[..., None]
    if mean.dtype != rules.dtype:  # the difference is nearly exact, and large where the deviation is small
        tokens = tokens - (mean - high).to(rules.dtype)[..., None]
    y = (tokens * rstd[..., None]).flatten(2)
    y = (y * (weight.to(rules.dtype) + 1) + bias.to(rules.dtype)).to(x.dtype)
    return y if rules.valid is None else torch.where(rules.valid[..., None], y, 0)


def _traced(
    rules: Rules, x: Tensor, weight: Tensor, bias: Tensor, count: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    """The blocked form by PyTorch's operators alone, differentiable any number of times."""
    if rules.carry is not None:
        raise ValueError("carry passes states between ranks, which tracers and transforms do not take")
    means, variances = moments_after(
        Moments(count, mean, var), running_moments(rules, *_token_moments(rules, x, mean.dtype))
    )
    y = _normalised(rules, x, weight, bias, means, variances)
    return y, token_counts(rules, count, x)[:, -1], means[:, -1], variances[:, -1]


def norm_blocked(
    x: Tensor, weight: Tensor, bias: Tensor, resets: Tensor | None, valid: Tensor | None, count: Tensor, mean: Tensor,
    var: Tensor, groups: int, eps: float, writes: bool, keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `norm_native` computes, by PyTorch's operators, and in any dtype."""
    rules = Rules(groups, eps, resets, valid, None, x.dtype)
    runs = running_moments(rules, *_token_moments(rules, x, mean.dtype))
    means, variances = moments_after(Moments(count, mean, var), runs)
    end = token_counts(rules, count, x)[:, -1].clone()
    y = _normalised(rules, x, weight, bias, means, variances) if writes else x.new_empty(0)
    of_tokens = (means, torch.rsqrt(variances + eps)) if keeps else (x.new_empty(0), x.new_empty(0))
    kept, rstds = (t.to(x.dtype).contiguous() for t in of_tokens)
    return end, means[:, -1].clone(), variances[:, -1].clone(), y.contiguous(), kept, rstds


def norm_blocked_backward(
    x: Tensor, dy: Tensor, weight: Tensor, resets: Tensor | None, valid: Tensor | None, count: Tensor, mean: Tensor,
    means: Tensor, rstds: Tensor, d_mean: Tensor, d_var: Tensor, groups: int, writes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `norm_native_backward` computes."""
    rules = Rules(groups, 0.0, resets, valid, None, x.dtype)
    counts = token_counts(rules, count, x)[..., None]
    share = torch.where(counts > 0, 1 / counts.to(rstds.dtype), 0)
    of_mean, of_var, d_weight, d_bias = _slopes(rules, x, dy, weight, means, rstds)
    of_mean[:, -1] += d_mean.to(rules.dtype)
    of_var[:, -1] += d_var.to(rules.dtype)
    _, by_var, by_mean = later_sums(rules, of_var * share, of_mean * share, means)
    reach = count.to(rstds.dtype)[:, None]
    if resets is not None:  # a document that begins the row keeps the state out
        reach = reach.masked_fill(resets[:, :1], 0)
    first = by_var[:, 0]
    before = reach * (by_mean[:, 0] + 2 * (mean.to(rules.dtype) - means[:, 0]) * first), reach * first
    dx = _tokens_gradient(rules, x, dy, weight, means, rstds, by_mean, by_var) if writes else x.new_empty(0)
    d_mean, d_var = (t.to(mean.dtype) for t in before)
    return d_mean, d_var, torch.stack([d_weight, d_bias]).to(mean.dtype), dx.contiguous()


def _slopes(
    rules: Rules, x: Tensor, dy: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
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


def _tokens_gradient(
    rules: Rules, x: Tensor, dy: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, by_mean: Tensor, by_var: Tensor
) -> Tensor:
    """`dx = dy (weight + 1) rstd + (U + 2 (x - M) Q) G / D`, in the dtype of x."""
    slopes = (dy.to(mean.dtype) * (weight.to(mean.dtype) + 1)).unflatten(2, (rules.groups, -1))
    centred = x.to(mean.dtype).unflatten(2, (rules.groups, -1)) - mean[..., None]
    size = slopes.shape[3]
    dx = slopes * rstd[..., None] + (by_mean / size)[..., None] + centred * (2 / size * by_var)[..., None]
    dx = dx.flatten(2).to(x.dtype)
    return dx if rules.valid is None else torch.where(rules.valid[..., None], dx, 0)


def _native(
    rules: Rules, x: Tensor, weight: Tensor, bias: Tensor, count: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    """The recurrence by compiled C++."""
    if x.device.type != "cpu" or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        raise ValueError(f"impl='native' runs on a CPU outside tracers, and x is on {x.device}: use impl='auto'")
    if library() is None:
        raise ValueError("impl='native' could not be compiled, as the warning said: use impl='blocked'")
    # C++ itself where it can be, as an operator costs a short row more than its gates.
    passes = _NATIVE if in_memory(x, weight, bias, mean, var) else _NATIVE_OPERATORS
    return _in_passes(passes, rules, x, weight, bias, count, mean, var)


def _in_passes(passes: tuple[Any, Any], rules: Rules, *given: Tensor) -> tuple[Tensor, ...]:
    """A form that has a forward and a backward pass, differentiable once; keeps x and two numbers a token and group."""
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    found: tuple[Tensor, ...] = _Norm.apply(passes, keeps, rules, *given)
    return found


def norm_native(
    x: Tensor, weight: Tensor, bias: Tensor, resets: Tensor | None, valid: Tensor | None, count: Tensor, mean: Tensor,
    var: Tensor, groups: int, eps: float, writes: bool, keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Count, mean and variance after rows; y if it `writes`; mean and 1 / deviation of every token if it `keeps`."""
    found = _native_like(x, weight, bias, resets, valid, count, mean, var, groups, eps, writes, keeps)
    *ends, y, means, rstds = found
    for end, before in zip(ends, (count, mean, var), strict=True):
        end.copy_(before)
    kept = (means, rstds) if keeps else (None, None)
    _call("forward", groups, x, *_contiguous(x, weight, bias, resets, valid), *ends, y if writes else None, *kept, eps)
    return found


def _native_like(
    x: Tensor, weight: Tensor, bias: Tensor, resets: Tensor | None, valid: Tensor | None, count: Tensor, mean: Tensor,
    var: Tensor, groups: int, eps: float, writes: bool, keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    means, rstds = (x.new_empty(*x.shape[:2], groups) if keeps else x.new_empty(0) for _ in range(2))
    return _empty(count), _empty(mean), _empty(var), _empty(x) if writes else x.new_empty(0), means, rstds


def norm_native_backward(
    x: Tensor, dy: Tensor, weight: Tensor, resets: Tensor | None, valid: Tensor | None, count: Tensor, mean: Tensor,
    means: Tensor, rstds: Tensor, d_mean: Tensor, d_var: Tensor, groups: int, writes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by mean and variance before rows, by (weight, bias), and if it `writes` by x."""
    found = _native_backward_like(
        x, dy, weight, resets, valid, count, mean, means, rstds, d_mean, d_var, groups, writes
    )
    *states, gradients, dx = found
    for state, end in zip(states, (d_mean, d_var), strict=True):
        state.copy_(end)
    given = _contiguous(x, dy, weight, resets, valid, count, mean, means, rstds)
    _call("backward", groups, x, *given, *states, dx if writes else None, gradients)
    return found


def _native_backward_like(
    x: Tensor, dy: Tensor, weight: Tensor, resets: Tensor | None, valid: Tensor | None, count: Tensor, mean: Tensor,
    means: Tensor, rstds: Tensor, d_mean: Tensor, d_var: Tensor, groups: int, writes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = mean.new_empty(2, x.shape[2])
    return _empty(d_mean), _empty(d_var), gradients, _empty(x) if writes else x.new_empty(0)


_NATIVE, _BLOCKED = (norm_native, norm_native_backward), (norm_blocked, norm_blocked_backward)
_NATIVE_OPERATORS, _BLOCKED_OPERATORS = (
    (operator(_native_like)(forward), operator(_native_backward_like)(backward))
    for forward, backward in (_NATIVE, _BLOCKED)
)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        passes: tuple[Any, Any],
        keeps: bool,
        rules: Rules,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        count: Tensor,
        mean: Tensor,
        var: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.rules, ctx.turn = rules, None
        run, ctx.passed_back = passes
        given = *(t.to(rules.dtype) for t in (x, weight, bias)), rules.resets, rules.valid
        if rules.carry is not None:
            own = [torch.zeros_like(t) for t in (count, mean, var)]
            own = run(*given, *own, rules.groups, rules.eps, False, False)[:3]
            total = Moments(own[0], *(t.to(rules.dtype) for t in own[1:]))
            before, ctx.turn = rules.carry(total, *part_kinds(rules))()
            count, mean, var = known_state(x, rules.groups, mean.dtype, before)
        *end, y, means, rstds = run(*given, count, mean, var, rules.groups, rules.eps, True, keeps)
        ctx.mark_non_differentiable(end[0])
        ctx.save_for_backward(x, weight, bias, count, mean, means, rstds)
        return y.to(x.dtype), *end

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, d_count: None, d_mean: Tensor | None, d_var: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, count, mean, means, rstds = ctx.saved_tensors
        rules: Rules = ctx.rules
        run: Any = ctx.passed_back
        dy = torch.zeros_like(x) if dy is None else dy
        given = *(t.to(rules.dtype) for t in (x, dy, weight)), rules.resets, rules.valid, count, mean, means, rstds
        ends = [torch.zeros_like(mean) if t is None else t for t in (d_mean, d_var)]
        if ctx.turn is not None:
            own = run(*given, *ends, rules.groups, False)[:2]
            ends = [t + later for t, later in zip(ends, ctx.turn(*(t.to(rules.dtype) for t in own))(), strict=True)]
        *states, gradients, dx = run(*given, *ends, rules.groups, True)
        d_weight, d_bias = gradients[0].to(weight.dtype), gradients[1].to(bias.dtype)
        d_state = (None, None) if ctx.turn is not None else states
        return None, None, None, dx.to(x.dtype), d_weight, d_bias, None, *d_state


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _call(name: str, groups: int, x: Tensor, *given: Any) -> None:
    """C++ of tensors, and of eps if it is last."""
    pointers = [t.data_ptr() if isinstance(t, Tensor) else t for t in given if not isinstance(t, float)]
    function = getattr(library(), f"mega_timestep_norm_{name}_{str(x.dtype).removeprefix('torch.')}")
    function(*pointers, *x.shape, groups, threads_for(x), *(t for t in given if isinstance(t, float)))


@constant_to_compilers  # which do not follow what compiles C++
def _has_library() -> bool:
    return _SOURCE.exists() and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The library; none, with one warning, where it cannot be compiled."""
    if (found := load_or_warn(_SOURCE, "the timestep norm")) is None:
        return None
    integers = [ctypes.c_int64] * 5
    for name, tensors, more in (("forward", 11, [ctypes.c_double]), ("backward", 13, [])):
        for dtype in ("float32", "float64"):
            function = getattr(found, f"mega_timestep_norm_{name}_{dtype}")
            function.argtypes, function.restype = [ctypes.c_void_p] * tensors + integers + more, None
    return found


_FORMS = {
    "recurrent": _recurrent, "native": _native, "blocked": partial(_in_passes, _BLOCKED),
    "blocked operators": partial(_in_passes, _BLOCKED_OPERATORS),
}  # fmt: skip
# Under a compiler: forms that are a few nodes however long rows are.
_whole = opaque(_run)
_NODES = {"triton": ("triton", _whole), "native": ("native", _whole), "blocked": ("blocked operators", _whole)}
