"""Tiny models and a tokenizer for the tests of folders."""

import os
import subprocess

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mega_scale.model import MegaConfig, MegalodonConfig, causal_lm_class

SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2}


@pytest.fixture(scope="session")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = SPECIAL | {symbol: len(SPECIAL) + number for number, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="session")
def make_config():
    def make(**changes):
        sizes = {
            "vocab_size": 259,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
            "nffn_hidden_size": 20,
            "shared_representation_size": 8,
            "ema_projection_size": 4,
            "max_positions": 32,
            "bidirectional": False,
            "is_decoder": True,
        }
        return MegaConfig(**(sizes | changes))

    return make


@pytest.fixture(scope="session")
def make_megalodon_config():
    def make(**changes):
        sizes = {
            "vocab_size": 259,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "shared_representation_size": 8,
            "intermediate_size": 24,
            "nffn_hidden_size": 20,
            "ema_projection_size": 4,
            "chunk_size": 8,
            "timestep_norm_groups": 4,
            "bos_token_id": 0,
            "pad_token_id": 1,
        }
        return MegalodonConfig(**(sizes | changes))

    return make


def _moved(config):
    """A model whose every parameter is away from its initial value, so that biases and norms show in the logits."""
    generator = torch.Generator().manual_seed(7)
    model = causal_lm_class(config)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def make_model(make_config):
    return lambda **changes: _moved(make_config(**changes))


@pytest.fixture(scope="session")
def make_megalodon(make_megalodon_config):
    return lambda **changes: _moved(make_megalodon_config(**changes))


@pytest.fixture(scope="session")
def input_ids():
    return torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def run_peer():
    """Runs a program in the Python that has transformers 4.37.2; its standard output comes back."""

    def run(program, *arguments):
        command = [os.environ["MEGA_SCALE_PEER_PYTHON"], "-c", program, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
