"""Ranks of tp need not divide the vocabulary: everything is as in one process, and no checkpoint shows it."""

import json
import shutil
from pathlib import Path

import continued_study
import pytest
import state_folder
import torch
from continued_study import CASES
from ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def name(case: continued_study.Case) -> str:
    return "-".join(map(str, case))


each_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.vocabulary}-tp{case.shape.tp}-{case.engine}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(scope="module")
def alone(folder):
    [found] = run_ranks(continued_study.vocabularies_alone, 1, folder / "alone", folder, launched=False)
    return found


@pytest.fixture(scope="module")
def found(folder, alone):
    return run_ranks(continued_study.vocabularies, 4, folder / "ranks", folder, timeout_s=600)


@pytest.fixture(scope="module")
def again(folder, found):
    [losses] = run_ranks(continued_study.vocabularies_again, 1, folder / "again", folder, launched=False)
    return losses


@each_case
def test_losses_norms_and_logits_are_those_of_one_process(alone, found, case):
    expected = alone[case.vocabulary]
    for rank in found:
        for part in ("first", "more"):
            for numbers, those in zip(rank[case][part], expected[part], strict=True):
                assert numbers == pytest.approx(those, rel=1e-5)
        torch.testing.assert_close(rank[case]["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
        assert int(rank[case]["text"].max()) < case.vocabulary


@each_case
def test_checkpoints_hold_the_words_and_nothing_else(folder, alone, found, case):
    start, end = (
        [state_folder.canonical(folder / place / when) for place in (name(case), str(case.vocabulary))]
        for when in ("start", "end")
    )
    assert state_folder.differing(*start) == []
    assert end[0].keys() == end[1].keys()
    for key, tensor in end[1].items():
        torch.testing.assert_close(end[0][key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    assert len(end[0]["weight/mega.embedding_layer.word_embeddings.weight"]) == case.vocabulary


def test_an_index_of_a_version_that_refused_such_vocabularies_is_read(folder, alone, tmp_path):
    source = folder / "97" / "cut"
    shutil.copytree(source, tmp_path / "old")
    index = json.loads((source / "index.json").read_text())
    index["table"] = {key: piece[:3] for key, piece in index["table"].items()}
    (tmp_path / "old" / "index.json").write_text(json.dumps(index))
    assert state_folder.differing(state_folder.canonical(tmp_path / "old"), state_folder.canonical(source)) == []


@each_case
def test_goes_on_from_what_one_process_saved_and_back(folder, alone, found, again, case):
    source = state_folder.canonical(folder / str(case.vocabulary) / "cut")
    assert state_folder.differing(state_folder.canonical(folder / name(case) / "loaded"), source) == []
    losses, norms = alone[case.vocabulary]["more"]
    for rank in found:
        assert rank[case]["resumed"][0] == pytest.approx(losses, rel=1e-5)
        assert rank[case]["resumed"][1] == pytest.approx(norms, rel=1e-5)
    assert again[case] == pytest.approx(losses, rel=1e-5)
