"""The damped EMA in blocks of tokens: matrix products inside them, and one state of the past before each.

States of a complex average are columns of real numbers in pairs, so all products are real.

Legend: B batch, L length, D channels, N moving averages per channel, K columns of a state: N, or 2N of a complex
average; c tokens per block, M blocks per sequence.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import ANY_LENGTH, chunk_count, join_chunks, once_differentiable, operator, split_chunks, tracing
from mega_scale.ops.ema import EmaCoefficients, Fade

_BLOCK = 32  # tokens
# Blocks of blocks, for tracers: what is left at the end is a matrix, of 32 rows at a million tokens.
_DEPTH = 2
Parts = list[Tensor]  # of numbers: the real part, and of complex ones the imaginary part


def blocked_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """About 2c + 2K multiply-adds per element, in matrix products; reading documents' lengths synchronises a GPU.

    q does not depend on the input, so inside a block of c tokens the average of a channel is one triangular matrix,
    which all blocks of all sequences share. A document begins a block of its own.
    """
    batch, length, channels = x.shape
    places = keep = None
    if resets is None:
        blocks = chunk_count(length, _BLOCK)
        last = torch.full((batch,), (length - 1) // _BLOCK, device=x.device)
        filled = length - last * _BLOCK  # tokens of the last block
        full = not tracing() and length % _BLOCK == 0
        tokens = x if full else F.pad(x, (0, 0, 0, blocks * _BLOCK - length))
    else:
        position = torch.arange(length, device=x.device).expand(batch, length)
        opens = (position - torch.where(resets, position, 0).cummax(1).values) % _BLOCK == 0
        block, place = opens.cumsum(1) - 1, position - torch.where(opens, position, 0).cummax(1).values
        last, filled = block[:, -1], place[:, -1] + 1
        blocks = int(last.max()) + 1
        keep = x.new_ones(batch, blocks).scatter_reduce(1, block, (~resets).to(x.dtype), "amin")
        row = torch.arange(batch, device=x.device)[:, None]
        places = ((row * blocks + block) * _BLOCK + place).flatten()
        tokens = x.new_zeros(batch * blocks * _BLOCK, channels).index_copy_(0, places, x.flatten(0, 1))
        tokens = tokens.view(batch, -1, channels)
    tokens = split_chunks(tokens, _BLOCK)  # (B, M, c, D)

    steps = torch.arange(_BLOCK + 1, device=x.device, dtype=x.dtype)
    powers = coefficients.fade(steps[:, None, None]).value(x.dtype)  # (c + 1, D, N), or pairs
    weights = coefficients.weights(powers)
    kernel = coefficients.kernel(weights[:_BLOCK])
    into = coefficients.columns(powers[:_BLOCK].flip(0), weighed=True).transpose(0, 1).contiguous()  # (D, c, K)
    out = coefficients.columns(weights[1:]).permute(1, 2, 0)  # (D, K, c)
    by_channel = tokens.permute(3, 0, 1, 2).contiguous().flatten(1, 2)
    ends = torch.bmm(by_channel, into).unflatten(1, (batch, -1))
    before = _states_before(ends, coefficients, state, keep)
    inside = torch.bmm(by_channel, _toeplitz(kernel).permute(2, 1, 0))  # what a block's tokens give each other
    y = torch.baddbmm(inside, before.flatten(1, 2), out)
    if y.requires_grad and not tracing():
        y.register_hook(Tensor.contiguous)  # products of a transposed gradient would copy it, a channel at a time
    y = y.unflatten(1, (batch, -1)).permute(1, 2, 3, 0).contiguous()
    y = join_chunks(y, 0, length) if places is None else y.flatten(0, 2).index_select(0, places).view(x.shape)

    # The last block may be part full.
    after = torch.arange(_BLOCK - 1, -1, -1, device=x.device)
    tail = x.index_select(1, (length - 1 - after).clamp(min=0))
    tail = torch.where((after < filled[:, None])[..., None], tail, 0)
    row, shape = torch.arange(batch, device=x.device), coefficients.state_shape(batch)
    end = coefficients.fade(filled[:, None, None]).times(before[:, row, last].transpose(0, 1).reshape(shape))
    return y, end + torch.einsum("bjd,djn->bdn", tail, into).view(shape)


def _operator_like(x: Tensor, state: Tensor | None, resets: Tensor | None, given: list[Tensor]) -> list[Tensor]:
    shape = EmaCoefficients(*given).state_shape(x.shape[0])
    return [torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(shape)]


@operator(_operator_like)
def _ema_blocked(x: Tensor, state: Tensor | None, resets: Tensor | None, given: list[Tensor]) -> list[Tensor]:
    """y, and the state after rows."""
    y, end = blocked_ema(x, EmaCoefficients(*given), state, resets)
    return [y.contiguous(), end.contiguous()]


def _operator_backward_like(
    x: Tensor, state: Tensor | None, resets: Tensor | None, given: list[Tensor], dy: Tensor, d_end: Tensor
) -> list[Tensor]:
    leaves = [x, *given] if state is None else [x, *given, state]
    return [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves]


@operator(_operator_backward_like)
def _ema_blocked_backward(
    x: Tensor, state: Tensor | None, resets: Tensor | None, given: list[Tensor], dy: Tensor, d_end: Tensor
) -> list[Tensor]:
    """Gradients by x, coefficients and the state if there is one; computes the average once more."""
    # An operator's function runs with autograd's keys off.
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        leaves = [t.detach().requires_grad_() for t in ([x, *given] if state is None else [x, *given, state])]
        before = None if state is None else leaves[-1]
        found = blocked_ema(leaves[0], EmaCoefficients(*leaves[1 : len(given) + 1]), before, resets)
        gradients = torch.autograd.grad(found, leaves, (dy, d_end))
    return [gradient.contiguous() for gradient in gradients]


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor | None, resets: Tensor | None, *given: Tensor) -> Any:
        ctx.save_for_backward(x, state, resets, *given)
        y, end = _ema_blocked(x, state, resets, list(given))
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        x, state, resets, *given = ctx.saved_tensors
        dx, *others = _ema_blocked_backward(x, state, resets, given, dy, d_end)
        return dx, None if state is None else others[-1], None, *others[: len(given)]


def blocked_operator_ema(
    x: Tensor, coefficients: EmaCoefficients, state: Tensor | None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same as one operator forward and one backward, for compilers: its graph would grow with the row."""
    found: tuple[Tensor, Tensor] = _Operator.apply(x, state, resets, *coefficients)
    return found


