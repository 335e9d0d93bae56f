"""The elementwise arithmetic of a block between its matrix products: gates, norms, and positional dropout.

Plain PyTorch, which compiled blocks fuse; eager, they keep what their matrix products produced, and compute the rest
again in the backward pass (`recomputed`).

Legend: B batch, L length, D channels, Z width of queries and keys, E width of values, H heads, dh = Z / H, F inner
width of a feed-forward network.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import device_kind, once_differentiable, runs_triton, tracing

# Multipliers of 32-bit integer hashes that mix well (lowbias32, found by C. Wellons' search); as signed numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
_MASK = 2**32 - 1
MOST_KEYS = 2**20
"""In a chunk: numbers of columns that belong to a head of attention weights."""


@contextmanager
def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[Tensor]:
    """Compute a cheap function, whose result no operation in this context saves: backward passes call it again.

    The result is saved as usual where something traces, and where other hooks decide what is saved: activation
    checkpointing recomputes all of a block, offloading moves it. Views of all of it count as it; a copy, as autocast
    makes for a matrix product, is saved.

    The function takes tensors that are saved anyway, returns a contiguous one, and draws nothing at random.
    """
    result = function(*inputs)
    if (
        tracing() is not None
        or not torch.is_grad_enabled()
        or not result.requires_grad
        # Hooks are in force already; PyTorch has no public name for them.
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        yield result
        return
    # By storage and not by address, which all fake tensors share.
    memory, offset = result.untyped_storage()._cdata, result.storage_offset()
    elements, dtype = result.numel(), result.dtype

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        whole = tensor.numel() == elements and tensor.dtype == dtype and tensor.is_contiguous()
        same = whole and tensor.untyped_storage()._cdata == memory and tensor.storage_offset() == offset
        return tensor.shape if same else tensor

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else function(*inputs).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield result


def queries_and_keys(z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`kappa silu(z) + mu` (arXiv 2209.10655, equations 7 to 9): z (B, L, Z), weight and bias (2, Z)."""
    z = F.silu(z)
    # Each row is applied on its own: the stacked (B, L, 2, Z) product would double the memory of queries and keys.
    return z * weight[0] + bias[0], z * weight[1] + bias[1]


