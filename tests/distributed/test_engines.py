"""Both engines in every stage at two ranks, against plain PyTorch in one process."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import state_folder
import tiny_run
import torch
from engine_study import CUT, ENGINES, WITH_DROPOUT, study
from ranks import run_ranks
from torch import Tensor, nn

from mega_scale.checkpoint.state import open_weights
from mega_scale.parallel import ParallelConfig, World, seeded_values
from mega_scale.parallel.shard import fill

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(study, 2, folder, folder, timeout_s=600)


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], list[float], dict[str, Tensor]]:
    return tiny_run.plain_run(tiny_run.tiny_config())


@pytest.fixture(params=list(ENGINES))
def key(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def test_starts_from_the_same_values_as_one_process(ranks, key):
    config = tiny_run.tiny_config()
    model = tiny_run.meta_model(config)
    fill(model, seeded_values(config, tiny_run.SEED), lambda old, value: nn.Parameter(value), torch.device("cpu"))
    for found in ranks:
        assert_same(found[key]["start"], dict(model.state_dict()))
        assert found[key]["tied"]


def test_trains_as_one_process_does(ranks, plain, key):
    losses, norms, weights = plain
    for found in ranks:
        assert found[key]["losses"] == pytest.approx(losses, rel=1e-5)
        assert found[key]["norms"] == pytest.approx(norms, rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(found[key]["end"][name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert min(norms) > tiny_run.MAX_GRAD_NORM  # clipping took part


def test_resumes_bit_for_bit(ranks, folder, key):
    for found in ranks:
        straight, resumed = found[key], found[key]["resumed"]
        assert_same(resumed["at_cut"], straight["at_cut"])
        assert resumed["losses"] == straight["losses"][CUT:]
        assert resumed["norms"] == straight["norms"][CUT:]
        assert_same(resumed["end"], straight["end"])
    assert_equal_files(folder / key / "resumed", folder / key / "straight")


def assert_equal_files(found: Path, expected: Path) -> None:
    """Everything that was written, moments included."""
    whole = state_folder.canonical(expected)
    assert sum(name.startswith("exp_avg_sq/") for name in whole) > 20
    assert state_folder.differing(state_folder.canonical(found), whole) == []


def test_generation_and_evaluation_between_steps_change_nothing(ranks, key):
    for found in ranks:
        busy = found[key]["generating"]
        assert busy["losses"] == found[key]["losses"]
        assert busy["norms"] == found[key]["norms"]
        assert len(set(busy["evaluations"])) == tiny_run.STEPS  # called directly or not, and moving with the weights
        assert [text.shape for text in busy["texts"]] == [(1, 19), (1, 19)]
    assert all(torch.equal(*pair) for pair in zip(*(found[key]["generating"]["texts"] for found in ranks), strict=True))


def test_bf16_is_near_fp32_and_keeps_the_ema_exact(ranks, key):
    for found in ranks:
        rounded = found[key]["bf16"]
        assert rounded["losses"] == pytest.approx(found[key]["losses"], rel=1e-2)
        assert rounded["norms"] == pytest.approx(found[key]["norms"], rel=2e-2)
        assert rounded["losses"] != found[key]["losses"]
        assert rounded["linear"] == rounded["direct"] == torch.bfloat16
        assert rounded["text"].shape == (1, 11)
        assert rounded["cache"] == (True, torch.float32)  # not a rounded copy
        assert rounded["masters"] == {torch.float32}
        prefix = "mega.layers.1.mega_layer.ema_gate."
        for name, seen in rounded["ema"].items():
            assert seen.dtype == torch.float32
            assert torch.equal(seen, found[key]["start"][prefix + name]), name


def test_products_are_rounded_alike_in_every_stage_of_zero(ranks):
    for found in ranks:
        # Biases are 0 in the first step, so the second is the first that could round their sums otherwise.
        for part in ("losses", "norms"):
            expected = found["zero-2"]["bf16"][part][:2]
            assert found["zero-3"]["bf16"][part][:2] == pytest.approx(expected, rel=1e-5), part


def test_recomputed_activations_change_nothing(ranks, key):
    for found in ranks:
        run = found[key]["recomputed"]
        assert run["losses"] == found[key]["losses"][:2]
        assert run["norms"] == found[key]["norms"][:2]
        # Of every second block among three, the one that is looked at is the only one.
        assert run["forwards"] == [1, 2, 1]


@pytest.mark.parametrize("key", WITH_DROPOUT)
def test_recomputed_activations_repeat_dropout(ranks, key):
    for found in ranks:
        kept, recomputed = found[key]["dropout"]
        assert kept["losses"] != found[key]["losses"][:2]
        assert recomputed["losses"] == kept["losses"]
        assert recomputed["norms"] == kept["norms"]
        assert_same(recomputed["end"], kept["end"])


@pytest.mark.parametrize("saved", ["cut", "straight"])
def test_opened_weights_are_the_gathered_ones(ranks, folder, key, saved):
    weights = open_weights(folder / key / saved)
    expected = ranks[0][key]["at_cut" if saved == "cut" else "end"]
    assert_same(dict(weights), expected)
    assert len(weights) == len(expected)
    assert "lm_head.weight" in weights
    assert "mega.layers.0.mega_layer.rel_pos_bias._float_tensor" in weights


def test_materialises_one_tensor_at_a_time(ranks, key):
    for found in ranks:
        seen = found[key]
        if key.startswith("fsdp") or key == "zero-3":
            assert seen["full_values"] == 1
            assert 0.4 < seen["share"] < 0.6
        else:
            assert seen["share"] == 1.0


def test_deepspeed_leaves_no_patched_functions_behind(ranks, key):
    assert all(found[key]["linear_restored"] for found in ranks)


def alone() -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    with World.start(ParallelConfig()) as world, patch("os.dup2", wraps=os.dup2) as moved:
        for key in ("fsdp-3", "zero-0", "zero-2", "zero-3"):
            engine = tiny_run.make_engine(world, ENGINES[key])
            found[key] = tiny_run.train(engine, world, range(tiny_run.STEPS))
            engine.close()
            engine.close()
            assert "LOCAL_RANK" not in os.environ, "accelerate would take the process for one that a launcher started"
        assert not moved.called, "what a rank says meanwhile, why it ends perhaps, goes elsewhere"
    return found


def test_one_process_without_a_launcher(plain, tmp_path):
    [found] = run_ranks(alone, 1, tmp_path, launched=False)
    for losses, norms in found.values():
        assert losses == pytest.approx(plain[0], rel=1e-5)
        assert norms == pytest.approx(plain[1], rel=1e-5)
