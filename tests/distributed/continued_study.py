"""Runs that save, go on, and go on from what another layout saved: native keys, odd vocabularies, and all layouts."""

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import layout_study
import state_folder
import tiny_run
import torch
from torch import Tensor

from mega_scale.checkpoint.state import StateReader, open_weights
from mega_scale.parallel import Engine, ParallelConfig, World
from mega_scale.parallel.mesh import MeshShape

Numbers = tuple[list[float], list[float]]
Train = Callable[[Engine, World, range], Numbers]


def run(
    engine: Engine, world: World, train: Train, folder: Path, steps: tuple[int, int], source: Path | None
) -> dict[str, Any]:
    """Save "start", "cut" and "end" in a folder; then go on from another run's "cut", saved again as "loaded"."""
    cut, end = steps
    state_folder.save(engine, folder / "start", world)
    found = {"first": train(engine, world, range(cut))}
    state_folder.save(engine, folder / "cut", world)
    found["more"] = train(engine, world, range(cut, end))
    state_folder.save(engine, folder / "end", world)
    if source is not None:
        state_folder.load(engine, source / "cut", world)
        state_folder.save(engine, folder / "loaded", world)
        found["resumed"] = train(engine, world, range(cut, end))
    return found


# Native keys of ZeRO: two ranks train with every one that is passed on, some at a time, and one process with none.

_REDUCED = {"reduce_bucket_size": 500, "allgather_bucket_size": 1000, "overlap_comm": True}
_WHOLE = {"contiguous_gradients": False, "reduce_scatter": False}
_BROADCAST = {"use_multi_rank_bucket_allreduce": False, "allgather_partitions": False}
# By name: ZeRO stage and keys of zero_optimization.
NATIVE: dict[str, tuple[int, dict[str, Any]]] = {
    "1 round robin": (1, {"round_robin_gradients": True, **_BROADCAST}),
    "1 aligned": (1, {"parameter_alignment": True, **_REDUCED}),
    "1 both": (1, {"round_robin_gradients": True, "parameter_alignment": True, **_WHOLE}),
    "2 round robin": (2, {"round_robin_gradients": True, **_REDUCED, "ignore_unused_parameters": False}),
    "2 both, on the host": (
        2,
        {
            "round_robin_gradients": True,
            "parameter_alignment": True,
            "cpu_offload": True,
            "cpu_offload_use_pin_memory": False,
        },
    ),
    "3 in groups": (
        3,
        {
            "sub_group_size": 1000,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 1000,
            "stage3_max_reuse_distance": 0,
            "reduce_bucket_size": 500,
            "overlap_comm": False,
            "memory_efficient_linear": False,
            **_WHOLE,
        },
    ),
    "3 persistent": (
        3,
        {
            "param_persistence_threshold": 100,  # without stage3_, as DeepSpeed also reads it
            "stage3_model_persistence_threshold": 1000,
            "stage3_use_all_reduce_for_fetch_params": True,
            "override_module_apply": False,
            "log_trace_cache_warnings": True,
            "enable_sanity_checks": True,
        },
    ),
    "3 one after the other, on the host": (
        3,
        {
            "stage3_allgather_sequential": True,
            "cpu_offload_param": True,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        },
    ),
}
STEPS = (2, 4)


def native_alone(folder: Path) -> dict[str, Any]:
    with World.start(ParallelConfig()) as world:
        engine = tiny_run.make_engine(world, {"engine": "fsdp", "zero_stage": 3})
        found = run(engine, world, tiny_run.train, folder, STEPS, None)
        engine.close()
        return found


def native_keys(source: Path) -> dict[str, dict[str, Any]]:
    found = {}
    with World.start(ParallelConfig(timeout_s=120)) as world:
        for name, (stage, keys) in NATIVE.items():
            settings = {"engine": "deepspeed", "zero_stage": stage, "ds_config": {"zero_optimization": keys}}
            engine = tiny_run.make_engine(world, settings)
            found[name] = run(engine, world, tiny_run.train, source / name, STEPS, source)
            engine.close()
    return found