def _states_before(ends: Tensor, coefficients: EmaCoefficients, state: Tensor | None, keep: Tensor | None) -> Tensor:
    """States before every block, (D, B, M, K): from what blocks add (D, B, M, K), the state before the first (B, D, N)
    or pairs, and (B, M) zero where a block begins a document."""
    _, batch, blocks, _ = ends.shape
    fade = coefficients.fade(_BLOCK)
    if not tracing() or keep is not None:
        state = ends.new_zeros(coefficients.state_shape(batch)) if state is None else state
        decay, state = fade.value(ends.dtype)[:, None], state.transpose(0, 1)
        if fade.angle is None:
            return _Recurrence.apply(ends, decay, state, keep)
        pairs = (ends.unflatten(3, (fade.log.shape[1], 2)), decay, state.contiguous())
        found = _Recurrence.apply(*(torch.view_as_complex(t) for t in pairs), keep)
        return torch.view_as_real(found).flatten(3)
    added = ends.permute(1, 2, 0, 3)
    parts = [added] if fade.angle is None else list(added.unflatten(3, (fade.log.shape[1], 2)).unbind(-1))
    flat = Fade(fade.log.flatten(), None if fade.angle is None else fade.angle.flatten())
    found = [part.unflatten(2, fade.log.shape) for part in _before([part.flatten(2) for part in parts], flat, _DEPTH)]
    before = (found[0] if fade.angle is None else torch.stack(found, -1).flatten(3)).permute(2, 0, 1, 3)
    if state is not None:
        later = fade.power(_steps(blocks, ends)[:, None, None, None]).times(state)  # (M, B, D, N), or pairs
        before = before + coefficients.columns(later).permute(2, 1, 0, 3)
    return before


