"""Vocabularies that the ranks of tp do not divide: trained, saved, and gone on with by other layouts."""

from pathlib import Path
from typing import Any, NamedTuple

import engine_study
import layout_study
import state_folder
import tiny_run
import torch

from mega_scale.parallel import Engine, ParallelConfig, World, parallelize, seeded_values
from mega_scale.parallel.mesh import MeshShape

CUT, MORE = 2, 2
ALONE = MeshShape(1, 1, 1, 1)
TP4, DP2_TP2 = MeshShape(1, 1, 1, 4), MeshShape(1, 2, 1, 2)


class Case(NamedTuple):
    vocabulary: int
    shape: MeshShape
    engine: str


# With 5 and 3 ids, one of four ranks has none.
CASES = [
    *(Case(97, DP2_TP2, engine) for engine in ("fsdp-3", "zero-3", "zero-1", "zero-0")),
    *(Case(259, TP4, engine) for engine in ("fsdp-3", "zero-3")),
    *(Case(5, TP4, engine) for engine in ("fsdp-3", "zero-3")),
    *(Case(3, TP4, engine) for engine in ("fsdp-3", "zero-3")),
]
VOCABULARIES = sorted({case.vocabulary for case in CASES})


def make_engine(world: World, case: Case) -> Engine:
    # Embedding and head are apart where there are many ids.
    config = layout_study.config(vocab_size=case.vocabulary, tie_word_embeddings=case.vocabulary < 200)
    return parallelize(
        tiny_run.meta_model(config),
        seeded_values(config, tiny_run.SEED),
        ParallelConfig(**engine_study.ENGINES[case.engine], **case.shape._asdict()),
        dtype="fp32",
        micro_batch_size=layout_study.ROWS // world.shape.dp,
        accumulation=1,
        max_grad_norm=0.4,
        build_optimizer=tiny_run.build_optimizer,
        world=world,
    )


def run(world: World, case: Case, folder: Path, source: Path | None) -> dict[str, Any]:
    """Save at the start, at the cut and at the end; then go on from the cut of one process, if there is one."""
    engine, steps = make_engine(world, case), range(CUT + MORE)
    state_folder.save(engine, folder / "start", world)
    found = {"first": layout_study.train(engine, world, steps[:CUT], case.vocabulary)}
    state_folder.save(engine, folder / "cut", world)
    found["more"] = layout_study.train(engine, world, steps[CUT:], case.vocabulary)
    state_folder.save(engine, folder / "end", world)
    engine.module.eval()
    inputs, _, _ = layout_study.global_batch(9, case.vocabulary)
    with torch.no_grad():
        found["logits"] = engine.module(input_ids=inputs, use_cache=False).logits
        given = {"max_new_tokens": 12, "do_sample": True, "temperature": 1e3, "eos_token_id": None}
        torch.manual_seed(0)
        found["text"] = engine.module.generate(inputs[:, :5], **given)
    if source is not None:
        state_folder.load(engine, source / "cut", world)
        state_folder.save(engine, folder / "loaded", world)
        found["resumed"] = layout_study.train(engine, world, steps[CUT:], case.vocabulary)
    engine.close()
    return found


def alone(folder: Path) -> dict[int, dict[str, Any]]:
    """One process, by vocabulary."""
    with World.start(ParallelConfig()) as world:
        cases = {size: Case(size, ALONE, "fsdp-3") for size in VOCABULARIES}
        return {size: run(world, case, folder / str(size), None) for size, case in cases.items()}


def cut(folder: Path) -> dict[Case, dict[str, Any]]:
    """Four ranks, by case."""
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        return {
            case: run(ranks.lay_out(case.shape), case, folder / "-".join(map(str, case)), folder / str(case.vocabulary))
            for case in CASES
        }


def alone_again(folder: Path) -> dict[Case, list[float]]:
    """One process goes on from what four ranks saved."""
    found = {}
    with World.start(ParallelConfig()) as world:
        for case in CASES:
            engine = make_engine(world, case._replace(shape=ALONE))
            state_folder.load(engine, folder / "-".join(map(str, case)) / "cut", world)
            found[case], _ = layout_study.train(engine, world, range(CUT, CUT + MORE), case.vocabulary)
            engine.close()
    return found
