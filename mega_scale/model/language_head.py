"""The layer over the vocabulary, which gives logits, or the loss without them.

Legend: B batch, L length, D channels, V vocabulary.
"""

from torch import Tensor, nn

from mega_scale.ops.cross_entropy import linear_cross_entropy


class LanguageModelHead(nn.Linear):
    """A linear layer that can also take targets: then it returns their summed cross-entropy, a few tokens at a time."""

    @classmethod
    def of(cls, layer: nn.Module) -> "LanguageModelHead":
        """The same parameters in a layer of this kind.

        Raises:
            TypeError: the layer is not linear.
        """
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"the head of a language model is a linear layer, not {type(layer).__name__}")
        if isinstance(layer, cls):
            return layer
        head = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        head.weight, head.bias = layer.weight, layer.bias
        if getattr(layer, "_is_hf_initialized", False):  # or transformers would draw it anew
            vars(head)["_is_hf_initialized"] = True
        return head

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or a loss.

        Args:
            input: (B, L, D).
            targets: (B, L) int64, -100 where there is none.

        Returns:
            (B, L, V) without targets; with them a scalar in fp32, nats, summed over targets.
        """
        if targets is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, self.bias, targets.to(input.device))
