"""Which part of a tensor a rank holds, and initial values and filling, in one process."""

import pytest
import tiny_run
import torch
from torch import Tensor, nn

from mega_scale.checkpoint.state import open_weights
from mega_scale.parallel import seeded_values
from mega_scale.parallel.shard import Shard, Sharding, fill

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


@pytest.mark.parametrize(("rows", "ranks", "sizes"), [(6, 2, [3, 3]), (5, 4, [2, 2, 1, 0]), (3, 4, [1, 1, 1, 0])])
def test_shards_cover_a_tensor_once_and_join_to_it(rows, ranks, sizes):
    whole = torch.arange(2.0 * rows).view(rows, 2)
    sharding = Sharding("table", None, 0, rows)
    shards = [sharding.shard(whole.shape, rank, ranks) for rank in range(ranks)]
    assert [shard.sizes[0] for shard in shards] == sizes
    assert torch.equal(torch.cat([shard.of(whole) for shard in shards]), whole)
    padded = [sharding.local(whole, rank, ranks) for rank in range(ranks)]
    assert all(tensor.shape == padded[0].shape for tensor in padded)
    assert torch.equal(sharding.join(padded), whole)


def test_a_shard_along_columns_of_some_rows():
    packed = torch.arange(24.0).view(6, 4)
    sharding = Sharding("packed", (2, 5), 1)
    assert torch.equal(sharding.local(packed, 1, 2), packed[2:5, 2:])
    assert sharding.shard((3, 4), 1, 2) == Shard((0, 2), (3, 2)) and sharding.shard((3, 4), 1, 2).numel == 6
    assert sharding.shard((3, 4), 0, 1) == Shard((0, 0), (3, 4))
