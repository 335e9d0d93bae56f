"""Floating-point operations of a Mega model, as the algorithm needs them: what MFU and benchmarks divide by time.

Legend: D hidden size, N averages, Z width of queries and keys, E width of values, F feed-forward width, C chunk,
V vocabulary, J keys that a query sees.
"""

from typing import NamedTuple

from mega_scale.model.configuration_mega import MegaConfig


class Flops(NamedTuple):
    """Operations of the forward pass of one token through the whole model, a multiply-add counting as two."""

    projections: int  # 2 (D E + D (2D + Z + E) + E D) a layer
    feed_forward: int  # 4 D F a layer
    averages: int  # the recurrence, 6 N D a layer and direction
    attention: int  # 2 J (Z + E) a layer
    head: int  # 2 D V, and 2 D^2 for its dense layer


def forward_flops(config: MegaConfig, sequence_length: int) -> Flops:
    """Operations per token of reading a sequence, in tokens, of which every token predicts the next.

    In causal attention a query sees `(C + 1) / 2` keys of its chunk on average. What an implementation computes beyond
    that, such as masked scores or products with a Toeplitz matrix, does not count.

    Raises:
        ValueError: the model attends to an encoder, whose length would count too.
    """
    chunk = min(config.chunk_size, sequence_length) if config.use_chunking else sequence_length
    return _flops(config, (chunk + 1) / 2 if config.is_decoder else chunk)


def decoding_flops(config: MegaConfig, context: int) -> Flops:
    """Operations of decoding one token after `context` tokens, of which attention sees those of its chunk."""
    return _flops(config, (context % config.chunk_size if config.use_chunking else context) + 1)


def training_flops_per_token(config: MegaConfig, sequence_length: int) -> int:
    """Operations of forward and backward per token: three times the forward. Recomputed activations are not counted."""
    return 3 * sum(forward_flops(config, sequence_length))


def _flops(config: MegaConfig, keys: float) -> Flops:
    if config.add_cross_attention:
        raise ValueError("add_cross_attention=True: operations depend on an encoder, give a model without it")
    d, z, e = config.hidden_size, config.shared_representation_size, config.intermediate_size
    layers = config.num_hidden_layers
    return Flops(
        projections=layers * 2 * (d * e + d * (2 * d + z + e) + e * d),
        feed_forward=layers * 4 * d * config.nffn_hidden_size if config.use_normalized_ffn else 0,
        averages=layers * 6 * config.ema_projection_size * d * (2 if config.bidirectional else 1),
        attention=layers * int(2 * keys * (z + e)),
        head=2 * d * config.vocab_size + (2 * d * d if config.add_lm_hidden_dense_layer else 0),
    )
