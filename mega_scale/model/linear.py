"""The linear layer of Mega blocks.

Legend: B batch, L length, D inputs, W outputs.
"""

from torch import Tensor, nn

from mega_scale.ops.linear import linear


class MegaLinear(nn.Linear):
    """`x weight^T + bias`, by whichever library is fastest on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """input (B, L, D), any floating dtype; returns (B, L, W)."""
        return linear(input, self.weight, self.bias)
