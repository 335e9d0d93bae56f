"""The facts about a run's layout that its checkpoints depend on."""

from typing import Any

from mega_scale.parallel.config import ParallelConfig

_OWNERS = {
    "engine": "parallel.engine",
    "zero_stage": "parallel.zero_stage",
    "world_size": "the number of processes",
}


def describe(config: ParallelConfig, world_size: int) -> dict[str, Any]:
    """Say how a run is laid out, as plain JSON to keep beside a checkpoint.

    Args:
        config: settings of the run.
        world_size: number of its ranks.

    Returns:
        Engine, ZeRO stage and number of ranks.
    """
    return {"engine": config.engine, "zero_stage": config.zero_stage, "world_size": world_size}


def check_layout(saved: dict[str, Any], config: ParallelConfig, world_size: int) -> None:
    """Refuse to continue from a checkpoint that this layout cannot read.

    Args:
        saved: what `describe` returned when the checkpoint was written.
        config: settings of this run.
        world_size: number of its ranks.

    Raises:
        ValueError: engine, stage or number of ranks differ; names the first that does, and the remedy.
    """
    for key, value in describe(config, world_size).items():
        if saved.get(key) != value:
            raise ValueError(
                f"the checkpoint was written with {_OWNERS[key]} {saved.get(key)!r}, this run has {value!r}: "
                f"resume with {saved.get(key)!r}, or start from an export with init_from"
            )