def normalized_queries_and_keys(
    z: Tensor, gamma: Tensor, beta: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`(gamma + 1) z / (rms(z) sqrt(dh)) + beta`, the root mean square of each head (arXiv 2404.08801, section 3.3).

    z is (B, L, Z), gamma and beta (2, Z): row 0 makes queries, row 1 keys, both (B, L, H, dh) in the dtype of z.
    """
    # In at least fp32: gamma is small beside the one that it is added to.
    dtype = torch.promote_types(z.dtype, torch.float32)
    width = z.shape[-1] // heads
    # Not indexed: its gradient would be zeros, with a row put in.
    scales, shifts = ((gamma.to(dtype) + 1) * width**-0.5).unbind(), beta.to(dtype).unbind()

    def normalize(z: Tensor) -> Tensor:
        return divide_by_rms(z.to(dtype).unflatten(-1, (heads, width)), None, eps).flatten(-2)

    with recomputed(normalize, z) as normal:
        q, k = (
            (normal * scale + shift).to(z.dtype).unflatten(-1, (heads, width))
            for scale, shift in zip(scales, shifts, strict=True)
        )
    return q, k


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """`silu(a) b`, both (B, L, F) (arXiv 2002.05202)."""
    return gate(b, a)


def gate(attended: Tensor, gate: Tensor) -> Tensor:
    """`attended silu(gate)`, both (B, L, E)."""
    if tracing() is None and attended.dtype == gate.dtype:
        gated: Tensor = _Gate.apply(attended, gate)
        return gated
    return attended * F.silu(gate)


def update(x: Tensor, update: Tensor, candidate: Tensor) -> Tensor:
    """`x + sigmoid(update) (silu(candidate) - x)`, all (B, L, D) (arXiv 2209.10655, equation 15)."""
    return torch.addcmul(x, torch.sigmoid(update), F.silu(candidate) - x)


class _Gate(torch.autograd.Function):
    """As PyTorch does it, number by number, but that it keeps its inputs alone and writes over what it made itself: a
    CPU spends longer on new memory than on the arithmetic."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(attended, gate)
        return F.silu(gate).mul_(attended)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        attended, gate = ctx.saved_tensors
        slope = gradient * attended
        torch.ops.aten.silu_backward.grad_input(slope, gate, grad_input=slope)
        return F.silu(gate).mul_(gradient), slope


def average(y: Tensor, x: Tensor, omega: Tensor) -> Tensor:
    """`silu(y + omega x)` in the dtype of x: y and x (B, L, D), omega (D,)."""
    return F.silu(y + omega * x).to(x.dtype)


def plus_scaled(y: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """`y + scale x` in the dtype of x: y and x (B, L, D), the scale (D,)."""
    if tracing() == "compile":
        sum_: Tensor = _PlusScaled.apply(y, x, scale)
        return sum_
    return (y + scale * x).to(x.dtype)


class _PlusScaled(torch.autograd.Function):
    """As PyTorch does it, but that no gradient is made wider: inductor would write that one to memory."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return (y + scale * x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return gradient, gradient * scale.to(x.dtype), (gradient * x).sum((0, 1), dtype=scale.dtype)


class Gates(NamedTuple):
    """A block's gates."""

    queries_and_keys: Callable[..., tuple[Tensor, Tensor]] = queries_and_keys
    normalized_queries_and_keys: Callable[..., tuple[Tensor, Tensor]] = normalized_queries_and_keys
    swiglu: Callable[..., Tensor] = swiglu
    gate: Callable[..., Tensor] = gate
    update: Callable[..., Tensor] = update
    average: Callable[..., Tensor] = average


EAGER = Gates()


def divide_by_rms(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """`gain x / sqrt(mean(x^2) + eps)` over the last dimension, in the dtype of x; statistics are at least fp32.

    x is (..., D), the gain (1,), (D,) or none for one.
    """
    width = x.shape[-1]
    if device_kind(x) == "cuda" and (gain is None or gain.dtype == x.dtype):
        # PyTorch's kernel for GPUs, which reads memory once; on a CPU F.rms_norm takes longer than what is below.
        if gain is None or gain.numel() == width:
            return F.rms_norm(x, (width,), gain, eps)
        return F.rms_norm(x, (width,), None, eps) * gain
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if tracing() == "compile":  # a compiler knows its gradient as fewer operations than that of what is below
        return F.rms_norm(wide, (width,), None if gain is None else gain.expand(width), eps).to(x.dtype)
    inverse = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / width + eps)
    if gain is not None and gain.numel() == 1:
        # A scalar gain is applied to one number a token, before x is read.
        return (wide * (inverse * gain)).to(x.dtype)
    out = wide * inverse
    return (out if gain is None else out * gain).to(x.dtype)


class PositionalDropout(NamedTuple):
    """Dropout by place of a part of the global batch: of tokens (B, L, D), or of attention weights (B, K, [H,] I, J).

    Element (b, t, d) of tokens is (first_row + b, first_position + t, first_column + d) to `positional_dropout`. The
    positions of weights are those of queries, K chunks of I; their columns are keys, and MOST_KEYS more a head.
    """

    p: float
    key: int
    first_row: int = 0
    first_position: int = 0
    first_column: int = 0
    featurewise: bool = False  # of tokens: one draw for a feature of a row
    # (3,) int64, in place of key, first_row and first_position: to a compiler, numbers would be part of the program.
    place: Tensor | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x without what is dropped, plus the residual, which has its shape; by one kernel a pass on a GPU."""
        if runs_triton(x) and x.dtype != torch.float64:
            # It imports triton, which not everyone has.
            from mega_scale.ops.dropout_triton import triton_dropout  # noqa: PLC0415

            fused = residual is not None and residual.dtype == x.dtype
            y = triton_dropout(x, residual if fused else None, *self[:6])
            return y if fused or residual is None else residual + y
        wide = x.movedim(2, -2) if x.dim() == 5 else x  # (B, K, I, H, J)
        shape = wide.shape
        wide = wide.flatten(-2 if x.dim() == 5 else -1).flatten(1, -2)
        rows, positions, columns = (torch.arange(size, device=x.device) for size in wide.shape)
        if x.dim() == 5:
            columns = columns % shape[-1] + MOST_KEYS * (columns // shape[-1])
        key: Any
        row: Any
        position: Any
        key, row, position = self[1:4] if self.place is None else self.place.unbind()
        positions = positions.new_zeros(1) if self.featurewise else positions + position
        y = positional_dropout(wide, self.p, key, rows + row, positions, columns + self.first_column)
        y = y.view(shape)
        y = y.movedim(-2, 2) if x.dim() == 5 else y
        return y if residual is None else residual + y


def positional_dropout(x: Tensor, p: float, key: int, rows: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Zero elements with probability p, and divide the others by 1 - p.

    Whether an element is dropped is a hash of (key, row, position, column) in the global batch: however ranks share a
    batch, every element meets the same fate, and recomputing activations needs no random state. x is (B, L, D); the
    key, which tells layers and steps apart, lies below 2^32; rows (B,), positions (L,) and columns (D,) are int64.
    Positions (1,) drop whole features, L then being any.
    """
    return x * keep_mask(p, key, rows, positions, columns).to(x.dtype).div_(1.0 - p)


def keep_mask(p: float, key: int, rows: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Which elements stay, (B, L, D) bool; arguments as in `positional_dropout`."""
    place = _mix64(_mix64(rows + key)[:, None] + positions)  # (B, L)
    column = _mix64(columns + (key ^ 0x9E3779B9))  # (D,)
    # As signed 32-bit numbers; both have their highest bit flipped, which the exclusive or flips back.
    mixed = (place - 2**31).to(torch.int32)[..., None] ^ (column - 2**31).to(torch.int32)
    # On 32-bit numbers that wrap, the only arrays of the full size. A shift of a signed number repeats its sign, which
    # is cut off: else no mixed number would be negative.
    for multiplier, shift in ((_FIRST, 16), (_SECOND, 15)):
        mixed ^= (mixed >> shift).bitwise_and_(2 ** (32 - shift) - 1)
        mixed *= multiplier
    mixed ^= (mixed >> 16).bitwise_and_(2**16 - 1)
    return mixed >= round(p * 2**32) - 2**31


def _mix64(numbers: Tensor) -> Tensor:
    """Hash int64 numbers to 0 .. 2^32 - 1, with products that stay below 2^63."""
    numbers = numbers & _MASK
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        numbers = ((numbers ^ (numbers >> 16)) * multiplier) & _MASK
    return numbers ^ (numbers >> 15)
