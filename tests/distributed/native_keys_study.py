"""Two ranks train with every native key of ZeRO that is passed on, some at a time, and one process with none."""

from pathlib import Path
from typing import Any

import deepspeed
import state_folder
import tiny_run

from mega_scale.parallel import ParallelConfig, World

_REDUCED = {"reduce_bucket_size": 500, "allgather_bucket_size": 1000, "overlap_comm": True}
_WHOLE = {"contiguous_gradients": False, "reduce_scatter": False}
_BROADCAST = {"use_multi_rank_bucket_allreduce": False, "allgather_partitions": False}
# By name: ZeRO stage and keys of zero_optimization.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
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
CUT, END = 2, 4
_Numbers = tuple[list[float], list[float]]


def alone(folder: Path) -> _Numbers:
    with World.start(ParallelConfig()) as world:
        engine = tiny_run.make_engine(world, {"engine": "fsdp", "zero_stage": 3})
        state_folder.save(engine, folder / "start", world)
        first = tiny_run.train(engine, world, range(CUT))
        state_folder.save(engine, folder / "cut", world)
        second = tiny_run.train(engine, world, range(CUT, END))
        state_folder.save(engine, folder / "end", world)
        engine.close()
    return first[0] + second[0], first[1] + second[1]


def study(folder: Path) -> dict[str, tuple[_Numbers, _Numbers]]:
    """What each run trains from its start, and from the cut of one process; then its states lie under its name."""
    found = {}
    with World.start(ParallelConfig(timeout_s=120)) as world:
        for name, (stage, keys) in RUNS.items():
            settings = {"engine": "deepspeed", "zero_stage": stage, "ds_config": {"zero_optimization": keys}}
            engine = tiny_run.make_engine(world, settings)
            state_folder.save(engine, folder / name / "start", world)
            straight = tiny_run.train(engine, world, range(END))
            state_folder.save(engine, folder / name / "end", world)
            state_folder.load(engine, folder / "cut", world)
            state_folder.save(engine, folder / name / "cut", world)
            found[name] = straight, tiny_run.train(engine, world, range(CUT, END))
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
