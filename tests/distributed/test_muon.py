"""Muon: its formula, what it steps, and the same steps in every engine and layout, before and after a save."""

from functools import partial
from pathlib import Path
from typing import Any

import layout_study
import pytest
import state_folder
import tiny_run
import torch
from layout_study import LAYOUTS
from ranks import run_ranks
from torch import Tensor, nn

from mega_scale.model import MegaForCausalLM
from mega_scale.parallel import Engine, ParallelConfig, World
from mega_scale.parallel.muon import Muon, orthogonalise
from mega_scale.parallel.shard import Held
from mega_scale.training.config import OptimizerConfig, build_optimizer

CUT, END, LR = 2, 5, 3e-3
MUON = partial(build_optimizer, config=OptimizerConfig(name="muon", eps=1e-6))
# By number of ranks: layout and engine.
RUNS = {
    2: [("dp2", "fsdp-3"), ("dp2", "zero-0"), ("dp2", "zero-2"), ("dp2", "zero-3"), ("tp2", "fsdp-3"),
        ("tp2", "zero-3"), ("sp2", "fsdp-3")],
    4: [("dp2-tp2", "fsdp-3"), ("dp2-tp2", "zero-1"), ("replicate2-sp2", "zero-3")],
}  # fmt: skip
ALL = [run for runs in RUNS.values() for run in runs]
BLOCKS = ("v_proj.weight", "mx_proj.update.weight", "mx_proj.shared.weight", "mx_proj.gate.weight",
          "mx_proj.candidate.weight", "h_proj.weight", "fc1.weight", "fc2.weight")  # fmt: skip


def make(world: World, engine: str) -> Engine:
    return layout_study.make_engine(world, engine, build_optimizer=MUON)


def study(size: int, folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """In every layout, a run; one that goes on from its middle; and one that goes on from the middle of one process."""
    found = {}
    with World.start(ParallelConfig(timeout_s=120)) as ranks:
        for layout, key in RUNS[size]:
            world = ranks if size == 1 else layout_study.lay_out(ranks, LAYOUTS[layout])
            place = folder / f"{layout}-{key}"
            made = make(world, key)
            losses, _ = layout_study.train(made, world, range(CUT))
            state_folder.save(made, place / "cut", world)
            more, _ = layout_study.train(made, world, range(CUT, END))
            state_folder.save(made, place / "end", world)
            alike = knows_what_all_hold(made, world)
            made.close()
            resumed = {}
            for name, source in (("own", place / "cut"), ("alone", folder / "alone" / "cut")):
                made = make(world, key)
                state_folder.load(made, source, world)
                state_folder.save(made, place / f"{name}-again", world)
                resumed[name], _ = layout_study.train(made, world, range(CUT, END))
                state_folder.save(made, place / f"{name}-end", world)
                made.close()
            found[layout, key] = {"losses": losses + more, "resumed": resumed, "alike": alike}
    return found


def knows_what_all_hold(made: Engine, world: World) -> bool:
    """Whether each rank would say of every other what that one says it holds."""
    own = [
        [*local.shard.offsets, *local.shard.sizes, local.start, len(local.tensors["weight"]), local.copies, local.copy]
        for local in made.state().tensors.values()
    ]
    told = [[number for row in own for number in row]]
    said = [
        [number for name in made.state().tensors for number in _numbers(made.held(name, rank))]
        for rank in range(world.size)
    ]
    return world.all_agree(world.all_gather(torch.tensor(told))[:, 0].tolist() == said)


def _numbers(held: Held) -> list[int]:
    return [*held.shard.offsets, *held.shard.sizes, held.start, held.stop - held.start, held.copies, held.copy]


def alone(folder: Path) -> list[float]:
    with World.start(ParallelConfig()) as world:
        made = make(world, "fsdp-3")
        losses, _ = layout_study.train(made, world, range(CUT))
        state_folder.save(made, folder / "alone" / "cut", world)
        more, _ = layout_study.train(made, world, range(CUT, END))
        state_folder.save(made, folder / "alone" / "end", world)
        made.close()
    return losses + more


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def losses(folder) -> list[float]:
    return run_ranks(alone, 1, folder / "rank", folder, launched=False)[0]


@pytest.fixture(scope="module")
def found(folder, losses) -> dict[tuple[str, str], dict[str, Any]]:
    ranks = {size: run_ranks(study, size, folder / f"ranks-{size}", size, folder) for size in RUNS}
    return {run: result for size in RUNS for run, result in ranks[size][0].items()}


def reference(steps: int) -> list[float]:
    """Losses of one process by the formulas, matrix by matrix, with the packed layer as four."""
    config = layout_study.config()
    model = tiny_run.meta_model(config)
    tiny_run.fill(
        model,
        tiny_run.seeded_values(config, tiny_run.SEED),
        lambda old, value: nn.Parameter(value),
        torch.device("cpu"),
    )
    attention = model.base_model.layers[0].mega_layer
    widths = list(attention.segments.values())
    matrices = {name: p for name, p in model.named_parameters() if ".layers." in name and is_linear(model, name)}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    decaying = {id(model.base_model.embedding_layer.word_embeddings.weight)}
    if model.dense is not None:
        decaying.add(id(model.dense.weight))
    groups = [
        {"params": [p for p in others if (id(p) in decaying) == decays], "weight_decay": 0.1 if decays else 0.0}
        for decays in (True, False)
    ]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-6)
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    found = []
    for step in range(steps):
        inputs, labels, count = layout_study.global_batch(step)
        loss = model(input_ids=inputs, shift_labels=labels, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        found.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), 0.4)
        adam.step()
        with torch.no_grad():
            for name, p in matrices.items():
                momenta[name] = 0.95 * momenta[name] + 0.05 * p.grad
                ahead = 0.05 * p.grad + 0.95 * momenta[name]
                parts = ahead.split(widths) if "mx_proj" in name else [ahead]
                moves = [0.2 * max(part.shape) ** 0.5 * orthogonalise(part) for part in parts]
                p.copy_(p * (1 - LR * 0.1) - LR * torch.cat(moves))
        model.zero_grad()
    return found


