"""Linear layers: `nn.Linear` itself, as libraries that quantise, adapt or count linear layers look for it.

Legend: B batch, L length, D inputs, W outputs.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mega_scale.ops.linear import linear


class MegaLinear(nn.Linear):
    """`x weight^T + bias`, by whichever library is fastest on a CPU whatever hooks it has: what trainers make of it."""

    def forward(self, input: Tensor) -> Tensor:
        """input (B, L, D), any floating dtype; returns (B, L, W)."""
        return linear(input, self.weight, self.bias)


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, by whichever library is fastest on a CPU if the layer is a plain one: (B, L, D) to (B, L, W)."""
    plain = plain_linear(layer)
    found: Tensor = layer(x) if plain is None else linear(x, plain.weight, plain.bias)
    return found


def plain_linear(layer: nn.Module) -> nn.Linear | None:
    """The layer, if calling it is its product and nothing else: if it is neither replaced, wrapped nor hooked."""
    plain = (
        type(layer) is nn.Linear
        and not torch.compiler.is_compiling()
        and "forward" not in vars(layer)
        and layer._compiled_call_impl is None
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not _has_any_global_hook()
    )
    return layer if plain else None  # type: ignore[return-value]
