"""Layers of a model whose channels are cut over the ranks of `tp`.

Legend: B batch, L length, D channels of the residual stream, W width inside a layer, T ranks, V vocabulary.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mega_scale.model.attention import MegaMovingAverageGatedAttention
from mega_scale.model.layers import (
    MegaLinear,
    MegaRMSNorm,
    MegaRotaryRelativePositionalBias,
    MegaScaleNorm,
    MegaSimpleRelativePositionalBias,
)
from mega_scale.ops.linear import linear
from mega_scale.ops.once import once_differentiable
from mega_scale.ops.precision import autocast_dtype
from mega_scale.parallel.collectives import Axis, Gather, reduce_scatter, start_gather
from mega_scale.parallel.sequence import SequenceParallelEma
from mega_scale.parallel.shards import TensorParallel, share


def on_meta(module: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Make a module without memory for its parameters."""
    with torch.device("meta"):
        return module(*args, **kwargs)


class CutLinear(TensorParallel, MegaLinear):
    """A linear layer of which a rank has some outputs, and all inputs: (B, L, D) to (B, L, W / T)."""

    shards: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}

    def __init__(self, inputs: int, outputs: int, axis: Axis, bias: bool = True) -> None:
        super().__init__(inputs, share(outputs, axis.size), bias)
        self.axis = axis


class _Gathering:
    """Collects the channels of an input, (B, L, D / T) to (B, L, D), from when they are known until they are needed."""

    axis: Axis
    _coming: Gather | None = None

    def expect(self, x: Tensor) -> None:
        """Start before the layer is called with x."""
        self._coming = self._start(x)

    def collected(self, x: Tensor) -> Tensor:
        """All channels of x, which is what was given to `expect` if anything was."""
        coming = self._coming or self._start(x)
        self._coming = None
        return coming.wait()

    def _start(self, x: Tensor) -> Gather:
        # As a matrix product will see it, so that under autocast only 16 bits of a number travel.
        return Gather(x.to(autocast_dtype(x.device) or x.dtype), self.axis)


class GatherLinear(_Gathering, CutLinear):
    """`CutLinear` of an input whose channels are cut: (B, L, D / T) to (B, L, W / T)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D / T)."""
        return super().forward(self.collected(x))


