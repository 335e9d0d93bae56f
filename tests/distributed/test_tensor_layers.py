"""Norms, loss, embedding and collectives over cut channels against the whole, in fp64, gradients included."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

from mega_scale.model.layers import MegaRMSNorm, MegaScaleNorm
from mega_scale.model.megalodon_layers import MegalodonLayerNorm
from mega_scale.ops.linear import linear_cross_entropy
from mega_scale.parallel import ParallelConfig, World
from mega_scale.parallel.tensor_parallel import ChannelParallelNorm, VocabularyParallelEmbedding, vocabulary_part
from mega_scale.parallel.world import Axis, gather, gather_replicated, reduce_scatter, sum_gradients

pytestmark = pytest.mark.distributed

SIZES = (1, 2, 4)
NORMS = {
    "layernorm": lambda: nn.LayerNorm(12, 1e-5),
    "layernorm plain": lambda: nn.LayerNorm(12, 1e-5, elementwise_affine=False),
    "rmsnorm": lambda: MegaRMSNorm(12, 1e-5),
    "rmsnorm plain": lambda: MegaRMSNorm(12, 1e-5, elementwise_affine=False),
    "megalodon layernorm": lambda: MegalodonLayerNorm(12, 1e-5),
    "scalenorm": MegaScaleNorm,
    "scalenorm plain": lambda: MegaScaleNorm(affine=False),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mine(tensor: Tensor, axis: Axis, dim: int = -1) -> Tensor:
    return tensor.chunk(axis.size, dim)[axis.rank].clone().contiguous()


def whole_norm(name: str, offset: float) -> dict[str, Tensor]:
    norm = NORMS[name]().double()
    for number, parameter in enumerate(norm.parameters()):
        parameter.data = draw(*parameter.shape, seed=number + 5)
    x = (draw(3, 7, 12) + offset).requires_grad_()
    y = norm(x)
    (y * draw(3, 7, 12, seed=1)).sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{f"d{key}": p.grad for key, p in norm.named_parameters()}}


def part_norm(name: str, offset: float, axis: Axis) -> dict[str, Tensor]:
    whole = NORMS[name]()
    norm: Any = ChannelParallelNorm(whole, axis).to_empty(device="cpu").double()
    for number, (key, parameter) in enumerate(norm.named_parameters()):
        value = draw(*whole.get_parameter(key).shape, seed=number + 5)
        parameter.data = mine(value, axis) if key in norm.shard_dims else value
    x = mine(draw(3, 7, 12) + offset, axis).requires_grad_()
    y = norm(x)
    (y * mine(draw(3, 7, 12, seed=1), axis)).sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{f"d{key}": p.grad for key, p in norm.named_parameters()}}


LABELS = torch.tensor([[0, 3, 7, -100, 23], [12, 11, -100, 5, 6], [23, 0, 1, 2, 17]])


def loss_case(scale: float, axis: Axis | None) -> dict[str, Tensor]:
    """Of 24 words in slices of 4 tokens; a rank's gradient of the hidden states is its share."""
    hidden, weight, bias = draw(3, 5, 8) * scale, draw(24, 8, seed=1), draw(24, seed=2)
    if axis is not None:
        weight, bias = mine(weight, axis, 0), mine(bias, axis, 0)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    if axis is None:
        loss = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), LABELS.flatten(), reduction="sum")
    else:
        part = vocabulary_part(len(weight), axis, 24)
        loss = linear_cross_entropy(hidden, weight, bias, LABELS, part=part, slice_tokens=4)
    (loss * 1.5).backward()
    if axis is not None:
        dist.all_reduce(hidden.grad, group=axis.group)
    return {"loss": loss.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def embedding_case(axis: Axis | None) -> dict[str, Tensor]:
    ids = LABELS.clamp(min=1)
    weight, probe = draw(24, 8), draw(3, 5, 8, seed=3)
    layer: nn.Embedding = nn.Embedding(24, 8, padding_idx=17)
    if axis is not None:
        layer, weight, probe = VocabularyParallelEmbedding(layer, axis), mine(weight, axis, 0), mine(probe, axis)
    layer.weight = nn.Parameter(weight)
    y = layer(ids)
    (y * probe).sum().backward()
    return {"y": y.detach(), "dweight": dict(layer.named_parameters())["weight"].grad}


def product_case(axis: Axis | None) -> dict[str, Tensor]:
    """Collect, multiply by columns, gate, multiply by rows, sum: what a feed-forward network does."""
    x, up, down, gate = draw(2, 5, 8), draw(12, 8, seed=1), draw(8, 12, seed=2), draw(1, seed=3)
    probe = draw(2, 5, 8, seed=4)
    if axis is not None:
        x, up, down, probe = mine(x, axis), mine(up, axis, 0), mine(down, axis, 1), mine(probe, axis)
    leaves = {"x": x, "up": up, "down": down, "gate": gate}
    for leaf in leaves.values():
        leaf.requires_grad_()
    if axis is None:
        y = F.linear(torch.tanh(F.linear(x, up) * gate), down)
    else:
        hidden = torch.tanh(F.linear(gather(x, axis), up) * sum_gradients(axis, gate)[0])
        y = reduce_scatter(F.linear(hidden, down), axis)
    (y * probe).sum().backward()
    return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def logits_case(axis: Axis | None) -> dict[str, Tensor]:
    """A loss of whole logits, which every rank computes alike."""
    x, weight = draw(3, 5, 8), draw(24, 8, seed=1)
    if axis is not None:
        x, weight = mine(x, axis), mine(weight, axis, 0)
    leaves = {"x": x, "weight": weight}
    for leaf in leaves.values():
        leaf.requires_grad_()
    logits = F.linear(x if axis is None else gather(x, axis), weight)
    if axis is not None:
        logits = gather_replicated(logits, axis)
    F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="sum").backward()
    return {"logits": logits.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def everything() -> dict[Any, dict[str, Tensor] | None]:
    found: dict[Any, dict[str, Tensor] | None] = {}
    with World.start(ParallelConfig(timeout_s=120)) as world:
        for size in SIZES:
            group = dist.new_group(list(range(size)))
            if world.rank >= size:
                continue
            axis = Axis(group, world.rank, size)
            for name in NORMS:
                for offset in (0.0, 1e4):
                    found["norm", name, offset, size] = part_norm(name, offset, axis)
            for scale in (1.0, 300.0):
                found["loss", scale, size] = loss_case(scale, axis)
            found["embedding", size] = embedding_case(axis)
            found["product", size] = product_case(axis)
            found["logits", size] = logits_case(axis)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(everything, max(SIZES), tmp_path_factory.mktemp("layers"))


def joined(ranks: list[Any], key: Any, name: str, dim: int | None) -> Tensor:
    parts = [rank[key][name] for rank in ranks if key in rank]
    if dim is None:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    return torch.cat(parts, dim)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("name", NORMS)
def test_norms(ranks, name, offset, size):
    # A mean far from zero is what would cancel in a sum of squares.
    for key, expected in whole_norm(name, offset).items():
        dim = None if key == "dscalar" else -1
        found = joined(ranks, ("norm", name, offset, size), key, dim)
        tolerance = 1e-7 if offset else 1e-10
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_loss(ranks, scale, size):
    expected = loss_case(scale, None)
    assert math.isfinite(float(expected["loss"]))
    for key, dim in (("loss", None), ("dhidden", None), ("dweight", 0), ("dbias", 0)):
        found = joined(ranks, ("loss", scale, size), key, dim)
        torch.testing.assert_close(found, expected[key], rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("size", SIZES)
def test_embedding(ranks, size):
    expected = embedding_case(None)
    assert not expected["dweight"][17].any()  # the padding
    for key, dim in (("y", -1), ("dweight", 0)):
        torch.testing.assert_close(joined(ranks, ("embedding", size), key, dim), expected[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_products(ranks, size):
    expected = product_case(None)
    for key, dim in (("y", -1), ("dx", -1), ("dup", 0), ("ddown", 1), ("dgate", None)):
        found = joined(ranks, ("product", size), key, dim)
        torch.testing.assert_close(found, expected[key], rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.parametrize("size", SIZES)
def test_logits_that_every_rank_computes(ranks, size):
    expected = logits_case(None)
    for key, dim in (("logits", None), ("dx", -1), ("dweight", 0)):
        found = joined(ranks, ("logits", size), key, dim)
        torch.testing.assert_close(found, expected[key], rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.parametrize("wrong", [24, -1])
def test_ids_outside_the_vocabulary_are_refused_as_in_one_process(wrong):
    layer = VocabularyParallelEmbedding(nn.Embedding(24, 8), Axis(None, 0, 2))
    with pytest.raises(ValueError, match=rf"input_ids holds {wrong}: expected 0 to 23 \(vocab_size=24\)"):
        layer(torch.tensor([[0, wrong]]))
