"""The exponential average of the weights: its formula, in every engine, over ranks, and through checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import state_folder
import tiny_run
import torch
from engine_study import ENGINES, gathered
from ranks import run_ranks
from torch import Tensor

from mega_scale.checkpoint.state import StateReader, open_weights
from mega_scale.parallel import Engine, ParallelConfig, World
from mega_scale.parallel.weight_average import WeightAverage

pytestmark = pytest.mark.distributed

DECAY, CUT, END = 0.8, 2, 4
KINDS = ("fsdp-3", "zero-0", "zero-1", "zero-3")


def averages(folder: Path) -> dict[str, Tensor]:
    found = state_folder.canonical(folder)
    return {name: tensor for name, tensor in found.items() if name.startswith("average/")}


def _make(world: World, key: str) -> Engine:
    return tiny_run.make_engine(world, ENGINES[key], weight_average=DECAY)


def study(folder: Path) -> dict[str, dict[str, Any]]:
    """Train and save in every engine; then go on in every engine from what another one saved."""
    found: dict[str, dict[str, Any]] = {}
    with World.start(ParallelConfig(timeout_s=120)) as world:
        for key in KINDS:
            engine = _make(world, key)
            tiny_run.train(engine, world, range(CUT))
            state_folder.save(engine, folder / key / "cut", world)
            tiny_run.train(engine, world, range(CUT, END))
            state_folder.save(engine, folder / key / "end", world)
            before = gathered(engine.module)
            with engine.averaged():
                inside = gathered(engine.module)
            found[key] = {"before": before, "inside": inside, "after": gathered(engine.module)}
            engine.close()
        for key, source in zip(KINDS, [*KINDS[1:], KINDS[0]], strict=True):
            engine = _make(world, key)
            state_folder.load(engine, folder / source / "cut", world)
            state_folder.save(engine, folder / key / "again", world)
            tiny_run.train(engine, world, range(CUT, END))
            state_folder.save(engine, folder / key / "resumed", world)
            engine.close()
    return found


def alone(folder: Path, two_ranks: Path) -> list[dict[str, Tensor]]:
    """The weights after each step in one process, which then goes on from where two ranks were."""
    steps: list[dict[str, Tensor]] = []
    with World.start(ParallelConfig()) as world:
        engine = _make(world, "fsdp-3")
        tiny_run.train(engine, world, range(CUT), lambda engine: steps.append(gathered(engine.module)))
        tiny_run.train(engine, world, range(CUT, END), lambda engine: steps.append(gathered(engine.module)))
        norm = engine.step(1.0, skip=True)
        assert norm == 0
        state_folder.save(engine, folder, world)
        engine.close()
        engine = _make(world, "zero-2")
        state_folder.load(engine, two_ranks, world)
        state_folder.save(engine, folder / "again", world)
        engine.close()
    return steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(study, 2, folder / "ranks", folder)


@pytest.fixture(scope="module")
def steps(folder, ranks) -> list[dict[str, Tensor]]:
    return run_ranks(alone, 1, folder / "rank", folder / "alone", folder / "zero-3" / "end", launched=False)[0]


def test_it_is_the_weighted_mean_of_the_weights_after_each_step(folder, steps):
    shares = torch.tensor([DECAY ** (END - 1 - i) for i in range(END)], dtype=torch.float64)
    shares /= shares.sum()
    opened = open_weights(folder / "alone", average=True)
    assert opened.keys() == steps[0].keys()
    for name, average in opened.items():
        expected = sum(share * weights[name].double() for share, weights in zip(shares, steps, strict=True))
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    assert StateReader(folder / "alone").averaged == END  # a step that is not taken has no part


@pytest.mark.parametrize("key", KINDS)
def test_two_ranks_average_as_one_process_does(folder, steps, key):
    one, two = averages(folder / "alone"), averages(folder / key / "end")
    assert one.keys() == two.keys() and len(one) > 20
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=3e-6, msg=name)
    one, two = (torch.cat([tensor.flatten() for tensor in found.values()]) for found in (one, two))
    assert float((two - one).norm() / one.norm()) < 1e-6


@pytest.mark.parametrize("key", KINDS)
def test_it_survives_another_engine_bit_for_bit(folder, ranks, key):
    source = [*KINDS[1:], KINDS[0]][KINDS.index(key)]
    saved, end = (state_folder.canonical(folder / source / part) for part in ("cut", "end"))
    assert int(saved["averaged"]) == CUT
    assert state_folder.differing(state_folder.canonical(folder / key / "again"), saved) == []
    # Engines sum gradients in other orders.
    for name, tensor in state_folder.canonical(folder / key / "resumed").items():
        torch.testing.assert_close(tensor, end[name], rtol=1e-5, atol=1e-6, msg=name)


def test_it_survives_another_number_of_ranks_bit_for_bit(folder, steps):
    paths = folder / "zero-3" / "end", folder / "alone" / "again"
    assert state_folder.differing(*(state_folder.canonical(path) for path in paths)) == []


@pytest.mark.parametrize("key", KINDS)
def test_the_engine_computes_with_it_and_then_with_the_weights_again(folder, ranks, key):
    opened = dict(open_weights(folder / key / "end", average=True))
    for found in (rank[key] for rank in ranks):
        assert all(torch.equal(found["inside"][name], tensor) for name, tensor in opened.items())
        assert all(torch.equal(found["after"][name], tensor) for name, tensor in found["before"].items())
        assert not all(torch.equal(found["inside"][name], tensor) for name, tensor in found["before"].items())


def test_the_average_of_one_step_is_its_weights():
    weight = torch.zeros(3)
    average = WeightAverage(0.9999, {"w": weight})
    weight += 1
    average.update()
    assert torch.equal(average.tensors["w"], weight)
    weight += 1
    average.update()
    torch.testing.assert_close(average.tensors["w"], torch.full((3,), (0.9999 + 2) / 1.9999))


def test_a_state_without_one_is_not_opened_as_one_and_one_begins_with_its_weights(tmp_path):
    with World.start(ParallelConfig(device="cpu")) as world:
        engine = tiny_run.make_engine(world, ENGINES["fsdp-3"])
        state_folder.save(engine, tmp_path / "none", world)
        with pytest.raises(ValueError, match=r"keeps no average"), engine.averaged():
            pass
        engine = _make(world, "fsdp-3")
        tiny_run.train(engine, world, range(1))
        state_folder.load(engine, tmp_path / "none", world)
        state_folder.save(engine, tmp_path / "begun", world)
    with pytest.raises(ValueError, match=r"train\.weight_average"):
        open_weights(tmp_path / "none", average=True)
    found = state_folder.canonical(tmp_path / "begun")
    assert int(found["averaged"]) == 0
    begun = averages(tmp_path / "begun")
    assert all(torch.equal(found[name.replace("average/", "weight/")], tensor) for name, tensor in begun.items())