class ScatterLinear(TensorParallel, MegaLinear):
    """A linear layer whose inputs are cut: ranks sum their parts, each keeping its channels: W / T to D / T."""

    shards: ClassVar[dict[str, int]] = {"weight": 1, "bias": 0}

    def __init__(self, inputs: int, outputs: int, axis: Axis) -> None:
        super().__init__(inputs // axis.size, outputs)
        self.axis = axis
        self.bias = nn.Parameter(torch.empty(outputs // axis.size, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, W / T) to (B, L, D / T)."""
        out = reduce_scatter(linear(x, self.weight), self.axis)
        return out + self.bias.to(out.dtype)


class SegmentedLinear(nn.Module):
    """The packed `mx_proj` with a layer for each segment, so that each can be cut, or not, in its own way.

    Args:
        segments: layer of every segment, in order.
        rows: where each segment lies in the packed weight.
    """

    def __init__(self, segments: dict[str, nn.Module], rows: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.rows = rows
        for name, layer in segments.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, L, D) to one tensor a segment."""
        return tuple(layer(x) for layer in self.children())


class WholeLinear(TensorParallel, MegaLinear):
    """A linear layer that every rank computes alike."""


class GatherSegments(_Gathering, SegmentedLinear):
    """`SegmentedLinear` of an input whose channels are cut: they are collected once for all segments."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, L, D / T)."""
        return super().forward(self.collected(x))


class CutEma(TensorParallel, SequenceParallelEma):
    """The moving average of this rank's channels: each channel has its own, so nothing travels."""

    shards: ClassVar[dict[str, int]] = {
        "damping_factor": 0,
        "decay_factor": 0,
        "ema_expansion_matrix": 0,
        "kernel_projection_matrix": 0,
        "residual_weight": 0,
    }


class SegmentedAttention(MegaMovingAverageGatedAttention):
    """Gated attention whose `mx_proj` is a `SegmentedLinear`."""

    def project(self, averaged: Tensor) -> tuple[Tensor, ...]:
        """See `MegaMovingAverageGatedAttention.project`."""
        return self.mx_proj(averaged)


class CutAttention(TensorParallel, SegmentedAttention):
    """Gated attention with this rank's values; queries and keys are everyone's."""


class SharedRotaryBias(TensorParallel, MegaRotaryRelativePositionalBias):
    """A positional bias that every rank holds."""


class SharedSimpleBias(TensorParallel, MegaSimpleRelativePositionalBias):
    """A positional bias that every rank holds."""


class _Normalize(torch.autograd.Function):
    """x over its root mean square, after subtracting its mean if `center`, over the channels of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, center: bool, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if center:
            # Means and squared distances from them combine without cancellation, unlike sums of squares.
            mean = wide.mean(-1)
            squares = (wide - mean[..., None]).square().mean(-1)
            means, variances = start_gather(torch.stack([mean, squares]), axis).wait().unbind(1)
            total = means.mean(0)
            variance = variances.mean(0) + (means - total).square().mean(0)
            wide = wide - total[..., None]
        else:
            variance = wide.square().mean(-1)
            dist.all_reduce(variance, group=axis.group)
            variance /= axis.size
        scale = torch.rsqrt(variance + eps)[..., None]
        out = wide * scale
        ctx.axis, ctx.center, ctx.dtype = axis, center, x.dtype
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        out, scale = ctx.saved_tensors
        along = (gradient * out).mean(-1)
        sums = torch.stack([along, gradient.mean(-1)]) if ctx.center else along[None]
        dist.all_reduce(sums, group=ctx.axis.group)
        sums = (sums / ctx.axis.size)[..., None]
        moved = gradient - out * sums[0]
        return ((moved - sums[1] if ctx.center else moved) * scale).to(ctx.dtype), None, None, None


class _CutNorm(TensorParallel):
    """A norm over channels that are cut: one or two statistics a token travel."""

    center = False
    eps: float

    def normalize(self, x: Tensor, gain: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """x (B, L, D / T); the gain is a number, or one a channel."""
        out = _Normalize.apply(x, self.axis, self.center, self.eps)
        out = out if gain is None else out * gain
        out = out if bias is None else out + bias
        return out.to(x.dtype)


class CutLayerNorm(_CutNorm, nn.LayerNorm):
    """LayerNorm over cut channels."""

    shards: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}
    center = True

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D / T)."""
        return self.normalize(x, self.weight, self.bias)


class CutRMSNorm(_CutNorm, MegaRMSNorm):
    """RMSNorm over cut channels."""

    shards: ClassVar[dict[str, int]] = {"weight": 0}

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D / T)."""
        return self.normalize(x, self.weight)


class CutScaleNorm(_CutNorm, MegaScaleNorm):
    """ScaleNorm over cut channels; its one number is everyone's."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D / T)."""
        return self.normalize(x, self.scalar)


def cut_norm(norm: nn.Module, axis: Axis) -> nn.Module:
    """The same norm over cut channels, on the meta device.

    Raises:
        ValueError: its statistics are over the batch.
    """
    found: Any
    if isinstance(norm, nn.LayerNorm):
        [channels] = norm.normalized_shape
        found = on_meta(CutLayerNorm, channels // axis.size, norm.eps, elementwise_affine=norm.elementwise_affine)
    elif isinstance(norm, MegaRMSNorm):
        affine = norm.weight is not None
        channels = norm.weight.shape[0] if norm.weight is not None else axis.size
        found = on_meta(CutRMSNorm, channels // axis.size, norm.eps, affine)
    elif isinstance(norm, MegaScaleNorm):
        found = on_meta(CutScaleNorm, norm.eps, norm.scalar is not None)
    else:
        raise ValueError(
            f"parallel.tp={axis.size} cuts channels, which {type(norm).__name__} cannot be: "
            "choose model.normalization_type=layernorm, scalenorm or rmsnorm"
        )
    found.axis = axis
    return found
