"""The figures that a run reports."""

import pytest
import torch

from mega_scale.model import MegaConfig, MegaForCausalLM, MegalodonConfig, MegalodonForCausalLM
from mega_scale.training.metrics import Throughput, memory_bytes, peak_flops, training_flops_per_token


def test_throughput_leaves_out_pauses():
    config = MegaConfig(is_decoder=True, bidirectional=False, use_chunking=False)
    throughput = Throughput(config, torch.device("cpu"), "bf16", ranks=2)
    assert throughput.peak is None
    throughput.peak = 1e9
    throughput.since -= 9.0  # as if nine seconds had passed
    throughput.add(50, 0.0, 64)
    throughput.add(50, 0.0, 1024)  # longer sequences
    flops = 50 * sum(training_flops_per_token(config, length) for length in (64, 1024))
    report = throughput.report(steps_left=4)
    assert report["tokens_per_second"] == pytest.approx(100 / 9, rel=0.05)
    assert report["eta_seconds"] == pytest.approx(18, rel=0.05)
    assert report["mfu"] == pytest.approx(flops / 9 / 2e9, rel=0.05)
    throughput.add(7, 0.25, 64)
    throughput.since -= 1.0
    report = throughput.report(0)
    assert report["tokens_per_second"] == pytest.approx(7, rel=0.05)
    assert report["loader_wait"] == pytest.approx(0.25, rel=0.05)
    assert throughput.report(0)["loader_wait"] == 0


def test_device_figures():
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert memory_bytes(torch.device("cpu")) > 10 * 2**20


def test_flops_follow_the_matrix_products():
    """Six operations per matrix weight and token, plus averages and attention."""
    config = MegaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, intermediate_size=96, nffn_hidden_size=80,
        shared_representation_size=32, ema_projection_size=4, is_decoder=True, bidirectional=False, use_chunking=True,
        chunk_size=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = MegaForCausalLM(config)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    rest = 3 * 3 * (6 * 4 * 64 + 129 * (32 + 96))
    assert training_flops_per_token(config, 1024) == 6 * weights + rest
    shorter = training_flops_per_token(config, 64)
    assert training_flops_per_token(config, 1024) - shorter == 3 * 3 * 64 * (32 + 96)
    config.bidirectional, config.is_decoder = True, False  # twice the averages, and every key of a chunk
    assert training_flops_per_token(config, 1024) == 6 * weights + 3 * 3 * (2 * 6 * 4 * 64 + 256 * (32 + 96))
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        training_flops_per_token(MegaConfig(add_cross_attention=True, is_decoder=True, bidirectional=False), 8)


@pytest.mark.parametrize("swiglu", [False, True])
def test_flops_of_a_megalodon_follow_its_matrix_products(swiglu):
    config = MegalodonConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, intermediate_size=96, nffn_hidden_size=80,
        shared_representation_size=32, ema_projection_size=4, chunk_size=128, num_attention_heads=2, swiglu=swiglu,
    )  # fmt: skip
    with torch.device("meta"):
        model = MegalodonForCausalLM(config)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert training_flops_per_token(config, 1024) == 6 * weights + 3 * 3 * (12 * 4 * 64 + 129 * (32 + 96))
    assert training_flops_per_token(config, 64) == 6 * weights + 3 * 3 * (12 * 4 * 64 + 65 * (32 + 96))