def shuffled() -> dict[int, str]:
    """What is said where DeepSpeed keeps numbers elsewhere than it is asked for them, by stage."""
    initialize, said = deepspeed.initialize, {}

    def shuffling(*args: Any, **kwargs: Any) -> Any:
        made = initialize(*args, **kwargs)
        optimizer = made[0].optimizer
        stage = kwargs["config"]["zero_optimization"]["stage"]
        masters = optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat
        masters[0].data = masters[0].data.roll(1)
        return made

    deepspeed.initialize = shuffling
    with World.start(ParallelConfig(timeout_s=120)) as world:
        for stage in (1, 2, 3):
            try:
                tiny_run.make_engine(world, {"engine": "deepspeed", "zero_stage": stage})
            except RuntimeError as error:
                said[stage] = str(error)
    return said


# Vocabularies that the ranks of tp do not divide.

ALONE = MeshShape(1, 1, 1, 1)
TP4, DP2_TP2 = MeshShape(1, 1, 1, 4), MeshShape(1, 2, 1, 2)


class Case(NamedTuple):
    vocabulary: int
    shape: MeshShape
    engine: str


# Every engine and every vocabulary; with 5 and 3 ids, one of four ranks has none.
CASES = [
    Case(97, DP2_TP2, "zero-0"),
    Case(97, DP2_TP2, "zero-1"),
    Case(97, DP2_TP2, "zero-3"),
    Case(259, TP4, "fsdp-3"),
    Case(5, TP4, "zero-3"),
    Case(3, TP4, "fsdp-3"),
]
VOCABULARIES = sorted({case.vocabulary for case in CASES})


def _run_case(world: World, case: Case, folder: Path, source: Path | None) -> dict[str, Any]:
    engine = _vocabulary_engine(world, case)

    def train(engine: Engine, world: World, steps: range) -> Numbers:
        return layout_study.train(engine, world, steps, case.vocabulary)

    found = run(engine, world, train, folder, STEPS, source)
    engine.module.eval()
    inputs, _, _ = layout_study.global_batch(9, case.vocabulary)
    with torch.no_grad():
        found["logits"] = engine.module(input_ids=inputs, use_cache=False).logits
        given = {"max_new_tokens": 12, "do_sample": True, "temperature": 1e3, "eos_token_id": None}
        torch.manual_seed(0)
        found["text"] = engine.module.generate(inputs[:, :5], **given)
    engine.close()
    return found


def _vocabulary_engine(world: World, case: Case) -> Engine:
    # Embedding and head are apart where there are many ids.
    changes = {"vocab_size": case.vocabulary, "tie_word_embeddings": case.vocabulary < 200}
    return layout_study.make_engine(world, case.engine, changes)


def vocabularies_alone(folder: Path) -> dict[int, dict[str, Any]]:
    """One process, by vocabulary."""
    with World.start(ParallelConfig()) as world:
        cases = {size: Case(size, ALONE, "fsdp-3") for size in VOCABULARIES}
        return {size: _run_case(world, case, folder / str(size), None) for size, case in cases.items()}


def vocabularies(folder: Path) -> dict[Case, dict[str, Any]]:
    """Four ranks, by case."""
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        return {
            case: _run_case(
                layout_study.lay_out(ranks, case.shape),
                case,
                folder / "-".join(map(str, case)),
                folder / str(case.vocabulary),
            )
            for case in CASES
        }


def vocabularies_again(folder: Path) -> dict[Case, list[float]]:
    """One process goes on from what four ranks saved."""
    found = {}
    with World.start(ParallelConfig()) as world:
        for case in CASES:
            engine = _vocabulary_engine(world, case._replace(shape=ALONE))
            state_folder.load(engine, folder / "-".join(map(str, case)) / "cut", world)
            found[case], _ = layout_study.train(engine, world, range(*STEPS), case.vocabulary)
            engine.close()
    return found


# One state, saved and loaded by every layout: on 1, 2 and 4 ranks, by both engines, and read by each of the others.


class Layout(NamedTuple):
    engine: str
    shape: MeshShape


