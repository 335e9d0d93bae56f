"""Linear layers: their products on a CPU in fp32, by the library that is fastest on it, and the output layer's loss.

PyTorch multiplies fp32 matrices with Intel's MKL, which keeps its widest instructions for Intel's processors. oneDNN
uses them on all that have them: on an AMD EPYC products x W^T take 0.84 of the time, the gradient of W as long.

The loss over a vocabulary is computed a slice of tokens at a time, so logits are never whole. The gradient of a slice
is computed while its logits are there, so nothing is recomputed: the backward pass only scales what the forward pass
left, which is as large as the inputs.

Legend: T tokens, D inputs, W outputs, V words, S tokens of a slice.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mega_scale.ops import (
    KERNELS,
    autocast_dtype,
    device_kind,
    once_differentiable,
    operator,
    runs_native,
    runs_triton,
    tracing,
    without_autocast,
)

# Fewer are a decoding step's, which reads the weight once whatever multiplies it.
_TOKENS = 32
# Logits that exist at a time, numbers: on a CPU they should stay in its caches, a GPU needs large products.
# With kernels they exist once, in 16 bits.
_CPU_LOGITS, _GPU_LOGITS, _KERNEL_LOGITS = 2**21, 2**26, 2**28
_NO_TARGET = -100  # as `torch.nn.functional.cross_entropy` has it
LOSSES = ("auto", "plain", "triton")
_PROCESSOR = Path("/proc/cpuinfo")
# A PyTorch that was built without oneDNN does not even know its operators.
ONEDNN_PRODUCTS = [torch.ops.mkldnn._linear_pointwise.default] if torch.backends.mkldnn.is_available() else []
"""What activation checkpointing and counters know a product of oneDNN by."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`, (..., D), (W, D) and (W,) to (..., W); differentiable once where oneDNN computes it."""
    if torch.compiler.is_compiling():
        # Not F.linear, in whose place DeepSpeed puts an autograd function of its own.
        return torch._C._nn.linear(x, weight, bias)
    tokens = x.numel() // max(x.shape[-1], 1)
    if tokens < _TOKENS or not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    flat: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
    return flat.unflatten(0, x.shape[:-1])


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`, (T, D) and (W, D) to (T, W), for use inside autograd functions."""
    if len(x) < _TOKENS or not _suits_onednn(x, weight):
        # Not F.linear, in whose place DeepSpeed puts an autograd function of its own.
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (  # the cheapest questions first
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and device_kind(x) == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and _onednn_is_faster()
        and runs_native(x, weight)
    )


@cache
def _onednn_is_faster() -> bool:
    """Whether the processor has wide registers, and a maker for whose processors MKL does not use them."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        lines = _PROCESSOR.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(makers) and "GenuineIntel" not in makers


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times_transposed(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            times_transposed(gradient, weight.t()) if of_x else None,
            gradient.t() @ x if of_weight else None,
            _sum_tokens(gradient) if of_bias else None,
        )


def packed_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`x weight^T + bias` of several layers that read the same x, as one product; differentiable once.

    x is (..., D), the weights are (W, D) and the biases (W,) with a W each. Returns a tensor (..., W) a layer; they are
    views of one. The weights are put together again in the backward pass: a copy that is kept would be as large as the
    layers, which FSDP and ZeRO-3 free in between. For the same reason they are rounded, under autocast, each time anew.
    """
    dtype = autocast_dtype(x.device)
    x = x if dtype is None else x.to(dtype)
    with without_autocast(x.device):
        if tracing() == "trace":
            packed = F.linear(x, torch.cat([*weights]).to(x.dtype), torch.cat([*biases]).to(x.dtype))
            return packed.split([len(weight) for weight in weights], -1)
        outs: tuple[Tensor, ...] = _PackedLinear.apply(x.flatten(0, -2), *weights, *biases)
        return tuple(out.unflatten(0, x.shape[:-1]) for out in outs)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
        """x (T, D); weights, then as many biases."""
        weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        ctx.save_for_backward(x, *weights)
        packed = times_transposed(x, torch.cat(weights).to(x.dtype), torch.cat(biases).to(x.dtype))
        return packed.split([len(weight) for weight in weights], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_x, *of_layers = ctx.needs_input_grad
        of_weights, of_biases = any(of_layers[: len(weights)]), any(of_layers[len(weights) :])
        gradient, widths = torch.cat(gradients, 1), [len(weight) for weight in weights]
        none = (None,) * len(weights)
        return (
            times_transposed(gradient, torch.cat(weights).to(x.dtype).t()) if of_x else None,
            *((gradient.t() @ x).to(weights[0].dtype).split(widths) if of_weights else none),
            *(_sum_tokens(gradient).to(weights[0].dtype).split(widths) if of_biases else none),
        )


def _sum_tokens(gradient: Tensor) -> Tensor:
    """The gradient of a bias, (W,), by that of outputs (T, W)."""
    if device_kind(gradient) == "cpu":
        # As a product, which reads rows in order; a sum over them takes twice as long.
        return (gradient.new_ones(1, len(gradient)) @ gradient)[0]
    return gradient.sum(0)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """`x weight^T + bias` of several layers that read the same x, a product each; differentiable once.

    x is (..., D), the weights are (W, D) and the biases (W,) or none, with a W each. Returns a tensor (..., W) a layer.
    Each product of the backward pass adds its gradient of x to those before it, where autograd's sum would read them
    all again. `packed_linear` copies weights for that, this function does not. Autocast rounds weights in both passes.
    """
    dtype = autocast_dtype(x.device)
    x = x if dtype is None else x.to(dtype)
    with without_autocast(x.device):
        outs: tuple[Tensor, ...] = _Linears.apply(len(weights), x.flatten(0, -2), *weights, *biases)
        return tuple(out.unflatten(0, x.shape[:-1]) for out in outs)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
        """x (T, D); as many weights, then their biases."""
        ctx.save_for_backward(x, *layers[:count])
        own: list[Any] = [None if t is None else t.to(x.dtype) for t in layers]
        return tuple(times_transposed(x, *layer) for layer in zip(own[:count], own[count:], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        _, of_x, *of_layers = ctx.needs_input_grad
        layers = list(zip(gradients, weights, strict=True))
        return (
            None,
            _sum_products([*gradients], [weight.to(x.dtype) for weight in weights]) if of_x else None,
            *((d.t() @ x).to(w.dtype) if of else None for (d, w), of in zip(layers, of_layers, strict=False)),
            *(_sum_tokens(d).to(w.dtype) if of else None
              for (d, w), of in zip(layers, of_layers[len(weights) :], strict=True)),
        )  # fmt: skip


def _sum_products_fake(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return left[0].new_empty(left[0].shape[0], right[0].shape[1])


@operator(_sum_products_fake)
def _sum_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """The sum of products of (T, W) and (W, D), each added to what is there as it is made: (T, D)."""
    total = left[0] @ right[0]
    for a, b in zip(left[1:], right[1:], strict=True):
        total.addmm_(a, b)
    return total


KERNELS["mega_scale::sum_products"] = lambda left, right: len(left)


class VocabularyPart(NamedTuple):
    """The words of one rank, where ranks share the vocabulary: its first one and how many, of which rows beyond are
    none; `reduce` combines a tensor of all ranks in place."""

    first: int
    words: int
    reduce: Callable[[Tensor, Literal["max", "sum"]], None]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    part: VocabularyPart | None = None,
    slice_tokens: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of `hidden weight^T + bias`, summed over targets in fp32, nats; differentiable once.

    Hidden states are (..., D) in fp32 or bf16, the weight (V, D) and the bias (V,) are this rank's rows under `part`,
    targets (...) int64, -100 where there is none. Ranks that share words return the same loss, and their
    gradients of `hidden` add up. S is chosen by device and V unless it is given; under a compiler or a tracer, logits
    are whole. `impl` is plain, triton (`cross_entropy_triton`, for a GPU and up to fp32), or auto: the last that
    serves. Raises ValueError where shapes do not fit, or for another `impl`.
    """
    if impl not in LOSSES:
        raise ValueError(f"impl={impl!r} is unknown: choose one of {', '.join(LOSSES)}")
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)} do not fit: "
            "expected (..., D), (V, D) and (...)"
        )
    dtype = autocast_dtype(hidden.device)
    if dtype is not None:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with without_autocast(hidden.device):
        if part is None and tracing():
            logits = F.linear(hidden, weight, bias).flatten(0, -2)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, targets.flatten(), reduction="sum")
        kernels = impl == "triton" or (impl == "auto" and runs_triton(hidden) and hidden.dtype != torch.float64)
        if slice_tokens is None:
            most = _KERNEL_LOGITS if kernels else _CPU_LOGITS if device_kind(hidden) == "cpu" else _GPU_LOGITS
            slice_tokens = max(most // weight.shape[0], 1)
        loss: Tensor = _LinearCrossEntropy.apply(
            hidden.flatten(0, -2), weight, bias, targets.flatten(), part, slice_tokens, kernels
        )
    return loss


def _loss_and_slope(
    logits: Tensor, targets: Tensor, part: VocabularyPart | None, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of losses, at least fp32, and if wanted its gradient by logits (S, V)."""
    counts = targets != _NO_TARGET
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The column of each target, and whether this rank has it.
    column, mine = targets, counts
    if part is not None:
        scores[:, part.words :] = -math.inf
        column, mine = _own_columns(targets, part)
    column = column.where(mine, 0)[:, None]
    largest = scores.amax(1)
    if part is not None:
        part.reduce(largest, "max")
    scores -= largest[:, None]
    hit = scores.gather(1, column)[:, 0].where(mine, 0)
    sums = scores.exp_().sum(1)
    if part is not None:
        part.reduce(both := torch.stack([hit, sums]), "sum")
        hit, sums = both
    loss = ((sums.log() - hit) * counts).sum()
    if not wanted:
        return loss, None
    slope = scores.mul_((counts / sums)[:, None])
    return loss, slope.scatter_add_(1, column, -mine.to(slope.dtype)[:, None])


def _kernel_loss_and_slope(
    logits: Tensor, targets: Tensor, part: VocabularyPart | None, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The same by kernels; the slope is where the logits were."""
    # Not before it is needed: triton may not be installed.
    from mega_scale.ops.cross_entropy_triton import cross_entropy, cross_entropy_gradient  # noqa: PLC0415

    counts, targets = targets != _NO_TARGET, targets.contiguous()
    if part is None:
        largest, sums, hit = cross_entropy(logits, targets, 0, logits.shape[1], wanted)
        return ((sums.log() - (hit - largest)) * counts).sum(), logits if wanted else None
    own, sums, hit = cross_entropy(logits, targets, part.first, part.words, False)
    part.reduce(largest := own.clone(), "max")
    _, mine = _own_columns(targets, part)
    part.reduce(both := torch.stack([(hit - largest).where(mine, 0), sums * (own - largest).exp()]), "sum")
    hit, sums = both
    if wanted:
        cross_entropy_gradient(logits, targets, largest, sums, part.first, part.words)
    return ((sums.log() - hit) * counts).sum(), logits if wanted else None


def _own_columns(targets: Tensor, part: VocabularyPart) -> tuple[Tensor, Tensor]:
    column = targets - part.first
    return column, (targets != _NO_TARGET) & (column >= 0) & (column < part.words)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        part: VocabularyPart | None,
        slice_tokens: int,
        kernels: bool,
    ) -> Tensor:
        form = _kernel_loss_and_slope if kernels else _loss_and_slope
        wanted = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        # Sums over slices, in more precision than a slice.
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=wide) if wanted[2] else None
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for begin in range(0, len(hidden), slice_tokens):
            some = slice(begin, begin + slice_tokens)
            x, target = hidden[some], targets[some]
            loss, slope = form(times_transposed(x, weight, bias), target, part, any(wanted))
            total += loss
            if slope is None:
                continue
            if d_bias is not None:
                d_bias += slope.sum(0, dtype=wide)
            slope = slope.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(slope, weight, out=d_hidden[some])
            if d_weight is not None:
                if d_weight.dtype == slope.dtype:
                    d_weight.addmm_(slope.t(), x)
                else:
                    d_weight += slope.t() @ x
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden * gradient.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * gradient).to(of_weight),
            None if d_bias is None else (d_bias * gradient).to(of_bias),
            *[None] * 4,
        )
