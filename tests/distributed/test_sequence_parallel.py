"""Rows that ranks share: how they are cut, and an encoder in parts against the whole; what cannot be cut."""

from typing import Any

import pytest
import tiny_run
import torch
from ranks import run_ranks
from torch import Tensor, nn

from mega_scale.model import MegaForCausalLM, MegaForMaskedLM
from mega_scale.parallel import ParallelConfig, Place, World, seeded_values
from mega_scale.parallel.model_parallel import apply_model_parallelism
from mega_scale.parallel.shard import START, RowSlice, assemble, by_source, fill, shardings
from mega_scale.parallel.world import ALONE, Axis

pytestmark = pytest.mark.distributed

LENGTH = 64
LENGTHS = (
    64,
    50,
    32,
    17,
)  # of the rows: on a border of parts, before it, inside the first part; the last part is empty
ACTIVATIONS = ("softmax", "laplace")


def encoder(activation: str) -> Any:
    return tiny_run.tiny_config(
        is_decoder=False,
        bidirectional=True,
        attention_activation=activation,
        dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        num_hidden_layers=2,
    )


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 67, (len(LENGTHS), LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    labels = ids.where(mask & (torch.rand(ids.shape, generator=generator) < 0.3), -100)
    return ids, mask, labels


def train_once(activation: str, sp: Axis, every: int) -> dict[str, Tensor]:
    """Loss and gradients of this rank's part, before they are summed over ranks."""
    config = encoder(activation)
    with torch.device("meta"):
        model, template = MegaForMaskedLM(config), MegaForMaskedLM(config)
    row_slice = apply_model_parallelism(
        model, sp=sp, tp=ALONE, checkpointing=ParallelConfig(activation_checkpoint=every), seed=1
    )
    place = {"template": template}
    fill(model, seeded_values(config, 2), lambda old, value: nn.Parameter(value.clone()), torch.device("cpu"), **place)
    model.train()
    ids, mask, labels = batch()
    own, targets = row_slice.take(Place(3, 8), ids, labels)
    with row_slice:
        loss = model(
            input_ids=own,
            attention_mask=row_slice.split(mask, False),
            labels=targets,
            num_items_in_batch=int((labels != -100).sum()),
        ).loss
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    whole = {
        name: assemble(own, gradients.__getitem__)
        for name, own in by_source(shardings(model)).items()
        if all(gradients[part] is not None for part in own)
    }
    return whole | {"loss": loss.detach()}


def study() -> dict[Any, dict[str, Tensor]]:
    with World.start(ParallelConfig(timeout_s=120, sp=4)) as world:
        return {(name, every): train_once(name, world.axes["sp"], every) for name in ACTIVATIONS for every in (0, 1)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(study, 4, tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_encoder_in_parts_has_the_gradients_of_the_whole(ranks, activation, every):
    expected = train_once(activation, ALONE, 0)
    parts = [rank[activation, every] for rank in ranks]
    assert parts[0].keys() == expected.keys() and len(expected) > 40
    for name, tensor in expected.items():
        torch.testing.assert_close(sum(part[name] for part in parts), tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        ("sp", {"use_chunking": False}, r"parallel\.sp=2.*model\.use_chunking=true"),
        ("sp", {"truncation": 8}, r"parallel\.sp=2.*model\.truncation"),
        ("tp", {"hidden_size": 19}, r"parallel\.tp=2.*model\.hidden_size=19.*20"),
    ],
)
def test_what_cannot_be_spread_is_refused(axes, changes, message):
    with torch.device("meta"):
        model = MegaForCausalLM(tiny_run.tiny_config(intermediate_size=20, nffn_hidden_size=24, **changes))
    axis = {"sp": ALONE, "tp": ALONE} | {axes: Axis(None, 0, 2)}
    with pytest.raises(ValueError, match=message):
        apply_model_parallelism(model, **axis, checkpointing=ParallelConfig(), seed=0)


@pytest.mark.parametrize(
    ("length", "parts", "chunk", "each"), [(64, 2, 16, 32), (61, 2, 16, 32), (65, 4, 16, 32), (8, 8, 1, 1)]
)
def test_parts_are_whole_chunks_and_lose_nothing(length, parts, chunk, each):
    inputs = torch.arange(2 * length).view(2, length)
    labels = inputs + 1
    taken = [RowSlice(part, parts, chunk).take(START, inputs, labels) for part in range(parts)]
    for parts_taken, whole, padding in zip(zip(*taken, strict=True), (inputs, labels), (0, -100), strict=True):
        assert all(part.shape == (2, each) and part.is_contiguous() for part in parts_taken)
        joined = torch.cat(parts_taken, 1)
        assert torch.equal(joined[:, :length], whole)
        assert (joined[:, length:] == padding).all()


def test_alone_rows_stay_as_they_are():
    inputs = torch.arange(7).view(1, 7)
    assert RowSlice().take(START, inputs, inputs)[0] is inputs


def test_knows_its_place_only_inside():
    window = RowSlice(part=2, parts=4, chunk=8)
    inputs = torch.zeros(1, 64, dtype=torch.int64)
    window.take(Place(5, 12), inputs, inputs)
    assert not window.cut and window.place == START
    with window:
        assert window.cut and window.first_token == 32 and window.place == Place(5, 12)
    assert not window.cut and window.first_token == 0 and window.place == START
    with pytest.raises(KeyError), window:
        raise KeyError
    assert not window.cut
    with window:  # the backward pass of the same micro-batch
        assert window.first_token == 32