_DATA_PARALLEL = {
    f"{engine}-x{ranks}": Layout(engine, MeshShape(1, ranks, 1, 1))
    for ranks in (1, 2, 4)
    for engine in ("fsdp-3", "zero-1", "zero-2", "zero-3")
}
_SHARDED = {
    f"{engine}-{name}": Layout(engine, shape)
    for name, shape in {
        "sp2": MeshShape(1, 1, 2, 1),
        "tp2": MeshShape(1, 1, 1, 2),
        "sp2xtp2": MeshShape(1, 1, 2, 2),
    }.items()
    for engine in ("fsdp-3", "zero-1", "zero-3")
}
LAYOUTS = _DATA_PARALLEL | _SHARDED
CUT, MORE = 20, 4
_OTHER_WEIGHTS = 77  # than those that are loaded


def uninterrupted(folder: Path) -> list[float]:
    """One process trains to the cut, saves, and goes on; returns the losses after the cut."""
    with World.start(ParallelConfig()) as world:
        engine = layout_study.make_engine(world, "fsdp-3", values=_OTHER_WEIGHTS)
        layout_study.train(engine, world, range(CUT))
        state_folder.save(engine, folder, world)
        losses, _ = layout_study.train(engine, world, range(CUT, CUT + MORE))
        engine.close()
        return losses


def passed_on(source: Path, folder: Path, size: int) -> dict[str, list[float]]:
    """Every layout of so many ranks loads the state, saves it, and goes on; returns its losses."""
    found = {}
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        for name, layout in LAYOUTS.items():
            if layout.shape.size == size:
                world = layout_study.lay_out(ranks, layout.shape)
                engine = layout_study.make_engine(world, layout.engine, values=_OTHER_WEIGHTS)
                state_folder.load(engine, source, world)
                state_folder.save(engine, folder / name, world)
                found[name], _ = layout_study.train(engine, world, range(CUT, CUT + MORE))
                engine.close()
    return found


def matrix(source: Path, folder: Path, size: int) -> dict[tuple[str, str], list[str]]:
    """Every layout of so many ranks loads what every other one saved; returns what is not bit-equal to the source.

    Of those that saved the same files, byte for byte, it loads the first one's for all of them.
    """
    found, first = {}, {}
    for name in LAYOUTS:
        first[name] = next(other for other in LAYOUTS if _same_files(folder / other, folder / name))
    with World.start(ParallelConfig(timeout_s=300)) as ranks:
        for name, layout in LAYOUTS.items():
            if layout.shape.size == size:
                world = layout_study.lay_out(ranks, layout.shape)
                engine = layout_study.make_engine(world, layout.engine, values=_OTHER_WEIGHTS)
                expected, weights = _expected(engine, source), dict(open_weights(source))
                for other in dict.fromkeys(first.values()):
                    _spoil(engine)
                    state_folder.load(engine, folder / other, world)
                    found[other, name] = _different(engine, expected, weights, world)
                found |= {(other, name): found[same, name] for other, same in first.items()}
                engine.close()
    return found


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return (
        names == sorted(path.name for path in other.iterdir())
        and filecmp.cmpfiles(one, other, names, False)[0] == names
    )


def _spoil(engine: Engine) -> None:
    state = engine.state()
    with torch.no_grad():
        for local in state.tensors.values():
            for tensor in local.tensors.values():
                tensor.fill_(float("nan"))
        for step in state.steps:
            step.fill_(-1)


def _expected(engine: Engine, source: Path) -> dict[str, Tensor]:
    """Parameters and moments of the source, as far as this rank holds them, and the steps that were done."""
    reader = StateReader(source)
    return {"steps": torch.tensor(float(reader.optimizer_steps))} | {
        f"{kind}/{name}": reader.read(name, kind, local.shard, local.start, local.start + len(tensor))
        for name, local in engine.state().tensors.items()
        for kind, tensor in local.tensors.items()
    }


def _different(engine: Engine, expected: dict[str, Tensor], weights: dict[str, Tensor], world: World) -> list[str]:
    """Parameters and moments of which this rank does not hold what is expected, and weights that are not whole."""
    state = engine.state()
    holds = {
        f"{kind}/{name}": tensor for name, local in state.tensors.items() for kind, tensor in local.tensors.items()
    }
    found = [name for name, tensor in holds.items() if not torch.equal(tensor.cpu(), expected[name])]
    found += ["steps"] * any(float(step) != expected["steps"] for step in state.steps)
    computed_with = layout_study.whole_weights(engine, world)
    return found + [f"model {name}" for name, tensor in computed_with.items() if not torch.equal(tensor, weights[name])]
