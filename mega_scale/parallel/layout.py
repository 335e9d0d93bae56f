"""The facts about a run's layout, kept beside its checkpoints."""

from typing import Any

from mega_scale.parallel.config import ParallelConfig

_OWNERS = {
    "engine": "parallel.engine",
    "zero_stage": "parallel.zero_stage",
    "world_size": "processes",
    "dp_replicate": "parallel.dp_replicate",
    "dp_shard": "parallel.dp_shard",
    "sp": "parallel.sp",
    "tp": "parallel.tp",
}


def describe(config: ParallelConfig, world_size: int) -> dict[str, Any]:
    """Say how a run is laid out, as plain JSON to keep beside a checkpoint.

    Args:
        config: settings of the run.
        world_size: number of its ranks.

    Returns:
        Engine, ZeRO stage, number of ranks, and how many of them stand along each axis of the mesh.
    """
    axes = config.mesh(world_size)._asdict()
    return {"engine": config.engine, "zero_stage": config.zero_stage, "world_size": world_size, **axes}


def difference(saved: dict[str, Any], here: dict[str, Any]) -> str:
    """Say what of a checkpoint's layout this run does not have; empty where they are the same.

    Args:
        saved: what `describe` returned when the checkpoint was written.
        here: what it returns now.
    """
    changed = [
        f"{owner} {saved.get(key)} -> {here[key]}" for key, owner in _OWNERS.items() if saved.get(key) != here[key]
    ]
    return ", ".join(changed)
