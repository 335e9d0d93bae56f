"""The activation function that a configuration names."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mega_scale.ops.gates import LEAN


class MegaActivation(nn.Module):
    """transformers' function of that name; silu by whatever computes a block's gates."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.gates = LEAN
        self.other = None if name == "silu" else ACT2FN[name]

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape and floating dtype."""
        return self.gates.silu(x) if self.other is None else self.other(x)
