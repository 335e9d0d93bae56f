"""The DeepSpeed engine: ZeRO stages 0 to 3 around the same model and the same AdamW."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mega_scale.model import MegaPreTrainedModel
from mega_scale.parallel.deepspeed_import import import_deepspeed
from mega_scale.parallel.deepspeed_mesh import MeshUnit
from mega_scale.parallel.engine import BuildOptimizer
from mega_scale.parallel.materialize import Values, fill
from mega_scale.parallel.pieces import Piece, pieces
from mega_scale.parallel.spread import Spread
from mega_scale.parallel.state import (
    MOMENTS,
    WEIGHT,
    EngineState,
    Held,
    ensure_moments,
    flat,
    held_range,
    names_of,
    persistent_buffers,
)
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
        self._require_own_numbers()

    def _require_own_numbers(self) -> None:
        """See that what the optimizer steps under each name is what the model computes with under it.

        Raises:
            RuntimeError: it is not; checkpoints would hold other parameters' numbers under that name.
        """
        for name, parameter in self._parameters.items():
            place = self._place(parameter)
            stepped = flat(place.owner)[place.numbers]
            begin = 0 if self._stage == 3 else place.start
            computed = self.held(name)[begin : begin + len(stepped)]
            if not torch.equal(stepped.to(computed.device), computed):
                raise RuntimeError(
                    f"parallel.engine=deepspeed keeps other numbers than the model's for {name}, so that checkpoints "
                    "would be wrong: remove keys of parallel.ds_config.zero_optimization, or use parallel.engine=fsdp"
                )

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
                skip_logits=True,
            )
        return output.loss

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients, see `Engine.backward`."""
        self._engine.set_gradient_accumulation_boundary(last)
        with self._window:
            self._engine.backward(loss * self._partitions, scale_wrt_gas=False)

    def step(self, lr: float, skip: bool = False) -> float:
        """Clip, step, forget gradients, see `Engine.step`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._copies.size > 1:
            self._sum_copies()
        if self._stage == 0:
            return self._step_whole(skip)
        if skip:
            with self._refused() as norms:
                self._engine.step()
            return float(norms[0])
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _step_whole(self, skip: bool) -> float:
        """Step without ZeRO, which has no norm of its own, and would step with any gradient."""
        norm = self._clip()
        if skip or not norm.isfinite():
            self._engine.optimizer.zero_grad(set_to_none=True)
        else:
            self._engine.step()
        return float(norm)

    @contextmanager
    def _refused(self) -> Iterator[list[Tensor]]:
        """Have ZeRO discard its next step: told that the norm is infinite, it forgets the gradients in its own way.

        Yields:
            Will have the true norm, which ZeRO then does not keep.
        """
        from deepspeed.runtime.utils import combine_grad_norm_groups  # noqa: PLC0415  see import_deepspeed

        optimizer = self._engine.optimizer
        norms: list[Tensor] = []
        # What each class asks for the norm, or for those of its groups, just before it decides.
        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        compute = getattr(optimizer, name)

        def refuse() -> Any:
            found = compute()
            norms.append(combine_grad_norm_groups(found) if self._stage == 3 else found)
            return [torch.full_like(norms[0], math.inf)] if self._stage == 3 else torch.full_like(norms[0], math.inf)

        setattr(optimizer, name, refuse)
        try:
            yield norms
        finally:
            delattr(optimizer, name)

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

    def state(self) -> EngineState:
        """This rank's partitions and their moments, see `Engine.state`."""
        optimizer = self._engine.optimizer
        adam: torch.optim.Optimizer = optimizer if self._stage == 0 else optimizer.optimizer
        if self._stage == 0:
            stepped = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        else:
            stepped = (
                optimizer.single_partition_of_fp32_groups if self._stage < 3 else optimizer.fp32_partitioned_groups_flat
            )
        ensure_moments(adam, stepped)
        names = names_of(self.module, self._world.shape.tp)
        held = {name: self._range(self._parameters[name], piece, adam) for name, piece in names.table.items()}
        return EngineState(names, held, [adam.state[one]["step"] for one in stepped], persistent_buffers(self.module))

    def _range(self, parameter: Any, piece: Piece, adam: torch.optim.Optimizer) -> Held:
        place, tp, fsdp = self._place(parameter), self._world.axis("tp"), self._world.axis("fsdp")
        alike = [self._copies, *([tp] if piece.dim is None else []), *([fsdp] if place.owner is parameter else [])]
        tensors = {WEIGHT: flat(place.owner)[place.numbers]}
        if parameter.requires_grad:
            tensors |= {moment: flat(adam.state[place.owner][moment])[place.numbers] for moment in MOMENTS}
        shape = parameter.ds_shape if self._stage == 3 else parameter.shape
        return held_range(piece, shape, place.start, tensors, tp, alike)

    def _place(self, parameter: Any) -> "_Stepped":
        optimizer, fsdp = self._engine.optimizer, self._world.axis("fsdp")
        if self._stage == 3:
            group, first, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = min(fsdp.rank * length, parameter.ds_numel)
            end = first + min(length, parameter.ds_numel - start)  # the last part ends in padding
            return _Stepped(optimizer.fp32_partitioned_groups_flat[group], slice(first, end), start)
        if self._stage > 0:
            # Where the parameter lies in its group is seen from its memory: DeepSpeed may have ordered the group anew,
            # which its own table does not say.
            memory = parameter.untyped_storage().data_ptr()
            for group, whole in enumerate(optimizer.bit16_groups_flat):
                if whole.untyped_storage().data_ptr() == memory:
                    owner = optimizer.single_partition_of_fp32_groups[group]
                    ahead = fsdp.rank * owner.numel() - (parameter.storage_offset() - whole.storage_offset())
                    start = min(max(ahead, 0), parameter.numel())
                    end = min(max(ahead + owner.numel(), 0), parameter.numel())
                    return _Stepped(owner, slice(start - ahead, max(end, start) - ahead), start)
        return _Stepped(parameter, slice(None), 0)

    def loaded(self, step: int) -> None:
        """Have DeepSpeed's other copies of the weights follow, see `Engine.loaded`."""
        self._engine.global_steps = step
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            # Gathered weights are dropped, and those that stay gathered are gathered anew.
            optimizer.checkpoint_event_prologue()
            for name, held in self.state().held.items():
                # Depending on its settings, DeepSpeed steps a copy of what it gathers.
                partition = self._parameters[name].ds_tensor.data.view(-1)
                partition[: len(held.tensors[WEIGHT])] = held.tensors[WEIGHT]
            optimizer.checkpoint_event_epilogue()

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


class _Stepped(NamedTuple):
    """Where the optimizer's numbers of a parameter lie on this rank.

    Args:
        owner: what the optimizer steps.
        numbers: which of its numbers, flattened; none where this rank has none of the parameter.
        start: the first of them in the parameter, flattened.
    """

    owner: Tensor
    numbers: slice
    start: int


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
