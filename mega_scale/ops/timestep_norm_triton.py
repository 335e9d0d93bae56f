"""The timestep norm by Triton kernels: tokens are read twice forward, for moments and for outputs, and twice backward.

A program owns one group of channels in a block of T tokens of a row. Inside a block, each token sums over the tokens up
to it, or from it on, by a triangle of T x T pairs, which knows documents and padding, and takes differences of means
only. Between blocks one program a row and some groups goes from block to block in fp64: moments before each block, and
sums over all tokens behind it, `Q = sum of gV / n` and `U = sum of (gM + 2 (pivot - M) gV) / n`.

Legend: B batch, L length, D channels, G groups of S channels (SP those padded to a power of two), M blocks of T tokens.

    x, y, dx, dy     (B, L, D) contiguous tokens and their gradients
    residual, other  (B, L, D) gradients of x past the norm, R of them; added to dx
    document         (B, L) int32: documents that have begun
    valid            (B, L) uint8: 0 for padding
    counts           (B, L) int64: n of every token
    means, rstds     (B, L, G): of every token
    totals           (3, B, M, G) fp64: count, mean, variance of a block's tokens after its last document start;
                     backward (2, B, M, G), Q and U of those before its first one
    before           (2, B, M + 1, G) fp64: mean and variance between blocks
    behind           (3, B, M + 1, G) fp64: Q, U and its pivot between blocks, of the document that goes on there
    sums             (2, B M, D): a block's part of the gradients of weight and bias
"""

# mypy: disable-error-code="assignment"

from typing import Any

import torch
from torch import Tensor

from mega_scale.ops import device_kind, launch, once_differentiable, operator
from mega_scale.ops.moments import Moments, Rules, known_state, part_kinds, token_counts

try:
    # In a `try`, as transformers demands every other import of a model's own files to be installed.
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the timestep norm's Triton kernels need triton: pip install 'mega_scale[triton]'") from missing

BLOCK = 64  # T: a guess until it is measured, of which no kernel spills registers
# Groups of a program that goes from block to block.
_GROUPS = 32


def token_constants(size: int, documents: bool, padding: bool) -> dict[str, Any]:
    """What kernels of tokens are compiled with, for groups of so many channels."""
    padded = triton.next_power_of_2(size)
    return {"S": size, "SP": padded, "T": BLOCK, "DOCUMENTS": documents, "PADDING": padding}


def block_constants(groups: int, documents: bool) -> dict[str, Any]:
    """What kernels that go from block to block are compiled with."""
    return {"GB": min(_GROUPS, triton.next_power_of_2(groups)), "T": BLOCK, "DOCUMENTS": documents}


def triton_norm(
    rules: Rules, x: Tensor, weight: Tensor, bias: Tensor, count: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    """The norm on a GPU (or anywhere, interpreted: TRITON_INTERPRET=1); keeps x and two numbers a token and group.

    x (B, L, D) is bf16, fp16, fp32 or fp64, count (B,) int64, mean and var (B, G) fp64. Returns y in the dtype of x, x
    twice for others to read, and count, mean and var after the last token. Raises ValueError if x is not on a GPU and
    kernels are not interpreted.
    """
    if device_kind(x) != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"impl='triton' needs a GPU and x is on {x.device}: use impl='blocked'")
    return _Norm.apply(rules, x.contiguous(), weight, bias, count, mean, var)


