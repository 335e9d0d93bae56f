"""Compiled blocks train as others do, in both engines, with rows shared, recomputed and of documents."""

from typing import Any

import pytest
from compiled_study import CASES, study
from ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(study, 2, tmp_path_factory.mktemp("compiled"), timeout_s=600)


@pytest.mark.parametrize("case", CASES)
def test_compiled_blocks_are_one_graph_and_train_as_eager_ones(ranks, case):
    for found in ranks:
        (losses, norms, none), (*compiled, graphs) = found[case]
        assert (none, graphs) == (0, 1)
        for got, want in zip(compiled, (losses, norms), strict=True):
            assert got == pytest.approx(want, rel=1e-5)
