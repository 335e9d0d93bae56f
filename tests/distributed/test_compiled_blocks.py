"""Compiled blocks train as eager ones and send as much: both engines, sp, tp, recomputation, documents, bf16."""

from typing import Any

import pytest
from compiled_study import CASES, study
from ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(study, 2, tmp_path_factory.mktemp("compiled"), timeout_s=600)


@pytest.mark.parametrize("case", CASES)
def test_compiled_blocks_are_whole_graphs_and_train_as_eager_ones(ranks, case):
    """One graph for all blocks, or of segments one each for the first, those between, and the last."""
    *_, dtype = CASES[case]
    for found in ranks:
        (losses, norms, sent, none), (*compiled, sent_compiled, graphs) = found[case]
        assert (none, graphs, sent_compiled) == (0, 3 if "segments" in case else 1, sent)
        for got, want in zip(compiled, (losses, norms), strict=True):
            assert got == pytest.approx(want, rel=1e-5 if dtype == "fp32" else 1e-2)