class _Recurrence(torch.autograd.Function):
    """`h_{m+1} = decay keep_m h_m + end_m`, from the state to keep_m h_m before every block."""

    @staticmethod
    def forward(ctx: Any, ends: Tensor, decay: Tensor, state: Tensor, keep: Tensor | None) -> Tensor:
        """ends (D, B, M, N), decay (D, 1, N), state (D, B, N), real or complex; keep (B, M)."""
        before = torch.empty_like(ends, memory_format=torch.contiguous_format)
        for m in range(ends.shape[2]):
            state = state if keep is None else state * keep[:, m, None]
            before[:, :, m] = state
            state = torch.addcmul(ends[:, :, m], state, decay)
        ctx.save_for_backward(before, decay, keep)
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        before, decay, keep = ctx.saved_tensors
        d_ends, d_decay, d_state = torch.empty_like(before), torch.zeros_like(decay), torch.zeros_like(before[:, :, 0])
        for m in reversed(range(before.shape[2])):
            d_ends[:, :, m] = d_state
            d_decay += (d_state * before[:, :, m].conj()).sum(1, keepdim=True)
            d_state = torch.addcmul(gradient[:, :, m], d_state, decay.conj())
            d_state = d_state if keep is None else d_state * keep[:, m, None]
        return d_ends, d_decay, d_state, None


def _before(added: Parts, fade: Fade, depth: int) -> Parts:
    """h_m of `h_{m+1} = q h_m + added_m` from zero: added and h (B, M, K), real or real and imaginary; fade (K,).

    A fixed number of operators whatever M, differentiable any number of times, for tracers. No size here is one less
    than another: an exporter would keep whether it is 1.
    """
    count = added[0].shape[1]
    if depth == 0 or (tracing() not in ANY_LENGTH and count <= _BLOCK):
        kernel = [_toeplitz(power, 1) for power in _powers(fade, count, added[0])]
        return _product(partial(torch.einsum, "bjk,ijk->bik"), added, kernel)
    padding = chunk_count(count, _BLOCK) * _BLOCK - count
    blocks = [split_chunks(F.pad(part, (0, 0, 0, padding)), _BLOCK) for part in added]
    powers = _powers(fade, _BLOCK, added[0])
    inside = _product(partial(torch.einsum, "bmjk,ijk->bmik"), blocks, [_toeplitz(power, 1) for power in powers])
    ends = _product(partial(torch.einsum, "bmjk,jk->bmk"), blocks, [power.flip(0) for power in powers])
    passed = _product(torch.mul, [part[:, :, None] for part in _before(ends, fade.power(_BLOCK), depth - 1)], powers)
    return [join_chunks(a + b, 0, count) for a, b in zip(inside, passed, strict=True)]


def _powers(fade: Fade, count: int, like: Tensor) -> Parts:
    """The first powers (count, K), from q^0 on."""
    value = fade.power(_steps(count, like)[:, None]).value(like.dtype)
    return [value] if fade.angle is None else list(value.unbind(-1))


def _product(multiply: Callable[[Tensor, Tensor], Tensor], a: Parts, b: Parts) -> Parts:
    """A bilinear function of two real numbers, or of two complex ones."""
    if len(a) == 1:
        return [multiply(a[0], b[0])]
    return [multiply(a[0], b[0]) - multiply(a[1], b[1]), multiply(a[1], b[0]) + multiply(a[0], b[1])]


def _toeplitz(kernel: Tensor, lag: int = 0) -> Tensor:
    """Entry (i, j, k) is `kernel[i - lag - j, k]`, zero where j > i - lag: (c, K) to (c, c, K)."""
    steps = torch.arange(kernel.shape[0], device=kernel.device)
    distance = steps[:, None] - lag - steps
    return kernel[distance.clamp(min=0)] * (distance >= 0)[..., None]


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype)
