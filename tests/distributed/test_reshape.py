"""The reshape matrix: what any layout saves, any other one loads bit for bit, and goes on from as if nothing was."""

from pathlib import Path

import continued_study
import pytest
import state_folder
from continued_study import LAYOUTS, MORE
from ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reshape")


@pytest.fixture(scope="module")
def losses(folder) -> list[float]:
    (found,) = run_ranks(continued_study.uninterrupted, 1, folder / "ranks", folder / "source", launched=False)
    return found


@pytest.fixture(scope="module")
def passed_on(folder, losses) -> dict[str, list[list[float]]]:
    found = {}
    for size in SIZES:
        ranks = run_ranks(
            continued_study.passed_on, size, folder / f"on-{size}", folder / "source", folder / "saved", size
        )
        found |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return found


@pytest.fixture(scope="module")
def matrix(folder, passed_on) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for size in SIZES:
        for rank in run_ranks(
            continued_study.matrix,
            size,
            folder / f"matrix-{size}",
            folder / "source",
            folder / "saved",
            size,
            timeout_s=600,
        ):
            for pair, different in rank.items():
                found.setdefault(pair, []).extend(different)
    return found


def test_all_layouts_took_part(passed_on, matrix):
    assert passed_on.keys() == LAYOUTS.keys()
    assert matrix.keys() == {(one, other) for one in LAYOUTS for other in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_loaded_and_saved_is_the_same_bit_for_bit(folder, passed_on, layout):
    source = state_folder.canonical(folder / "source")
    assert len(source) > 100 and int(source["steps"]) == continued_study.CUT
    assert state_folder.differing(state_folder.canonical(folder / "saved" / layout), source) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_what_every_other_one_saved(matrix, layout):
    assert {other: matrix[other, layout] for other in LAYOUTS if matrix[other, layout]} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_next_losses_are_those_of_the_uninterrupted_run(passed_on, losses, layout):
    assert len(losses) == MORE and losses[-1] < losses[0]
    for found in passed_on[layout]:
        assert found == pytest.approx(losses, rel=1e-6)
