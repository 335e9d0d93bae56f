"""Products and collectives of tp as one operator, against collectives that are waited for, and against one process."""

from typing import Any

import overlap_study
import pytest
import torch
from overlap_study import CASES, COMPILED, FEW, LAYOUT, study
from ranks import run_ranks

from mega_scale.parallel.meter import Sent

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
RUNS = [
    (layout, case)
    for layouts in LAYOUT.values()
    for layout in layouts
    for case in (CASES if layout.startswith("tp") else FEW)
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict[str, Any]]:
    [found] = run_ranks(overlap_study.alone, 1, tmp_path_factory.mktemp("alone"), launched=False)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[Any, list[dict[str, Any]]]:
    everything = {}
    for size in LAYOUT:
        ranks = run_ranks(study, size, tmp_path_factory.mktemp(f"ranks-{size}"), size, timeout_s=500)
        everything |= {key: [rank[key] for rank in ranks] for key in ranks[0]}
    return everything


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("layout", "case"), RUNS)
def test_trains_as_with_collectives_that_are_waited_for_and_as_one_process(found, alone, layout, case):
    within = 1e-5 if CASES[case][2] == "fp32" else 1e-2
    for run, waiting in zip(found[layout, case, True], found[layout, case, False], strict=True):
        for expected in (waiting, alone.get(case, waiting)):
            assert run["losses"] == pytest.approx(expected["losses"], rel=within)
            assert run["norms"] == pytest.approx(expected["norms"], rel=within)
            for name, tensor in expected["end"].items():
                torch.testing.assert_close(run["end"][name], tensor, rtol=within, atol=within, msg=name)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict[str, tuple[dict[str, Any], int]]]:
    return run_ranks(overlap_study.compiled, 2, tmp_path_factory.mktemp("compiled"), timeout_s=500)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_blocks_train_as_eager_ones(found, compiled, case):
    within = 1e-5 if CASES[case][2] == "fp32" else 1e-2
    for rank, waiting in zip(compiled, found["tp2", case, False], strict=True):
        run, graphs = rank[case]
        assert graphs == 1
        assert run["losses"] == pytest.approx(waiting["losses"], rel=within)
        assert run["norms"] == pytest.approx(waiting["norms"], rel=within)


@pytest.fixture(scope="module")
def metered(tmp_path_factory) -> list[dict[tuple[str, bool], list[tuple[Sent, ...]]]]:
    return run_ranks(overlap_study.metered, 2, tmp_path_factory.mktemp("metered"), timeout_s=300)


@pytest.mark.parametrize("case", CASES)
def test_ranks_send_the_same_beside_products_and_nothing_again(metered, case):
    """Of eight large collectives a block, seven travel beside a product."""
    changes, how, _ = CASES[case]
    segments = 2 if "activation_checkpoint_segment" in how else 1
    hops = 1 if changes.get("use_normalized_ffn") is False else 2
    dense = 0 if changes.get("model_type") == "megalodon" or changes.get("add_lm_hidden_dense_layer") is False else 1
    for rank in metered:
        both = zip(rank[case, True], rank[case, False], strict=True)
        for direction, (calls, waiting) in zip(("forward", "backward"), both, strict=True):
            assert sorted((c.operation, c.bytes) for c in calls) == sorted((c.operation, c.bytes) for c in waiting)
            assert {call.phase for call in calls} == {direction}
            beside = [call for call in calls if call.beside is not None]
            # The gradient of attention's normed stream is the average's, too.
            waited = 0 if direction == "forward" else 1
            in_blocks = [call for call in beside if ".layers." in call.module]
            assert len(in_blocks) == 2 * segments * (2 * hops - waited)
            assert len(beside) == len(in_blocks) + dense
            for call in beside:
                assert call.beside.name.startswith("symm_mem::") and call.beside.module == call.module
                tokens = call.shape[0] * call.shape[1]
                assert call.beside.flops > 0 and call.beside.flops % (2 * tokens) == 0
        assert not any(call.beside for calls in rank[case, False] for call in calls)
