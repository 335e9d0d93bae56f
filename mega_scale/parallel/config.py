"""Settings of how a run is spread over processes."""

from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

import torch

from mega_scale.parallel.activation_checkpoint import KEEPS, Recomputation
from mega_scale.parallel.deepspeed_config import check_mesh, native_config
from mega_scale.parallel.mesh import MeshShape

ENGINES = ("fsdp", "deepspeed")
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class ParallelConfig:
    """Which engine shards the model, how far, and on what device."""

    engine: Literal["fsdp", "deepspeed"] = "deepspeed"
    """What shards and steps the model: fsdp (PyTorch fully_shard) or deepspeed (ZeRO) (no unit)."""

    zero_stage: int = 3
    """Split over ranks: 1 optimizer state, 2 also gradients, 3 also weights; 0, deepspeed only, nothing (stage)."""

    dp_replicate: int = 1
    """Copies of the sharded model; gradients are summed between them (ranks)."""

    dp_shard: int = -1
    """Ranks that read different rows, parameters sharded over them; -1 takes what the other axes leave (ranks)."""

    sp: int = 1
    """Sequence parallelism: ranks that share one sequence in whole chunks and pass only the EMA's state (ranks)."""

    tp: int = 1
    """Tensor parallelism: ranks of one host that share the channels of every layer (ranks)."""

    self_test: bool = False
    """Whether, before training, gradients of a tiny model in this layout are compared with one process's (no unit)."""

    activation_checkpoint: int = 0
    """Recompute the activations of every n-th block in the backward pass; 1 is every block, 0 none (blocks)."""

    activation_checkpoint_keeps: Literal["nothing", "products"] = "nothing"
    """What recomputed blocks keep: nothing, or results of matrix products, so that only what is cheap is recomputed."""

    activation_checkpoint_segment: int = 0
    """Compute recomputed blocks so many tokens at a time, in both passes: whole chunks; 0 for whole rows (tokens)."""

    ds_config: dict[str, Any] = field(default_factory=dict)
    """Native DeepSpeed keys, merged over ours; those that another setting owns, that change what is computed, or that
    are misspelt are refused (DeepSpeed's units)."""

    timeout_s: int = 1800
    """Longest wait of one rank for the others before the run fails (seconds)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; auto takes CUDA where there is one (no unit)."""

    @property
    def recomputation(self) -> Recomputation:
        """The settings of activation checkpointing."""
        return Recomputation(
            self.activation_checkpoint, self.activation_checkpoint_keeps, self.activation_checkpoint_segment
        )

    def mesh(self, world_size: int) -> MeshShape:
        """Lay the ranks of a run out on the axes.

        Args:
            world_size: ranks of the run.

        Returns:
            The number of ranks along each axis.

        Raises:
            ValueError: the axes do not hold all ranks; names keys, values and what would work.
        """
        return MeshShape.resolve(
            world_size, dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, sp=self.sp, tp=self.tp
        )

    def validate(
        self,
        *,
        dtype: str,
        micro_batch_size: int,
        accumulation: int,
        max_grad_norm: float,
        world_size: int,
        local_size: int | None = None,
    ) -> None:
        """Refuse what cannot run, before any process group starts.

        Args:
            dtype: fp32 or bf16, the number format of forward and backward.
            micro_batch_size: sequences in one forward pass of one rank.
            accumulation: forward passes in one optimizer step.
            max_grad_norm: norm to which gradients are clipped, 0 for not at all.
            world_size: ranks of the run.
            local_size: ranks of this host; None where all are on one.

        Raises:
            ValueError: a field has a value that cannot run; names the field, the value and the remedy.
        """
        if self.engine not in ENGINES:
            raise ValueError(f"parallel.engine={self.engine!r} is unknown: choose one of {', '.join(ENGINES)}")
        if self.zero_stage not in range(4):
            raise ValueError(f"parallel.zero_stage={self.zero_stage} is unknown: choose 0, 1, 2 or 3")
        if self.engine == "fsdp" and self.zero_stage == 0:
            raise ValueError(
                "parallel.zero_stage=0 splits nothing, which parallel.engine=fsdp cannot do: "
                "choose a stage of 1 to 3, or parallel.engine=deepspeed"
            )
        if self.activation_checkpoint < 0:
            raise ValueError(
                f"parallel.activation_checkpoint={self.activation_checkpoint} is negative: "
                "choose 0 for no block, 1 for every block, n for every n-th"
            )
        if self.activation_checkpoint_keeps not in KEEPS:
            raise ValueError(
                f"parallel.activation_checkpoint_keeps={self.activation_checkpoint_keeps!r} is unknown: choose one of "
                f"{', '.join(KEEPS)}"
            )
        if self.activation_checkpoint_keeps == "products" and self.engine == "deepspeed" and self.zero_stage == 3:
            raise ValueError(
                "parallel.activation_checkpoint_keeps='products' with parallel.engine=deepspeed and zero_stage=3: its "
                "linear layers change the results of products after they were kept: use parallel.engine=fsdp, a "
                "zero_stage below 3, or parallel.activation_checkpoint_keeps=nothing"
            )
        if self.timeout_s < 1:
            raise ValueError(f"parallel.timeout_s={self.timeout_s} leaves no time: choose at least 1 second")
        if self.device not in DEVICES:
            raise ValueError(f"parallel.device={self.device!r} is unknown: choose one of {', '.join(DEVICES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("parallel.device='cuda', but PyTorch sees no CUDA device: choose cpu or auto")
        if self.engine == "fsdp" and self.ds_config:
            raise ValueError(
                f"parallel.ds_config={self.ds_config} has no effect with parallel.engine=fsdp: "
                "remove it, or choose parallel.engine=deepspeed"
            )
        mesh = self.mesh(world_size)
        self._check_hosts(local_size or world_size)
        if self.engine == "deepspeed":
            native = native_config(
                self.ds_config,
                zero_stage=self.zero_stage,
                dtype=dtype,
                micro_batch_size=micro_batch_size,
                accumulation=accumulation,
                max_grad_norm=max_grad_norm,
                world_size=mesh.fsdp,
            )
            check_mesh(native, mesh)

    def _check_hosts(self, local_size: int) -> None:
        """Refuse tensor parallelism between hosts: its collectives run several times a layer."""
        if local_size % self.tp == 0:
            return
        also = "" if self.dp_shard == -1 else " with parallel.dp_shard=-1"
        raise ValueError(
            f"parallel.tp={self.tp} does not divide the {local_size} ranks of this host, and ranks that share channels "
            f"must share a host: use parallel.tp={gcd(local_size, self.tp)}{also}"
        )
