"""The DeepSpeed engine: ZeRO stages 0 to 3 around the same model and the same AdamW."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mega_scale.model import MegaPreTrainedModel
from mega_scale.parallel.deepspeed_import import import_deepspeed
from mega_scale.parallel.engine import BuildOptimizer
from mega_scale.parallel.materialize import Values, fill
from mega_scale.parallel.weights import DEEPSPEED_TAG
from mega_scale.parallel.world import World

_linear = nn.functional.linear


class DeepSpeedEngine:
    """A model under DeepSpeed ZeRO: 0 replicates all, 1 splits optimizer state, 2 gradients too, 3 weights too.

    DeepSpeed averages gradients over ranks, so the loss is multiplied by the number of ranks before its backward.

    Args:
        model: `MegaForCausalLM` on the meta device; becomes `module`.
        values: full values of its parameters and persistent buffers.
        native: DeepSpeed's configuration, from `native_config`.
        dtype: fp32 or bf16, of matrix products; parameters, EMA and optimizer are fp32 in either.
        max_grad_norm: norm to which gradients are clipped, 0 for not at all.
        build_optimizer: makes AdamW over the model.
        world: ranks and device.
    """

    def __init__(
        self,
        model: MegaPreTrainedModel,
        values: Values,
        *,
        native: dict[str, Any],
        dtype: str,
        max_grad_norm: float,
        build_optimizer: BuildOptimizer,
        world: World,
    ) -> None:
        self.module: nn.Module = model
        self._world = world
        self._stage: int = native["zero_optimization"]["stage"]
        self._max_grad_norm = max_grad_norm
        deepspeed = _start_deepspeed(world)
        if self._stage == 3:
            fill(model, values, _partitioner(deepspeed, native, world.rank), world.device)
        else:
            fill(model, values, lambda old, value: nn.Parameter(value.to(world.device)), world.device)
        if dtype == "bf16":
            # DeepSpeed turns autocast on in its own forward only; evaluation and generation call the module.
            model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model), config=native, dist_init_required=False
        )

    def forward(self, input_ids: Tensor, shift_labels: Tensor, num_items: int) -> Tensor:
        """This rank's share of the loss, see `Engine.forward`."""
        output = self._engine(
            input_ids=input_ids, shift_labels=shift_labels, num_items_in_batch=num_items, use_cache=False
        )
        return output.loss

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients, see `Engine.backward`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Clip, step, forget gradients, see `Engine.step`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        norm = None
        if self._stage == 0:
            limit = self._max_grad_norm or float("inf")
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def save(self, folder: Path) -> None:
        """Write this rank's partitions, see `Engine.save`."""
        self._engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read this rank's partitions, see `Engine.load`."""
        self._refuse_other_layout(folder / DEEPSPEED_TAG)
        groups = self._engine.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self._engine.load_checkpoint(str(folder), tag=DEEPSPEED_TAG, load_lr_scheduler_states=False)
        for group, own in zip(self._engine.optimizer.param_groups, settings, strict=True):
            group.update(own)

    def close(self) -> None:
        """Undo what DeepSpeed changed in this process, see `Engine.close`."""
        self._engine.destroy()
        nn.functional.linear = _linear

    def _refuse_other_layout(self, files: Path) -> None:
        """DeepSpeed would fail late, or hang, on files of another stage or number of ranks."""
        weights = "zero_pp_rank_0_mp_rank_00_model_states.pt" if self._stage == 3 else "mp_rank_00_model_states.pt"
        parts = len(list(files.glob("*_optim_states.pt")))
        expected = self._world.size if self._stage > 0 else 0
        if not (files / weights).is_file() or parts != expected:
            raise ValueError(
                f"{files} was not written at parallel.zero_stage={self._stage} by {self._world.size} processes of the "
                f"deepspeed engine (partitions found: {parts}): resume with the layout that wrote it"
            )


def _start_deepspeed(world: World) -> Any:
    """Import DeepSpeed and let it adopt the process group."""
    deepspeed = import_deepspeed(world.device.type)
    # DeepSpeed reads it even where there is no launcher.
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    # A shared-memory all-reduce for inference would be compiled at first start, and need a compiler; training does not
    # call it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _partitioner(deepspeed: Any, native: dict[str, Any], rank: int) -> Any:
    def place(old: nn.Parameter, value: Tensor) -> nn.Parameter:
        parameter: Any = nn.Parameter(value)
        # Partitions what the module holds in place, so the same parameter then serves in the model.
        deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=native)
        # Where ranks do not divide a parameter, the last part ends in memory that DeepSpeed leaves as it found it, and
        # that would go into optimizer and checkpoints.
        part = parameter.ds_tensor.data
        part[max(parameter.ds_numel - rank * part.numel(), 0) :] = 0
        return parameter

    return place
