"""The facts about a run's layout that its checkpoints depend on."""

from typing import Any

from mega_scale.parallel.config import ParallelConfig

# In the order in which differences are looked for: dp_shard is what the others leave, so it differs when they do.
_OWNERS = {
    "engine": "parallel.engine",
    "zero_stage": "parallel.zero_stage",
    "world_size": "the number of processes",
    "tp": "parallel.tp",
    "sp": "parallel.sp",
    "dp_replicate": "parallel.dp_replicate",
    "dp_shard": "parallel.dp_shard",
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


def check_layout(saved: dict[str, Any], config: ParallelConfig, world_size: int) -> None:
    """Refuse to continue from a checkpoint that this layout cannot read.

    Args:
        saved: what `describe` returned when the checkpoint was written.
        config: settings of this run.
        world_size: number of its ranks.

    Raises:
        ValueError: engine, stage, number of ranks or an axis differs; names the first that does, and the remedy.
    """
    # Checkpoints from before there were axes were written by data parallelism alone.
    saved = {"dp_replicate": 1, "dp_shard": saved.get("world_size"), "sp": 1, "tp": 1, **saved}
    here = describe(config, world_size)
    for key, owner in _OWNERS.items():
        if saved.get(key) != here[key]:
            raise ValueError(
                f"the checkpoint was written with {owner} {saved.get(key)!r}, this run has {here[key]!r}: "
                f"resume with {saved.get(key)!r}, or start from an export with init_from"
            )
