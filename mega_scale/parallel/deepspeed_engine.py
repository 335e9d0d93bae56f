"""The DeepSpeed engine: ZeRO stages 0 to 3 around the same model and the same AdamW."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mega_scale.model import MegaPreTrainedModel
from mega_scale.parallel.deepspeed_import import import_deepspeed
from mega_scale.parallel.deepspeed_mesh import MeshUnit
from mega_scale.parallel.engine import BuildOptimizer
from mega_scale.parallel.materialize import Values, fill
from mega_scale.parallel.pieces import pieces
from mega_scale.parallel.spread import Spread
from mega_scale.parallel.weights import DEEPSPEED_TAG, model_file, write_names, zero_file
from mega_scale.parallel.window import START, Place
from mega_scale.parallel.world import World

_linear = nn.functional.linear


class DeepSpeedEngine:
    """A model under DeepSpeed ZeRO: 0 replicates all, 1 splits optimizer state, 2 gradients too, 3 weights too.

    To DeepSpeed, ranks along dp_shard and sp are data-parallel ones, those along tp are model-parallel ones, and it
    knows of one copy along dp_replicate only. It averages gradients over the former, so the loss is multiplied by their
    number before its backward; gradients of the copies are summed before its step.

    Args:
        model: `MegaForCausalLM` on the meta device, spread; becomes `module`.
        values: full values of its parameters and persistent buffers.
        parts: how it was spread.
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
        parts: Spread,
        *,
        native: dict[str, Any],
        dtype: str,
        max_grad_norm: float,
        build_optimizer: BuildOptimizer,
        world: World,
    ) -> None:
        self.module: nn.Module = model
        self._world = world
        self._window = parts.window
        self._partitions = world.shape.fsdp
        self._copies = world.axis("dp_replicate")
        self._stage: int = native["zero_optimization"]["stage"]
        self._max_grad_norm = max_grad_norm
        deepspeed = _start_deepspeed(world)
        unit = MeshUnit(world.axis("fsdp"), parts.tp)
        place = _partitioner(deepspeed, native, unit) if self._stage == 3 else _placer(world.device)
        fill(model, values, place, world.device, template=parts.template, tp=parts.tp)
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        table = pieces(model)
        for name, parameter in self._parameters.items():
            # What every rank of tp holds counts once in the gradient's norm.
            parameter.tensor_model_parallel = table[name].dim is not None
        if dtype == "bf16":
            # DeepSpeed turns autocast on in its own forward only; evaluation and generation call the module.
            model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model), config=native, mpu=unit, dist_init_required=False
        )
        if self._copies.rank > 0:
            # Copies hold the same, and their files would bear the same names: the first copy writes them.
            self._engine.checkpoint_engine.save = lambda *args, **kwargs: None

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        num_items: int,
        place: Place = START,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """This rank's share of the loss, see `Engine.forward`."""
        inputs, labels = self._window.take(place, input_ids, shift_labels)
        starts = None if document_starts is None else self._window.split(document_starts, False)
        with self._window:
            output = self._engine(
                input_ids=inputs,
                shift_labels=labels,
                num_items_in_batch=num_items,
                document_starts=starts,
                use_cache=False,
            )
        return output.loss

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients, see `Engine.backward`."""
        self._engine.set_gradient_accumulation_boundary(last)
        with self._window:
            self._engine.backward(loss * self._partitions, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Clip, step, forget gradients, see `Engine.step`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._copies.size > 1:
            self._sum_copies()
        norm = None
        if self._stage == 0:
            norm = self._clip()
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def _sum_copies(self) -> None:
        """Sum what each copy has of the gradient: its partitions lie in one buffer."""
        dist.all_reduce(self._engine.optimizer.grad_partitions_flat_buffer, group=self._copies.group)

    def _clip(self) -> Tensor:
        """Clip gradients that are whole but for tp; returns their norm before."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        counted = [
            p.grad
            for p in self.module.parameters()
            if p.grad is not None and (p.tensor_model_parallel or self._world.at.tp == 0)  # type: ignore[attr-defined]
        ]
        own = torch.stack(torch._foreach_norm(counted)).square().sum()
        norm = self._world.sum(own, alike=("dp_replicate", "dp_shard", "sp")).sqrt()
        if self._max_grad_norm > 0:
            torch._foreach_mul_(gradients, (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def save(self, folder: Path) -> None:
        """Write this rank's partitions, see `Engine.save`."""
        self._engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False)
        if self._world.rank == 0:
            write_names(self.module, folder, self._world.shape.tp)
        self._world.barrier()

    def load(self, folder: Path) -> None:
        """Read this rank's partitions, see `Engine.load`."""
        self._refuse_other_layout(folder / DEEPSPEED_TAG)
        groups = self._engine.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self._engine.load_checkpoint(str(folder), tag=DEEPSPEED_TAG, load_lr_scheduler_states=False)
        for group, own in zip(self._engine.optimizer.param_groups, settings, strict=True):
            group.update(own)

    def held(self, name: str) -> Tensor:
        """This rank's partition without its padding, see `Engine.held`."""
        parameter = self._parameters[name]
        if self._stage < 3:
            return parameter.detach().flatten()
        part = parameter.ds_tensor.data.flatten()
        return part[: max(parameter.ds_numel - self._world.axis("fsdp").rank * part.numel(), 0)]

    def part(self, name: str, value: Tensor) -> Tensor:
        """This rank's partition of a value, see `Engine.part`."""
        if self._stage < 3:
            return value.flatten()
        parameter = self._parameters[name]
        numbers, rank = parameter.ds_tensor.numel(), self._world.axis("fsdp").rank
        return value.flatten()[rank * numbers : (rank + 1) * numbers]

    def close(self) -> None:
        """Undo what DeepSpeed changed in this process, see `Engine.close`."""
        self._engine.destroy()
        nn.functional.linear = _linear

    def _refuse_other_layout(self, files: Path) -> None:
        """DeepSpeed would fail late, or hang, on files of another stage or number of ranks."""
        shape = self._world.shape
        parts = {zero_file(rank, tp, "optim") for rank in range(shape.fsdp) for tp in range(shape.tp)}
        found = {path.name for path in files.glob("*_optim_states.pt")}
        weights = zero_file(0, 0, "model") if self._stage == 3 else model_file(shape.tp - 1)
        if not (files / weights).is_file() or found != (parts if self._stage > 0 else set()):
            raise ValueError(
                f"{files} was not written by the deepspeed engine at parallel.zero_stage={self._stage} in {shape.fsdp} "
                f"parts x parallel.tp={shape.tp} (partitions found: {len(found)}): resume with the layout that wrote it"
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


def _partitioner(deepspeed: Any, native: dict[str, Any], unit: MeshUnit) -> Any:
    def place(old: nn.Parameter, value: Tensor) -> nn.Parameter:
        parameter: Any = nn.Parameter(value.contiguous())
        # Partitions what the module holds in place, so the same parameter then serves in the model.
        deepspeed.zero.Init(
            module=nn.ParameterList([parameter]),
            config_dict_or_path=native,
            data_parallel_group=unit.get_data_parallel_group(),
            mpu=unit,
        )
        # Where ranks do not divide a parameter, the last part ends in memory that DeepSpeed leaves as it found it, and
        # that would go into optimizer and checkpoints.
        part = parameter.ds_tensor.data
        part[max(parameter.ds_numel - unit.get_data_parallel_rank() * part.numel(), 0) :] = 0
        return parameter

    return place


def _placer(device: torch.device) -> Any:
    # A copy of its own: a part is a view of the whole value.
    return lambda old, value: nn.Parameter(value.to(device, copy=True).contiguous())
