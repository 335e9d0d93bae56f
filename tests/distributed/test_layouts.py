"""Every layout, pairwise with engines and variants, against one process: losses, gradient norms and weights."""

from pathlib import Path
from typing import Any

import layout_study
import pytest
import torch
from layout_study import MODEL_STEPS, MODELS, RUNS, STEPS, VARIANTS, steps_of, study, study_models
from ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ENGINES = ("fsdp-3", "zero-3")
EXACT = [run for run in RUNS if VARIANTS[run[2]][2] == "fp32"]
ROUNDED = [run for run in RUNS if run not in EXACT]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[tuple[str, int], dict[str, Any]]:
    [found] = run_ranks(layout_study.alone, 1, tmp_path_factory.mktemp("alone"), launched=False)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """What every rank found, by layout, engine and variant."""
    everything = {}
    for size in (2, 4):
        ranks = run_ranks(study, size, Path(tmp_path_factory.mktemp(f"ranks-{size}")), size, timeout_s=840)
        everything |= {key: [rank[key] for rank in ranks] for key in ranks[0]}
    return everything


def assert_equal_runs(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for run in ranks:
        assert run["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert run["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert run["start"].keys() == expected["start"].keys()
        for name, tensor in expected["start"].items():
            assert torch.equal(run["start"][name], tensor), name
        for name, tensor in expected["end"].items():
            torch.testing.assert_close(run["end"][name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "engine", "variant"), EXACT)
def test_trains_as_one_process_does(found, alone, layout, engine, variant):
    expected = alone[variant, steps_of(layout, variant)]
    assert min(expected["norms"]) > 0.4  # so that clipping takes part
    assert_equal_runs(found[layout, engine, variant], expected)


def test_dropout_matters(alone):
    dropped = alone["dropout-recomputed", steps_of("dp2", "dropout-recomputed")]["losses"]
    assert dropped != pytest.approx(alone["plain", STEPS]["losses"][: len(dropped)], rel=1e-3)


@pytest.mark.parametrize(("layout", "engine", "variant"), ROUNDED)
def test_bf16_is_near_fp32(found, alone, layout, engine, variant):
    exact = variant.replace("bf16", "plain")
    expected = alone[exact, steps_of(layout, exact)]["losses"]
    for run in found[layout, engine, variant]:
        assert run["losses"] == pytest.approx(expected[: len(run["losses"])], rel=1e-2)
        assert run["losses"] != expected[: len(run["losses"])]


@pytest.fixture(scope="module")
def other_models(tmp_path_factory):
    return run_ranks(study_models, 4, Path(tmp_path_factory.mktemp("models")), timeout_s=600)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_other_models_train_as_in_one_process(other_models, alone, model, engine):
    """All attention activations, both biases, all norms, tied and untied, with and without optional parts."""
    assert_equal_runs([rank[model, engine] for rank in other_models], alone[model, MODEL_STEPS])


def test_zero_3_knows_from_the_start_what_a_module_reads_of_others(found, other_models):
    """What DeepSpeed finds later, it lists for the next steps only where it was partitioned when it was looked for."""
    runs = [*found.items(), *((key, [rank[key] for rank in other_models]) for key in other_models[0])]
    for key, ranks in runs:
        for run in ranks:
            start, end = run["read elsewhere"]
            assert start == end, key
            assert not start or "zero-3" in key
