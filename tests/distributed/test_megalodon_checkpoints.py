"""A Megalodon's state, handed from layout to layout and from engine to engine: the same to the bit, and it goes on."""

import tarfile
from pathlib import Path
from typing import NamedTuple

import launching
import layout_study
import pytest
import state_folder
import tiny_run
import torch
from layout_study import LAYOUTS, MEGALODON
from ranks import run_ranks
from torch import Tensor

from mega_scale.checkpoint.state import open_weights
from mega_scale.parallel import ParallelConfig, World

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CUT, MORE = 2, 2
# A rank of two has a head; two ranks of four share one, and hold what makes its queries and keys whole.
CHAIN = [
    ("dp2-tp2", "fsdp-3"),
    ("tp4", "zero-3"),
    ("sp2-tp2", "zero-1"),
    ("sp4", "fsdp-3"),
    ("dp2-sp2", "zero-2"),
    ("tp4", "fsdp-1"),
]
OTHER_WEIGHTS = 77  # than those that are loaded
EARLIER = launching.ROOT / "tests" / "golden" / "earlier" / "e8b4690-tp4.tar.xz"


class Found(NamedTuple):
    """What a layout makes of the state: logits, a text that it goes on with, and the losses of the next steps."""

    logits: Tensor
    text: Tensor
    losses: list[float]


def hand_on(folder: Path) -> list[Found]:
    """What every layout makes of the state that the one before it saved."""
    found = []
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        for number, (layout, engine) in enumerate(CHAIN):
            world = layout_study.lay_out(ranks, LAYOUTS[layout])
            made = layout_study.make_engine(world, engine, MEGALODON, 1, values=OTHER_WEIGHTS)
            if number:
                state_folder.load(made, folder / str(number - 1), world)
            else:
                layout_study.train(made, world, range(CUT))
            state_folder.save(made, folder / str(number), world)
            made.module.eval()
            tokens, _, _ = layout_study.global_batch(9)
            with torch.no_grad():
                logits = made.module(input_ids=tokens, use_cache=False).logits.clone()
                given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
                text = made.module.generate(tokens[:, :5], **given)
            found.append(Found(logits, text, layout_study.train(made, world, range(CUT, CUT + MORE))[0]))
            if number == len(CHAIN) - 1:
                state_folder.load(made, folder / "tp4", world)
                state_folder.save(made, folder / "tp4 again", world)
            made.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    chain = tmp_path_factory.mktemp("chain")
    with tarfile.open(EARLIER) as archive:
        archive.extractall(chain, filter="data")
    return chain


@pytest.fixture(scope="module")
def ranks(folder) -> list[list[Found]]:
    return run_ranks(hand_on, 4, folder / "ranks", folder, timeout_s=300)


def test_every_layout_hands_the_same_state_on(folder, ranks):
    first = state_folder.canonical(folder / "0")
    assert sum(name.startswith("exp_avg_sq/") for name in first) > 30 and int(first["steps"]) == CUT
    for number in range(1, len(CHAIN)):
        assert state_folder.differing(state_folder.canonical(folder / str(number)), first) == [], CHAIN[number]


def test_ranks_that_shared_an_averages_channels_hand_them_to_ranks_that_have_all(folder, ranks):
    earlier = state_folder.canonical(folder / "tp4")
    assert state_folder.differing(state_folder.canonical(folder / "tp4 again"), earlier) == []


def test_every_layout_goes_on_as_the_first_does(ranks):
    first = ranks[0][0]
    assert len(first.losses) == MORE and first.text.shape[1] == 5 + 12
    for found in (layout for rank in ranks for layout in rank):
        torch.testing.assert_close(found.logits, first.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.text, first.text)
        assert found.losses == pytest.approx(first.losses, rel=1e-6)


def test_weights_have_their_hugging_face_names(folder, ranks):
    weights = dict(open_weights(folder / "1"))
    wanted = tiny_run.meta_model(layout_study.config(**MEGALODON)).state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {name: t.shape for name, t in wanted.items()}
