"""Settings of how a run is spread over processes."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mega_scale.parallel.deepspeed_config import native_config

ENGINES = ("fsdp", "deepspeed")
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class ParallelConfig:
    """Which engine shards the model, how far, and on what device."""

    engine: Literal["fsdp", "deepspeed"] = "deepspeed"
    """What shards and steps the model: fsdp (PyTorch fully_shard) or deepspeed (ZeRO) (no unit)."""

    zero_stage: int = 3
    """Split over ranks: 1 optimizer state, 2 also gradients, 3 also weights; 0, deepspeed only, nothing (stage)."""

    activation_checkpoint: int = 0
    """Recompute the activations of every n-th block in the backward pass; 1 is every block, 0 none (blocks)."""

    ds_config: dict[str, Any] = field(default_factory=dict)
    """Native DeepSpeed keys, merged over ours; keys that other settings own are refused (DeepSpeed's units)."""

    timeout_s: int = 1800
    """Longest wait of one rank for the others before the run fails (seconds)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; auto takes CUDA where there is one (no unit)."""

    def validate(
        self, *, dtype: str, micro_batch_size: int, accumulation: int, max_grad_norm: float, world_size: int
    ) -> None:
        """Refuse what cannot run, before any process group starts.

        Args:
            dtype: fp32 or bf16, the number format of forward and backward.
            micro_batch_size: sequences in one forward pass of one rank.
            accumulation: forward passes in one optimizer step.
            max_grad_norm: norm to which gradients are clipped, 0 for not at all.
            world_size: ranks of the run.

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
        if self.engine == "deepspeed":
            native_config(
                self.ds_config,
                zero_stage=self.zero_stage,
                dtype=dtype,
                micro_batch_size=micro_batch_size,
                accumulation=accumulation,
                max_grad_norm=max_grad_norm,
                world_size=world_size,
            )