def is_linear(model: MegaForCausalLM, name: str) -> bool:
    return name.endswith(".weight") and isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Linear)


def test_one_process_steps_by_the_formulas(losses):
    assert losses == pytest.approx(reference(END), rel=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("run", ALL, ids="-".join)
def test_every_layout_trains_as_one_process_does(found, losses, run):
    assert found[run]["losses"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("run", ALL, ids="-".join)
def test_a_rank_knows_what_the_others_hold_without_asking(found, run):
    assert found[run]["alike"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("run", ALL, ids="-".join)
def test_it_resumes_bit_for_bit(found, folder, run):
    place = folder / "-".join(run)
    for saved, again in (("cut", "own-again"), ("end", "own-end")):
        assert state_folder.differing(*(state_folder.canonical(place / name) for name in (saved, again))) == []
    assert found[run]["resumed"]["own"] == found[run]["losses"][CUT:]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("run", ALL, ids="-".join)
def test_every_layout_goes_on_from_what_one_process_saved(found, folder, losses, run):
    source = state_folder.canonical(folder / "alone" / "cut")
    again = state_folder.canonical(folder / "-".join(run) / "alone-again")
    assert state_folder.differing(again, source) == []
    momenta = {name for name in source if name.startswith("momentum/")}
    assert {name.partition("layers.0.")[2].partition(".")[2] for name in momenta if "layers.0" in name} == set(BLOCKS)
    assert not any(name.replace("momentum/", "exp_avg/") in source for name in momenta)
    assert found[run]["resumed"]["alone"] == pytest.approx(losses[CUT:], rel=1e-6)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_matrices_have_singular_values_near_one(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix, dtype)
    assert found.dtype == torch.float32 and found.shape == shape
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    # The same directions: what is left of them is diagonal.
    turned = left.T @ found @ right.T
    assert float((turned - torch.diag(turned.diagonal())).abs().max()) < (1e-4 if dtype == torch.float32 else 0.1)
    near = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.1}
    for scale in (1e-6, 1e-26, 1e26):  # the last two squared are no numbers of fp32
        torch.testing.assert_close(orthogonalise(scale * matrix, dtype), found, **near)
    torch.testing.assert_close(orthogonalise(matrix.T, dtype).T, found, **near)
    assert not orthogonalise(torch.zeros(shape), dtype).any()


def test_it_steps_the_matrices_of_blocks_and_adamw_all_else():
    with torch.device("meta"):
        model = MegaForCausalLM(tiny_run.tiny_config(tie_word_embeddings=False))
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=0.5, weight_decay=0.25))
    assert isinstance(optimizer, Muon)
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon, decaying, others = (
        {names[parameter] for parameter in group["params"]} for group in optimizer.param_groups
    )
    assert {name.partition("layers.1.")[2] for name in by_muon if ".layers.1." in name} == {
        "mega_layer.v_proj.weight", "mega_layer.mx_proj.weight", "mega_layer.h_proj.weight", "nffn.fc1.weight",
        "nffn.fc2.weight",
    }  # fmt: skip
    assert all(".layers." in name for name in by_muon) and len(by_muon) == 3 * 5
    assert {"lm_head.weight", "mega.embedding_layer.word_embeddings.weight"} <= decaying
    assert by_muon | decaying | others == set(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25, 0.0]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.name='muon'.*use adamw"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(name="muon"))


def test_a_state_of_adamw_is_refused_and_changes_nothing(tmp_path):
    with World.start(ParallelConfig(device="cpu")) as world:
        plain = layout_study.make_engine(world, "fsdp-3")
        state_folder.save(plain, tmp_path, world)
        made = make(world, "fsdp-3")
        layout_study.train(made, world, range(1))
        before: dict[str, Tensor] = {name: p.clone() for name, p in made.module.named_parameters()}
        with pytest.raises(ValueError, match=r"has no momentum of .*set optimizer\.name"):
            state_folder.load(made, tmp_path, world)
        assert all(torch.equal(before[name], p) for name, p in made.module.named_parameters())
