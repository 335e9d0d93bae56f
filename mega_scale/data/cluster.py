"""Preparing on many machines, by datatrove: its tasks make the shards, and a last one declares the folder whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mega_scale.data.config import DataConfig
from mega_scale.data.prepare import Preparation
from mega_scale.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class MakeShards:
    """A step of a datatrove pipeline: a task's share of the shards that are missing.

    Args:
        folder: Where the files go; all machines share it.
        config: The keys under `data:`.
        shard_bytes: Text of a shard, bytes.
    """

    folder: Path
    config: DataConfig
    shard_bytes: int

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Make them; passes `data` on, which is nothing."""
        preparation = open_preparation(self.folder, self.config, self.shard_bytes)
        for number in preparation.missing():
            if number % world_size == rank:
                preparation.make(number)
                preparation.tally().check(self.config.max_bad_share, ended=False)
        return data


@dataclass(frozen=True)
class Finish:
    """A step of a datatrove pipeline: declares the folder whole; see `MakeShards` for the arguments."""

    folder: Path
    config: DataConfig
    shard_bytes: int

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Write the manifest; passes `data` on, which is nothing."""
        open_preparation(self.folder, self.config, self.shard_bytes).finish()
        return data


def open_preparation(folder: Path, config: DataConfig, shard_bytes: int) -> Preparation:
    """Open a preparation in a process that has only its description."""
    return Preparation(folder, config, load_tokenizer(config.tokenizer), shard_bytes=shard_bytes)


def run(
    folder: Path, config: DataConfig, shard_bytes: int, *, tasks: int, processes: int | None, slurm: dict[str, str]
) -> None:
    """Prepare a folder by datatrove's executors; run again, they go on with what is missing.

    Args:
        folder: Where the files go; its logs go beside it.
        config: The keys under `data:`, validated.
        shard_bytes: Text of a shard, bytes.
        tasks: Number of tasks, each with its share of the shards.
        processes: At once on this machine; None submits the tasks to Slurm and returns.
        slurm: Arguments of datatrove's SlurmPipelineExecutor, `partition` and `time` among them.

    Raises:
        ValueError: datatrove is not installed, or Slurm's partition or time is not said.
    """
    try:
        from datatrove.executor.local import LocalPipelineExecutor  # noqa: PLC0415  an extra
        from datatrove.executor.slurm import SlurmPipelineExecutor  # noqa: PLC0415
    except ImportError:
        raise ValueError("datatrove is not installed: pip install 'mega_scale[cluster]'") from None
    folder = folder.absolute()
    open_preparation(folder, config, shard_bytes)  # the tasks find the plan, and none of them has to write it
    steps = MakeShards(folder, config, shard_bytes), Finish(folder, config, shard_bytes)
    # What is done is known by its files; a task that was marked as done would leave out a shard that was lost.
    common: dict[str, Any] = {"skip_completed": False}
    logs = folder.with_name(f"{folder.name}-logs")
    if processes is not None:
        LocalPipelineExecutor([steps[0]], tasks, processes, str(logs / "shards"), **common).run()
        LocalPipelineExecutor([steps[1]], 1, 1, str(logs / "manifest"), **common).run()
        return
    if missing := {"partition", "time"} - set(slurm):
        raise ValueError(f"--slurm needs {' and '.join(sorted(missing))}, as in --slurm partition=cpu time=12:00:00")
    common |= {key: int(value) if value.isdecimal() else value for key, value in slurm.items()}
    shards = SlurmPipelineExecutor(
        [steps[0]], tasks=tasks, job_name=f"{folder.name}-shards", logging_dir=str(logs / "shards"), **common
    )
    SlurmPipelineExecutor(
        [steps[1]],
        tasks=1,
        job_name=f"{folder.name}-manifest",
        logging_dir=str(logs / "manifest"),
        depends=shards,
        **common,
    ).run()
