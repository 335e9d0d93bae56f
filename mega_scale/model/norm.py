"""Norms of Mega behind one wrapper, with the parameter names of transformers 4.37.2.

Legend: B batch, L length, D channels.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mega_scale.ops.rms import divide_by_rms

_EPSILON = 1e-5
# The key of config.json by which an export is known, also after transformers 4.37.2 has saved it again.
SAVED_BY = "saved_by"


class MegaScaleNorm(nn.Module):
    """`g x / rms(x)` with one learned scalar g (arXiv 1910.05895)."""

    scalar: nn.Parameter | None

    def __init__(self, eps: float = _EPSILON, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("scalar", nn.Parameter(torch.ones(1)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) in any floating dtype; statistics in fp32."""
        return divide_by_rms(x, self.scalar, self.eps)


class MegaRMSNorm(nn.Module):
    """`g x / rms(x)` with a learned g per channel (arXiv 1910.07467). In 4.37.2 it returns its input unnormalised."""

    weight: nn.Parameter | None

    def __init__(self, channels: int, eps: float = _EPSILON, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(channels)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) in any floating dtype; statistics in fp32."""
        return divide_by_rms(x, self.weight, self.eps)


class MegaSequenceNorm(nn.Module):
    """The norm named by `normalization_type`; batch norms take their statistics from valid positions only."""

    def __init__(self, kind: str, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.norm: nn.Module
        if kind == "layernorm":
            self.norm = nn.LayerNorm(channels, _EPSILON, elementwise_affine=affine)
        elif kind == "scalenorm":
            self.norm = MegaScaleNorm(affine=affine)
        elif kind == "rmsnorm":
            self.norm = MegaRMSNorm(channels, affine=affine)
        elif kind == "batchnorm":
            self.norm = nn.BatchNorm1d(channels, eps=_EPSILON, affine=affine)
        elif kind == "syncbatchnorm":
            self.norm = nn.SyncBatchNorm(channels, eps=_EPSILON, affine=affine)
        else:
            raise ValueError(f"normalization_type={kind!r} is unknown")
        self.over_batch = kind in ("batchnorm", "syncbatchnorm")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x (B, L, D); mask (B, L) bool marks the positions that batch statistics count."""
        if not self.over_batch:
            return self.norm(x)
        if mask is None or not self.training:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        out = torch.zeros_like(x)
        out[mask] = self.norm(x[mask])
        return out


def refuse_statistics_of_the_future(decoder: nn.Module) -> None:
    """Refuse to run a decoder whose batch norms would take their statistics from all positions, those ahead included.

    Raises:
        ValueError: a batch norm is in training mode; in eval mode it reads its running statistics, which leak nothing.
    """
    if any(isinstance(module, MegaSequenceNorm) and module.norm.training for module in decoder.modules()):
        raise ValueError(
            "normalization_type of batch norms, in a decoder that trains, would show every position the future: "
            "call eval(), or choose scalenorm, layernorm or rmsnorm"
        )


def warn_if_norm_differs(values: Mapping[str, Any]) -> None:
    """Warn of weights that were trained with the RMSNorm of transformers 4.37.2, which does not normalise.

    Args:
        values: content of a config.json.
    """
    release = str(values.get("transformers_version") or "").split(".")[0]
    older = release.isdecimal() and int(release) < 5
    if values.get("normalization_type") == "rmsnorm" and older and SAVED_BY not in values:
        warnings.warn(
            "normalization_type='rmsnorm' in a checkpoint of transformers "
            f"{values['transformers_version']}: its RMSNorm returned its input without normalising it, here it "
            "normalises, so the model computes something else than it did there; train it further, or start anew",
            UserWarning,
            stacklevel=3,
        )
