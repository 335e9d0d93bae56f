"""Initial values and filling, in one process."""

import pytest
import tiny_run
import torch
from torch import Tensor, nn

from mega_scale.checkpoint.state import open_weights
from mega_scale.parallel import seeded_values
from mega_scale.parallel.shard import fill

CPU = torch.device("cpu")


def filled(seed: int, **changes):
    config = tiny_run.tiny_config(**changes)
    model = tiny_run.meta_model(config)
    fill(model, seeded_values(config, seed), lambda old, value: nn.Parameter(value), CPU)
    return model


def test_values_depend_on_seed_and_name_only():
    first, second, other = filled(1), filled(1), filled(2)
    weight = "mega.layers.1.nffn.fc1.weight"
    assert torch.equal(first.get_parameter(weight), second.get_parameter(weight))
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))
    assert not torch.equal(first.get_parameter(weight), first.get_parameter(weight.replace(".1.", ".0.")))
    # A deeper model begins with the same layers.
    assert torch.equal(first.get_parameter(weight), filled(1, num_hidden_layers=5).get_parameter(weight))


def test_nothing_is_left_on_the_meta_device_and_ties_hold():
    model = filled(0)
    assert all(tensor.device == CPU for tensor in [*model.parameters(), *model.buffers()])
    assert model.lm_head.weight is model.mega.embedding_layer.word_embeddings.weight
    untied = filled(0, tie_word_embeddings=False)
    assert not torch.equal(untied.lm_head.weight, untied.mega.embedding_layer.word_embeddings.weight)


def test_refuses_values_of_another_shape():
    config = tiny_run.tiny_config()

    def values(name: str, owner: nn.Module, local_name: str) -> Tensor:
        return torch.zeros(3, 3)

    with pytest.raises(ValueError, match=r"word_embeddings\.weight has shape \(3, 3\), the model needs \(67, 18\)"):
        fill(tiny_run.meta_model(config), values, lambda old, value: nn.Parameter(value), CPU)


def test_refuses_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        open_weights(tmp_path)
