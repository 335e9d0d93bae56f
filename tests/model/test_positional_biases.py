"""Positional biases by their definitions, each as the matrix of queries and keys that it stands for."""

import torch

from mega_scale import MegaConfig
from mega_scale.model.layers import MegaRotaryRelativePositionalBias, MegaSimpleRelativePositionalBias
from mega_scale.ops.attention import toeplitz


def test_rotary_bias_is_the_product_of_rotated_vectors():
    """The definition: rotate alpha to position i and beta to position j, and multiply."""
    z, length = 8, 11
    generator = torch.Generator().manual_seed(1)
    alpha, beta = (torch.randn(1, z, generator=generator, dtype=torch.float64) for _ in range(2))
    module = MegaRotaryRelativePositionalBias(MegaConfig(shared_representation_size=z)).double()
    with torch.no_grad():
        module.alpha.copy_(alpha)
        module.b_param.copy_(beta)

    def rotate(vector, position):
        first, second = vector.reshape(-1).chunk(2)
        angle = position * 10000.0 ** (-torch.arange(z // 2) / (z // 2))
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])

    got = toeplitz(module(length, length, 0), length)
    for i in range(length):
        for j in range(length):
            torch.testing.assert_close(got[i, j], rotate(alpha, i) @ rotate(beta, j), atol=1e-6, rtol=1e-6)


def test_simple_bias_reads_the_table_about_its_centre_and_never_beyond():
    def read(centre, length):
        config = MegaConfig(max_positions=5, relative_positional_bias="simple", use_chunking=True, chunk_size=centre)
        module = MegaSimpleRelativePositionalBias(config)
        with torch.no_grad():
            module.rel_pos_bias.copy_(torch.arange(9.0))
        return module(length, length, 0).tolist()

    assert read(5, 5) == list(range(9))
    assert read(3, 3) == [0, 1, 2, 3, 4]
    assert read(8, 8) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 8]
