"""Documents that share rows, on ranks that share rows and channels: each computes what it computes alone."""

from pathlib import Path
from typing import Any

import documents_alone
import pytest
import torch
from document_study import MODELS, RUNS, config, study
from ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """What every rank found, by layout, engine and model."""
    everything = {}
    for size in (2, 4):
        ranks = run_ranks(study, size, Path(tmp_path_factory.mktemp(f"documents-{size}")), size, timeout_s=600)
        everything |= {key: [rank[key] for rank in ranks] for key in ranks[0]}
    return everything


@pytest.fixture(scope="module")
def alone(found) -> dict[str, tuple[Any, ...]]:
    """Logits, loss and gradients of every document run alone, in one process, from the same weights."""
    expected = {}
    for name, (changes, _) in MODELS.items():
        weights = found[next(run for run in RUNS if run[2] == name)][0]["start"]
        expected[name] = documents_alone.all_alone(documents_alone.without_chunks(config(changes), weights))
    return expected


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("layout", "engine", "model"), RUNS)
def test_documents_compute_what_each_computes_alone(found, alone, layout, engine, model):
    logits, loss, gradients = alone[model]
    ranks = found[layout, engine, model]
    parts = {rank["part"]: rank["logits"] for rank in ranks}
    torch.testing.assert_close(torch.cat([parts[i] for i in sorted(parts)], 1), logits, rtol=1e-5, atol=1e-5)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert len(gradients) > 30
        for name, gradient in gradients.items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-5, atol=1e-5, msg=name)
