"""Settings of how a run is laid out on processes, and what an engine has to know of its run."""

from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal, NamedTuple

from mega_scale.parallel.deepspeed_config import check_mesh, native_config
from mega_scale.parallel.mesh import MeshShape

ENGINES = ("fsdp", "deepspeed")
DEVICES = ("auto", "cpu", "cuda")
POLICIES = ("full", "save_matmuls")


class ActivationCheckpointing(NamedTuple):
    """Which blocks are recomputed in the backward pass, and how."""

    every: int = 0  # 0 for no block, 1 for every block, n for the n-th, the 2n-th, ... block
    policy: str = "full"  # recomputes everything; save_matmuls saves matmul outputs and recomputes what is cheap
    segment: int = 0  # tokens that are computed and recomputed at a time, whole chunks; 0 for whole rows


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
    """Ranks that read different rows, parameters sharded over them; -1: what other dimensions leave (ranks)."""

    sp: int = 1
    """Sequence parallelism: ranks that share one sequence in whole chunks and pass only the EMA's state (ranks)."""

    tp: int = 1
    """Tensor parallelism: ranks of one host that share the channels of every layer (ranks)."""

    self_test: bool = False
    """Whether, before training, gradients of a tiny model in this layout are compared with one process's (no unit)."""

    activation_checkpoint: int = 0
    """Recompute the activations of every n-th block in the backward pass; 1 is every block, 0 none (blocks)."""

    activation_checkpoint_policy: Literal["full", "save_matmuls"] = "full"
    """Selective activation checkpointing: full recomputes everything, save_matmuls saves matmul outputs (no unit)."""

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
    def checkpointing(self) -> ActivationCheckpointing:
        """The settings of activation checkpointing."""
        return ActivationCheckpointing(
            self.activation_checkpoint, self.activation_checkpoint_policy, self.activation_checkpoint_segment
        )

    def mesh(self, world_size: int) -> MeshShape:
        """The mesh of a run of `world_size` ranks; raises as `MeshShape.resolve` does."""
        return MeshShape.resolve(
            world_size, dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, sp=self.sp, tp=self.tp
        )

    def layout(self, world_size: int) -> dict[str, Any]:
        """Engine, ZeRO stage, ranks and mesh of a run of `world_size` ranks, as plain JSON to keep in a checkpoint."""
        dimensions = self.mesh(world_size)._asdict()
        return {"engine": self.engine, "zero_stage": self.zero_stage, "world_size": world_size, **dimensions}

    def validate(self, world_size: int, local_size: int | None = None) -> None:
        """Refuse what cannot run on so many ranks, `local_size` of them on this host (None: all).

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
        self._check_checkpointing()
        if self.timeout_s < 1:
            raise ValueError(f"parallel.timeout_s={self.timeout_s} leaves no time: choose at least 1 second")
        self._check_device()
        if self.engine == "fsdp" and self.ds_config:
            raise ValueError(
                f"parallel.ds_config={self.ds_config} has no effect with parallel.engine=fsdp: "
                "remove it, or choose parallel.engine=deepspeed"
            )
        self.mesh(world_size)
        self._check_hosts(local_size or world_size)

    def _check_checkpointing(self) -> None:
        name, policy = "parallel.activation_checkpoint_policy", self.activation_checkpoint_policy
        if self.activation_checkpoint < 0:
            raise ValueError(
                f"parallel.activation_checkpoint={self.activation_checkpoint} is negative: "
                "choose 0 for no block, 1 for every block, n for every n-th"
            )
        if policy not in POLICIES:
            raise ValueError(f"{name}={policy!r} is unknown: choose one of {', '.join(POLICIES)}")
        if policy == "save_matmuls" and self.engine == "deepspeed" and self.zero_stage == 3:
            raise ValueError(
                f"{name}='save_matmuls' with parallel.engine=deepspeed and zero_stage=3: its linear layers change "
                "matmul outputs after they were saved: use parallel.engine=fsdp, a zero_stage below 3, or "
                f"{name}=full"
            )

    def _check_device(self) -> None:
        import torch  # noqa: PLC0415  so that --help and refusals of other keys need not wait for it

        if self.device not in DEVICES:
            raise ValueError(f"parallel.device={self.device!r} is unknown: choose one of {', '.join(DEVICES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("parallel.device='cuda', but PyTorch sees no CUDA device: choose cpu or auto")

    def _check_hosts(self, local_size: int) -> None:
        """Refuse tensor parallelism between hosts: its collectives run several times a layer."""
        if local_size % self.tp == 0:
            return
        also = "" if self.dp_shard == -1 else " with parallel.dp_shard=-1"
        raise ValueError(
            f"parallel.tp={self.tp} does not divide the {local_size} ranks of this host, and ranks that share channels "
            f"must share a host: use parallel.tp={gcd(local_size, self.tp)}{also}"
        )


@dataclass(frozen=True)
class EngineConfig:
    """What an engine has to know of its run."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: str = "fp32"  # or bf16, the number format of forward and backward
    micro_batch_size: int = 1  # sequences in one forward pass of one rank
    accumulation: int = 1  # forward passes in one optimizer step
    max_grad_norm: float = 1.0  # norm to which gradients are clipped, 0 for not at all
    seed: int = 0  # of dropout
    compile: bool = False  # whether elementwise arithmetic between matrix products is compiled

    def validate(self, world_size: int, local_size: int | None = None) -> None:
        """Refuse what cannot run, before any process group starts; see `ParallelConfig.validate`."""
        self.parallel.validate(world_size, local_size)
        if self.parallel.engine == "deepspeed":
            mesh = self.parallel.mesh(world_size)
            check_mesh(self.native_deepspeed(mesh.fsdp), mesh)

    def native_deepspeed(self, ranks: int) -> dict[str, Any]:
        """DeepSpeed's own configuration, for `ranks` over which parameters are partitioned; see `native_config`."""
        return native_config(
            self.parallel.ds_config,
            zero_stage=self.parallel.zero_stage,
            dtype=self.dtype,
            micro_batch_size=self.micro_batch_size,
            accumulation=self.accumulation,
            max_grad_norm=self.max_grad_norm,
            world_size=ranks,
        )


_OWNERS = {"engine": "parallel.engine", "zero_stage": "parallel.zero_stage", "world_size": "processes"}


def layout_changes(saved: dict[str, Any], here: dict[str, Any]) -> str:
    """Say in which settings the layout of this run differs from that of a checkpoint; empty where they are the same."""
    changed = [
        f"{_OWNERS.get(key, f'parallel.{key}')} {saved.get(key)} -> {value}"
        for key, value in here.items()
        if saved.get(key) != value
    ]
    return ", ".join(changed)
