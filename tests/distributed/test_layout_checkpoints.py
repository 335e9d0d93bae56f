"""Checkpoints of layouts that cut rows and channels: exact resume, whole tensors in HF names."""

from pathlib import Path

import layout_study
import pytest
import torch
from ranks import run_ranks
from resume_study import RESUMED, same, study

from mega_scale.checkpoint.state import open_weights
from mega_scale.model import MegaForCausalLM

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory):
    return run_ranks(study, 4, tmp_path_factory.mktemp("ranks"), folder, timeout_s=600)


@pytest.mark.parametrize("engine", ["fsdp-3", "zero-3"])
@pytest.mark.parametrize("layout", RESUMED)
def test_resumes_bit_for_bit(ranks, layout, engine):
    for rank in ranks:
        straight, resumed = rank[layout, engine, "straight"], rank[layout, engine, "resumed"]
        assert resumed["losses"] == straight["losses"] and resumed["norms"] == straight["norms"]
        assert same(resumed["at_cut"], straight["at_cut"]) and same(resumed["end"], straight["end"])
        assert not same(resumed["end"], straight["at_cut"])


@pytest.mark.parametrize("engine", ["fsdp-3", "zero-3"])
@pytest.mark.parametrize("layout", RESUMED)
def test_files_open_as_whole_tensors_in_hugging_face_names(ranks, folder, layout, engine):
    weights = dict(open_weights(folder / f"{layout}-{engine}"))
    with torch.device("meta"):
        wanted = MegaForCausalLM(layout_study.config()).state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in wanted.items()}
    for name, tensor in ranks[0][layout, engine, "straight"]["at_cut"].items():
        assert torch.equal(weights[name], tensor), name


def test_files_without_their_index_are_refused(ranks, folder):
    source = folder / "dp2-tp2-zero-3"
    (source / "index.json").rename(source / "away.json")
    try:
        with pytest.raises(ValueError, match=r"index\.json cannot be read"):
            open_weights(source)
    finally:
        (source / "away.json").rename(source / "index.json")
