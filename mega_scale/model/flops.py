"""Floating-point operations of a causal Mega model, as the algorithm needs them.

Legend: D hidden size, N averages, Z width of queries and keys, E width of values, F feed-forward width, C chunk,
V vocabulary.
"""

from mega_scale.model.configuration_mega import MegaConfig


def training_flops_per_token(config: MegaConfig, sequence_length: int) -> int:
    """Operations of forward and backward per token, a multiply-add counting as two.

    Forward: matrix products `2 (D E + D (2D + Z + E) + E D + 2 D F)`, the recurrence `6 N D`, and causal attention
    inside a chunk, where a query sees `(C + 1) / 2` keys on average, `2 (Z + E)` each. The head adds `2 D V`, and
    `2 D^2` for its dense layer. Backward costs twice the forward. Recomputed activations are not counted.

    Args:
        config: of the model.
        sequence_length: tokens; the chunk of a model without chunks.

    Returns:
        Operations per token.
    """
    d, z, e = config.hidden_size, config.shared_representation_size, config.intermediate_size
    chunk = min(config.chunk_size, sequence_length) if config.use_chunking else sequence_length
    products = 2 * (d * e + d * (2 * d + z + e) + e * d)
    products += 4 * d * config.nffn_hidden_size if config.use_normalized_ffn else 0
    averages = 6 * config.ema_projection_size * d
    attention = (chunk + 1) * (z + e)
    head = 2 * d * config.vocab_size + (2 * d * d if config.add_lm_hidden_dense_layer else 0)
    return 3 * (config.num_hidden_layers * (products + averages + attention) + head)
