"""The processes of a run: their process group, and the collectives that a training loop needs."""

import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mega_scale.parallel.config import ParallelConfig

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LET_GLOO_FINISH_S = 0.1


class Placement(NamedTuple):
    """Where a process stands among those that a launcher started."""

    rank: int
    size: int
    local_rank: int
    launched: bool  # false: no launcher, one process alone


def placement() -> Placement:
    """Read what deepspeed, torchrun or accelerate say about this process; without a launcher, it is alone.

    Returns:
        Rank, number of ranks, rank on this machine, and whether there is a launcher.

    Raises:
        ValueError: only some of a launcher's variables are set.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return Placement(0, 1, 0, False)
    if missing:
        raise ValueError(
            f"environment variables {', '.join(missing)} are missing while others of a launcher are set: "
            "start the script with deepspeed, torchrun, accelerate launch or plain python"
        )
    rank, size, local_rank = (int(os.environ[name]) for name in _VARIABLES[:3])
    return Placement(rank, size, local_rank, True)


@dataclass(frozen=True)
class World:
    """All ranks of a run; every method is collective, so all ranks call it in the same order.

    Use it in a `with` statement: when a rank fails, its connections close, and the ranks that wait for it fail at once
    rather than after the timeout.

    Args:
        rank: number of this process, 0 to size - 1.
        size: number of processes.
        local_rank: number of this process on its machine.
        device: where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def start(cls, config: ParallelConfig) -> "World":
        """Join the process group: NCCL on CUDA, gloo on CPUs.

        Args:
            config: device and timeout.

        Returns:
            This process's view of the run.

        Raises:
            ValueError: the launcher's variables are incomplete, or there are fewer CUDA devices than local ranks.
        """
        rank, size, local_rank, launched = placement()
        device = _device(config.device, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=config.timeout_s),
            # Alone, a process needs no port that another could hold.
            store=None if launched else dist.HashStore(),
            init_method="env://" if launched else None,
            device_id=device if device.type == "cuda" else None,
        )
        return cls(rank, size, local_rank, device)

    def close(self, failed: bool = False) -> None:
        """Leave the process group; needs no other rank, and may be called twice.

        Args:
            failed: whether this rank leaves because of an error. NCCL would wait for collectives that never end, so
                then the end of the process has to close its connections.
        """
        if not dist.is_initialized() or (failed and dist.get_backend() == "nccl"):
            return
        if dist.get_backend() == "gloo":
            # gloo's threads take the interpreter's lock to drop the tensors of their last collective. One that asks for
            # it when the interpreter is already ending aborts the process, so they are given the lock here.
            time.sleep(_LET_GLOO_FINISH_S)
        dist.destroy_process_group()

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all ranks.

        Args:
            value: any shape and dtype, the same on all ranks; left as it is.

        Returns:
            The sum, on this rank's device, in the same shape and dtype.
        """
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def all_agree(self, flag: bool) -> bool:
        """Whether a flag is true on every rank.

        Args:
            flag: this rank's answer.

        Returns:
            The same answer on all ranks.
        """
        return int(self.sum(torch.tensor(int(flag)))) == self.size

    def broadcast(self, value: Any) -> Any:
        """Give a value of rank 0 to all ranks, as JSON: nothing that could run code travels.

        Args:
            value: numbers, strings, lists and dictionaries; read on rank 0 only.

        Returns:
            Rank 0's value, as JSON gives it back (a tuple comes as a list).

        Raises:
            TypeError: JSON cannot express rank 0's value.
        """
        payload = list(json.dumps(value).encode()) if self.rank == 0 else []
        length = torch.tensor(len(payload), device=self.device)
        dist.broadcast(length, src=0)
        data = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            data.copy_(torch.tensor(payload, dtype=torch.uint8))
        dist.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))


def _device(choice: str, local_rank: int) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"parallel.device={choice!r} with local rank {local_rank}, but this machine has "
            f"{torch.cuda.device_count()} CUDA devices: start fewer processes, or choose parallel.device=cpu"
        )
    return torch.device("cuda", local_rank)