class _Rows:
    """Rows like x (B, L, D): documents, padding, counts, and what kernels compute of them.

    What kernels write are new tensors of operators.
    """

    def __init__(self, rules: Rules, x: Tensor) -> None:
        self.document = None if rules.resets is None else rules.resets.cumsum(1, dtype=torch.int32)
        self.valid = None if rules.valid is None else rules.valid.contiguous().view(torch.uint8)
        self.tokens = self.document, self.valid, rules.groups
        self.blocks = self.document, x.shape[1], rules.groups


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        rows = _Rows(rules, x)
        totals = _norm_totals(x, *rows.tokens)
        if rules.carry is not None:
            nothing = torch.zeros_like(count)
            own = _norm_before(totals, nothing, torch.zeros_like(mean), torch.zeros_like(mean), *rows.blocks)
            own = own[:, :, -1].to(rules.dtype)
            arrive = rules.carry(Moments(token_counts(rules, nothing, x)[:, -1], *own), *part_kinds(rules))
            arrived, ctx.turn = arrive()
            count, mean, var = known_state(x, rules.groups, mean.dtype, arrived)
        before = _norm_before(totals, count, mean, var, *rows.blocks)
        counts = token_counts(rules, count, x).contiguous()
        given = (t.to(rules.dtype) for t in (weight, bias))
        y, means, rstds = _norm_tokens(x, *given, counts, before, *rows.tokens, rules.eps)
        end = counts[:, -1].clone()
        ctx.mark_non_differentiable(end)
        ctx.save_for_backward(x, weight, bias, count, mean, means, rstds)
        # Each x becomes a view, whose gradient comes to the backward pass.
        return y, x, x, end, *before[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dy: Tensor | None,
        first: Tensor | None,
        second: Tensor | None,
        d_count: None,
        d_mean: Tensor | None,
        d_var: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, count, mean, means, rstds = ctx.saved_tensors
        rules: Rules = ctx.rules
        rows = _Rows(rules, x)
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        counts = token_counts(rules, count, x).contiguous()
        given = (x, dy, weight.to(rules.dtype), counts, means, rstds)
        totals, sums = _norm_slopes(*given, *rows.tokens)
        ends = [torch.zeros_like(mean) if t is None else t for t in (d_mean, d_var)]

        def go_back() -> tuple[Tensor, list[Tensor]]:
            """Sums between blocks, and the gradients of mean and variance before the row."""
            behind = _norm_behind(totals, counts, means, *ends, *rows.blocks)
            q, u, pivot = behind[:, :, 0]
            n = count.to(mean.dtype)[:, None]
            if rules.resets is not None:
                n = n.masked_fill(rules.resets[:, :1], 0)
            return behind, [n * (u + 2 * (mean - pivot) * q), n * q]

        behind, d_state = go_back()
        if ctx.turn is not None:
            later = ctx.turn(*(t.to(rules.dtype) for t in d_state))
            d_weight, d_bias = sums.sum(1)
            ends = [t + other for t, other in zip(ends, later(), strict=True)]
            behind, _ = go_back()
            d_state = []
        else:
            d_weight, d_bias = sums.sum(1)
        dx = _norm_gradient(*given, behind, [t for t in (first, second) if t is not None], *rows.tokens)
        return None, dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, *(d_state or (None, None))


def _of_tokens(
    kernel: Any, x: Tensor, document: Tensor | None, valid: Tensor | None, groups: int, *tensors: Tensor, **flags: Any
) -> None:
    """Run a kernel of which each program has a block of tokens and a group."""
    options = token_constants(x.shape[2] // groups, document is not None, valid is not None)
    grid = (len(x) * _blocks(x) * groups,)
    given = [x if t is None else t.contiguous() for t in (document, valid, *tensors)]
    launch(kernel, grid, *given, *x.shape[1:], groups, _blocks(x), **options, **flags)


def _of_blocks(
    kernel: Any, totals: Tensor, document: Tensor | None, length: int, groups: int, *tensors: Tensor
) -> None:
    """Run a kernel of which each program goes over all blocks of some groups."""
    options = block_constants(groups, document is not None)
    _, batch, blocks, _ = totals.shape
    grid = (batch, triton.cdiv(groups, options["GB"]))
    given = [totals if t is None else t.contiguous() for t in (document, totals, *tensors)]
    launch(kernel, grid, *given, length, groups, blocks, **options)


def _blocks(x: Tensor) -> int:
    return -(-x.shape[1] // BLOCK)


def _of_each_block(x: Tensor, groups: int, kinds: int) -> Tensor:
    return x.new_empty(kinds, len(x), _blocks(x), groups, dtype=torch.float64)


def _totals_like(x: Tensor, document: Tensor | None, valid: Tensor | None, groups: int) -> Tensor:
    return _of_each_block(x, groups, 3)


@operator(_totals_like)
def _norm_totals(x: Tensor, document: Tensor | None, valid: Tensor | None, groups: int) -> Tensor:
    totals = _totals_like(x, document, valid, groups)
    _of_tokens(totals_kernel, x, document, valid, groups, x, totals)
    return totals


def _past_ends(totals: Tensor, kinds: int) -> Tensor:
    _, batch, blocks, groups = totals.shape
    return totals.new_empty(kinds, batch, blocks + 1, groups)


def _before_like(
    totals: Tensor, count: Tensor, mean: Tensor, var: Tensor, document: Tensor | None, length: int, groups: int
) -> Tensor:
    return _past_ends(totals, 2)


@operator(_before_like)
def _norm_before(
    totals: Tensor, count: Tensor, mean: Tensor, var: Tensor, document: Tensor | None, length: int, groups: int
) -> Tensor:
    before = _past_ends(totals, 2)
    _of_blocks(before_kernel, totals, document, length, groups, count, mean, var, before)
    return before


def _tokens_like(
    x: Tensor, weight: Tensor, bias: Tensor, counts: Tensor, before: Tensor, document: Tensor | None,
    valid: Tensor | None, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    means, rstds = (weight.new_empty(*x.shape[:2], groups) for _ in range(2))
    return torch.empty_like(x), means, rstds


@operator(_tokens_like)
def _norm_tokens(
    x: Tensor, weight: Tensor, bias: Tensor, counts: Tensor, before: Tensor, document: Tensor | None,
    valid: Tensor | None, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found = _tokens_like(x, weight, bias, counts, before, document, valid, groups, eps)
    _of_tokens(normalise_kernel, x, document, valid, groups, x, weight, bias, counts, before, *found, eps=eps)
    return found


def _slopes_like(
    x: Tensor, dy: Tensor, weight: Tensor, counts: Tensor, means: Tensor, rstds: Tensor, document: Tensor | None,
    valid: Tensor | None, groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _of_each_block(x, groups, 2), means.new_empty(2, len(x) * _blocks(x), x.shape[2])


@operator(_slopes_like)
def _norm_slopes(
    x: Tensor, dy: Tensor, weight: Tensor, counts: Tensor, means: Tensor, rstds: Tensor, document: Tensor | None,
    valid: Tensor | None, groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = _slopes_like(x, dy, weight, counts, means, rstds, document, valid, groups)
    _of_tokens(slopes_kernel, x, document, valid, groups, x, dy, weight, counts, means, rstds, *found)
    return found


def _behind_like(
    totals: Tensor, counts: Tensor, means: Tensor, end_mean: Tensor, end_var: Tensor, document: Tensor | None,
    length: int, groups: int,
) -> Tensor:  # fmt: skip
    return _past_ends(totals, 3)


@operator(_behind_like)
def _norm_behind(
    totals: Tensor, counts: Tensor, means: Tensor, end_mean: Tensor, end_var: Tensor, document: Tensor | None,
    length: int, groups: int,
) -> Tensor:  # fmt: skip
    behind = _past_ends(totals, 3)
    _of_blocks(behind_kernel, totals, document, length, groups, counts, means, end_mean, end_var, behind)
    return behind


def _gradient_like(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


@operator(_gradient_like)
def _norm_gradient(
    x: Tensor, dy: Tensor, weight: Tensor, counts: Tensor, means: Tensor, rstds: Tensor, behind: Tensor,
    residuals: list[Tensor], document: Tensor | None, valid: Tensor | None, groups: int,
) -> Tensor:  # fmt: skip
    dx = torch.empty_like(x)
    residual, other = (*residuals, x, x)[:2]
    given = x, dy, weight, counts, means, rstds, behind, residual, other, dx
    _of_tokens(tokens_gradient_kernel, x, document, valid, groups, *given, R=len(residuals))
    return dx


@triton.jit
def _place(L, G, M, T: tl.constexpr, S: tl.constexpr, SP: tl.constexpr):
    """Row, block and group of a program; its tokens, channels in the group, and which of (T, SP) exist."""
    own = tl.program_id(0)
    group, block, row = own % G, (own // G) % M, (own // G // M).to(tl.int64)
    token, channel = block * T + tl.arange(0, T), tl.arange(0, SP)
    return row, block, group, token, channel, (token < L)[:, None] & (channel < S)[None, :]


@triton.jit
def _kinds(document, valid, row, block, token, L, T: tl.constexpr, DOCUMENTS: tl.constexpr, PADDING: tl.constexpr):
    """Document and whether it counts, of every token, (T,); the document before the block, and at its end."""
    there = token < L
    counts, own = there, tl.zeros((T,), tl.int32)
    first, last = 0, 0
    if PADDING:
        counts = counts & (tl.load(valid + row * L + token, mask=there, other=0) != 0)
    if DOCUMENTS:
        own = tl.load(document + row * L + token, mask=there, other=-1)
        first = tl.load(document + row * L + block * T - 1, mask=block > 0, other=0)
        last = tl.load(document + row * L + tl.minimum(block * T + T, L) - 1)
    return own, counts, first, last


@triton.jit
def _token_moments(tokens, there, S: tl.constexpr):
    """Mean of every token, in two parts, variance, and what remains of its channels."""
    high = tl.sum(tokens, 1) / S
    centred = tl.where(there, tokens - high[:, None], 0.0)
    low = tl.sum(centred, 1) / S
    return high, low, tl.sum(centred * centred, 1) / S - low * low, centred


@triton.jit
def totals_kernel(
    document, valid, x, totals, L, D, G, M,
    S: tl.constexpr, SP: tl.constexpr, T: tl.constexpr, DOCUMENTS: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Count, mean and variance of the block's tokens after its last document start."""
    row, block, group, token, channel, there = _place(L, G, M, T, S, SP)
    own, counts, _, last = _kinds(document, valid, row, block, token, L, T, DOCUMENTS, PADDING)
    at = (row * L + token[:, None]) * D + group * S + channel[None, :]
    tokens = _wide(tl.load(x + at, mask=there & counts[:, None], other=0.0))
    high, low, spread, _ = _token_moments(tokens, there, S)
    held = counts & (own == last)
    n = tl.sum(held.to(high.dtype), 0)
    share = 1 / tl.maximum(n, 1)
    mean = tl.sum(tl.where(held, high, 0.0), 0) * share
    step = tl.where(held, (high - mean) + low, 0.0)
    rest = tl.sum(step, 0) * share
    var = tl.sum(tl.where(held, spread + step * step, 0.0), 0) * share - rest * rest
    place = (row * M + block) * G + group
    plane = (tl.num_programs(0)).to(tl.int64)
    tl.store(totals + place, n.to(tl.float64))
    tl.store(totals + plane + place, mean.to(tl.float64) + rest.to(tl.float64))
    tl.store(totals + 2 * plane + place, var.to(tl.float64))


@triton.jit
def _wide(tokens):
    """Tokens in the dtype of arithmetic with them."""
    if tokens.dtype != tl.float64:
        tokens = tokens.to(tl.float32)
    return tokens


@triton.jit
def before_kernel(
    document, totals, count, first_mean, first_var, before, L, G, M,
    GB: tl.constexpr, T: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Mean and variance before every block and after the last one, of some groups of a row."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * GB + tl.arange(0, GB)
    there, plane = group < G, tl.num_programs(0).to(tl.int64) * M * G
    n = tl.zeros((GB,), tl.float64) + tl.load(count + row).to(tl.float64)
    mean = tl.load(first_mean + row * G + group, mask=there, other=0.0)
    var = tl.load(first_var + row * G + group, mask=there, other=0.0)
    seen = 0
    for block in range(M):
        place = (row * (M + 1) + block) * G + group
        tl.store(before + place, mean, mask=there)
        tl.store(before + plane + tl.num_programs(0).to(tl.int64) * G + place, var, mask=there)
        own = totals + (row * M + block) * G + group
        more = tl.load(own, mask=there, other=0.0)
        other = tl.load(own + plane, mask=there, other=0.0)
        spread = tl.load(own + 2 * plane, mask=there, other=0.0)
        if DOCUMENTS:
            last = tl.load(document + row * L + tl.minimum(block * T + T, L) - 1)
            begins = last != seen
            n, mean, var = tl.where(begins, 0.0, n), tl.where(begins, other, mean), tl.where(begins, spread, var)
            seen = last
        n += more
        share = more / tl.maximum(n, 1.0)
        step = other - mean
        mean += share * step
        var += share * (spread - var) + share * (1 - share) * step * step
    place = (row * (M + 1) + M) * G + group
    tl.store(before + place, mean, mask=there)
    tl.store(before + plane + tl.num_programs(0).to(tl.int64) * G + place, var, mask=there)


@triton.jit
def normalise_kernel(
    document, valid, x, weight, bias, counts, before, y, means, rstds, L, D, G, M, eps,
    S: tl.constexpr, SP: tl.constexpr, T: tl.constexpr, DOCUMENTS: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """y, and the mean and 1 / sqrt(variance + eps) of every token."""
    row, block, group, token, channel, there = _place(L, G, M, T, S, SP)
    own, counted, first, _ = _kinds(document, valid, row, block, token, L, T, DOCUMENTS, PADDING)
    at = (row * L + token[:, None]) * D + group * S + channel[None, :]
    tokens = _wide(tl.load(x + at, mask=there & counted[:, None], other=0.0))
    high, low, spread, centred = _token_moments(tokens, there, S)
    # Means of prefixes as what they add to the token's own, so that no digits of a large mean are lost.
    seen = (token[None, :] <= token[:, None]) & counted[None, :] & (own[None, :] == own[:, None])
    n = tl.sum(seen.to(high.dtype), 1)
    inner = 1 / tl.maximum(n, 1)
    step = tl.where(seen, (high[None, :] - high[:, None]) + low[None, :], 0.0)
    offset = tl.sum(step, 1) * inner
    step = tl.where(seen, step - offset[:, None], 0.0)
    var = tl.sum(tl.where(seen, spread[None, :] + step * step, 0.0), 1) * inner
    # With what came before the block.
    plane = tl.num_programs(0).to(tl.int64) // M * (M + 1)
    place = (row * (M + 1) + block) * G + group
    past_mean, past_var = tl.load(before + place), tl.load(before + plane + place)
    past_high = past_mean.to(high.dtype)
    past = (past_high - high) + (past_mean - past_high.to(tl.float64)).to(high.dtype)
    whole = tl.load(counts + row * L + token, mask=token < L, other=1).to(high.dtype)
    share = n / tl.maximum(whole, 1)
    gap = past - offset
    goes_on = (own == first) & (whole > n)
    joined = past_var.to(high.dtype) + share * (var - past_var.to(high.dtype)) + share * (1 - share) * gap * gap
    offset, var = tl.where(goes_on, offset + (1 - share) * gap, offset), tl.where(goes_on, joined, var)
    rstd = 1 / tl.sqrt(tl.maximum(var, 0.0) + eps)
    scale = tl.load(weight + group * S + channel, mask=channel < S, other=0.0) + 1
    shift = tl.load(bias + group * S + channel, mask=channel < S, other=0.0)
    found = (centred - offset[:, None]) * rstd[:, None] * scale[None, :] + shift[None, :]
    found = tl.where(counted[:, None], found, 0.0)
    tl.store(y + at, found.to(y.dtype.element_ty), mask=there)
    of_token = (row * L + token) * G + group
    tl.store(means + of_token, high + offset, mask=token < L)
    tl.store(rstds + of_token, rstd, mask=token < L)


@triton.jit
def _slopes(
    x, dy, weight, counts, means, rstds, row, group, token, channel, there, counted, L, D, G, S: tl.constexpr
):  # fmt: skip
    """gM / n, gV / n and M of every token; (T, SP): dy, dy (weight + 1), x - M and rstd."""
    at = (row * L + token[:, None]) * D + group * S + channel[None, :]
    there = there & counted[:, None]
    of_token = (row * L + token) * G + group
    mean = tl.load(means + of_token, mask=token < L, other=0.0)
    rstd = tl.load(rstds + of_token, mask=token < L, other=0.0)
    centred = tl.where(there, _wide(tl.load(x + at, mask=there, other=0.0)) - mean[:, None], 0.0)
    up = _wide(tl.load(dy + at, mask=there, other=0.0))
    scale = tl.load(weight + group * S + channel, mask=channel < S, other=0.0) + 1
    slope = up * scale[None, :]
    n = tl.load(counts + row * L + token, mask=token < L, other=1).to(mean.dtype)
    share = rstd / tl.maximum(n, 1)
    by_mean = -share * tl.sum(slope, 1)
    by_var = -0.5 * share * rstd * rstd * tl.sum(slope * centred, 1)
    return by_mean, by_var, mean, up, slope, centred, rstd


@triton.jit
def slopes_kernel(
    document, valid, x, dy, weight, counts, means, rstds, totals, sums, L, D, G, M,
    S: tl.constexpr, SP: tl.constexpr, T: tl.constexpr, DOCUMENTS: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Q and U, about the block's first mean, of its tokens before the first document start, and the block's part of the
    gradients of weight and bias."""
    row, block, group, token, channel, there = _place(L, G, M, T, S, SP)
    own, counted, first, _ = _kinds(document, valid, row, block, token, L, T, DOCUMENTS, PADDING)
    by_mean, by_var, mean, up, _, centred, rstd = _slopes(
        x, dy, weight, counts, means, rstds, row, group, token, channel, there, counted, L, D, G, S
    )
    held = counted & (own == first)
    pivot = tl.load(means + (row * L + block * T) * G + group)
    u = tl.where(held, by_mean + 2 * (pivot - mean) * by_var, 0.0)
    place, plane = (row * M + block) * G + group, tl.num_programs(0).to(tl.int64)
    tl.store(totals + place, tl.sum(tl.where(held, by_var, 0.0), 0).to(tl.float64))
    tl.store(totals + plane + place, tl.sum(u, 0).to(tl.float64))
    at = (row * M + block) * D + group * S + channel
    tl.store(sums + at, tl.sum(up * centred * rstd[:, None], 0), mask=channel < S)
    tl.store(sums + tl.num_programs(0).to(tl.int64) * S + at, tl.sum(up, 0), mask=channel < S)


@triton.jit
def behind_kernel(
    document, totals, counts, means, end_mean, end_var, behind, L, G, M,
    GB: tl.constexpr, T: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Q, U and pivot before every block and after the last one, of the document that goes on there."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * GB + tl.arange(0, GB)
    there, rows = group < G, tl.num_programs(0).to(tl.int64)
    plane, small = rows * (M + 1) * G, rows * M * G
    n = tl.load(counts + row * L + L - 1).to(tl.float64)
    share = tl.where(n > 0, 1 / tl.maximum(n, 1.0), 0.0)
    q = tl.load(end_var + row * G + group, mask=there, other=0.0) * share
    u = tl.load(end_mean + row * G + group, mask=there, other=0.0) * share
    pivot = tl.load(means + (row * L + L - 1) * G + group, mask=there, other=0.0).to(tl.float64)
    for later in range(M):
        block = M - 1 - later
        place = (row * (M + 1) + block + 1) * G + group
        tl.store(behind + place, q, mask=there)
        tl.store(behind + plane + place, u, mask=there)
        tl.store(behind + 2 * plane + place, pivot, mask=there)
        mean = tl.load(means + (row * L + block * T) * G + group, mask=there, other=0.0).to(tl.float64)
        u += 2 * (mean - pivot) * q
        if DOCUMENTS:
            last = tl.load(document + row * L + tl.minimum(block * T + T, L) - 1)
            begins = last != tl.load(document + row * L + block * T - 1, mask=block > 0, other=0)
            q, u = tl.where(begins, 0.0, q), tl.where(begins, 0.0, u)
        pivot = mean
        own = totals + (row * M + block) * G + group
        q += tl.load(own, mask=there, other=0.0)
        u += tl.load(own + small, mask=there, other=0.0)
    place = row * (M + 1) * G + group
    tl.store(behind + place, q, mask=there)
    tl.store(behind + plane + place, u, mask=there)
    tl.store(behind + 2 * plane + place, pivot, mask=there)


@triton.jit
def tokens_gradient_kernel(
    document, valid, x, dy, weight, counts, means, rstds, behind, residual, other, dx, L, D, G, M,
    S: tl.constexpr, SP: tl.constexpr, T: tl.constexpr, DOCUMENTS: tl.constexpr, PADDING: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """`dx = dy (weight + 1) rstd + (U + 2 (x - M) Q) / S + residual + other`, U about the token's own mean."""
    row, block, group, token, channel, there = _place(L, G, M, T, S, SP)
    own, counted, _, last = _kinds(document, valid, row, block, token, L, T, DOCUMENTS, PADDING)
    by_mean, by_var, mean, _, slope, centred, rstd = _slopes(
        x, dy, weight, counts, means, rstds, row, group, token, channel, there, counted, L, D, G, S
    )
    seen = (token[None, :] >= token[:, None]) & counted[None, :] & (own[None, :] == own[:, None])
    q = tl.sum(tl.where(seen, by_var[None, :], 0.0), 1)
    u = tl.sum(tl.where(seen, by_mean[None, :] + 2 * (mean[:, None] - mean[None, :]) * by_var[None, :], 0.0), 1)
    place = (row * (M + 1) + block + 1) * G + group
    plane = tl.num_programs(0).to(tl.int64) // M * (M + 1)
    past_q, past_u = tl.load(behind + place).to(q.dtype), tl.load(behind + plane + place).to(q.dtype)
    pivot = tl.load(behind + 2 * plane + place).to(q.dtype)
    goes_on = own == last
    u = tl.where(goes_on, u + past_u + 2 * (mean - pivot) * past_q, u)
    q = tl.where(goes_on, q + past_q, q)
    found = slope * rstd[:, None] + (u[:, None] + 2 * centred * q[:, None]) / S
    at = (row * L + token[:, None]) * D + group * S + channel[None, :]
    found = tl.where(counted[:, None], found, 0.0)
    if R > 0:
        found += _wide(tl.load(residual + at, mask=there, other=0.0))
    if R > 1:
        found += _wide(tl.load(other + at, mask=there, other=0.0))
    tl.store(dx + at, found.to(dx.dtype.element_ty), mask=there)
