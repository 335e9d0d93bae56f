"""The FSDP2 engine: PyTorch's `fully_shard` over a mesh of ranks, AdamW on sharded parameters."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mega_scale.model import MegaPreTrainedModel
from mega_scale.parallel.engine import BuildOptimizer
from mega_scale.parallel.materialize import Values, fill
from mega_scale.parallel.structure import blocks, ema_of
from mega_scale.parallel.weights import named_tensors, write_ties
from mega_scale.parallel.world import World


class FsdpEngine:
    """A model sharded by `fully_shard`, in the three stages that DeepSpeed calls ZeRO.

    Stage 3 gathers a block for its forward and again for its backward; stage 2 keeps it from forward to backward;
    stage 1 keeps weights and gradients whole until the last micro-batch, and reduces gradients once a step. Gradients
    are summed over ranks in fp32, as the loss is already divided by the tokens of the global batch.

    Args:
        model: `MegaForCausalLM` on the meta device; becomes `module`.
        values: full values of its parameters and persistent buffers.
        stage: 1 to 3.
        dtype: fp32 or bf16, of forward and backward; parameters, EMA and optimizer are fp32 in either.
        max_grad_norm: norm to which gradients are clipped, 0 for not at all.
        build_optimizer: makes AdamW over the sharded model.
        world: ranks and device.
    """

    def __init__(
        self,
        model: MegaPreTrainedModel,
        values: Values,
        *,
        stage: int,
        dtype: str,
        max_grad_norm: float,
        build_optimizer: BuildOptimizer,
        world: World,
    ) -> None:
        self.module: nn.Module = model
        self._world = world
        self._keep_gradients_whole = stage == 1
        self._max_grad_norm = max_grad_norm
        # One axis now. Parameters will be sharded over this axis flattened with others when there are any.
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("dp_shard",))
        _shard(model, mesh["dp_shard"], dtype, reshard=stage == 3)
        model.to_empty(device=world.device)
        fill(model, values, _place, world.device)
        self._optimizer = build_optimizer(model)

    def forward(self, input_ids: Tensor, shift_labels: Tensor, num_items: int) -> Tensor:
        """This rank's share of the loss, see `Engine.forward`."""
        output = self.module(
            input_ids=input_ids, shift_labels=shift_labels, num_items_in_batch=num_items, use_cache=False
        )
        return output.loss

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients, see `Engine.backward`."""
        if self._keep_gradients_whole:
            _root(self.module).set_requires_gradient_sync(last)
            _root(self.module).set_reshard_after_backward(last)
        loss.backward()

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip, step, forget gradients, see `Engine.step`."""
        self._drop_gathered()
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self._max_grad_norm > 0:
            clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def save(self, folder: Path) -> None:
        """Write this rank's shards, see `Engine.save`."""
        self._drop_gathered()
        dcp.save(self._state(), checkpoint_id=folder)
        if self._world.rank == 0:
            write_ties(self.module, folder)
        self._world.barrier()

    def load(self, folder: Path) -> None:
        """Read into this rank's shards, see `Engine.load`."""
        if not (folder / ".metadata").is_file():
            raise ValueError(
                f"{folder} was not written by the fsdp engine: set parallel.engine to the engine that wrote it"
            )
        self._drop_gathered()
        self._allocate_optimizer_state()
        dcp.load(self._state(), checkpoint_id=folder)

    def close(self) -> None:
        """Nothing outside the module to free, see `Engine.close`."""

    def _state(self) -> dict[str, Any]:
        """Tensors of model and optimizer by name, each parameter once; loading writes into them in place."""
        parameters = dict(self.module.named_parameters())
        state = self._optimizer.state
        return {
            "model": named_tensors(self.module),
            "optimizer": {name: dict(state[parameter]) for name, parameter in parameters.items() if state[parameter]},
        }

    @torch.no_grad()
    def _allocate_optimizer_state(self) -> None:
        """Make the optimizer create its state: a step of size zero, which changes no weight."""
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _drop_gathered(self) -> None:
        """Free weights that a forward without backward left gathered: they stand in for the sharded ones until then."""
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()


def _shard(model: nn.Module, mesh: DeviceMesh, dtype: str, reshard: bool) -> None:
    """Make every block a unit, and the EMA in it one of its own where its precision differs; the rest is the root."""
    policy = MixedPrecisionPolicy()
    if dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks(model):
            fully_shard(ema_of(block), mesh=mesh, mp_policy=exact, reshard_after_forward=reshard)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # Nothing edits the logits in place, of which the root warns because they are a view.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            # A factor would otherwise be multiplied in by the reduction itself, which gloo cannot do.
            unit.set_force_sum_reduction_for_comms(True)


def _place(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Copy this rank's rows of a full value into a sharded parameter, without communication."""
    if not isinstance(parameter, DTensor):
        raise TypeError(f"a parameter of shape {tuple(parameter.shape)} was left out of sharding")
    local = parameter.to_local()
    part = distribute_tensor(value.to(local.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    with torch.no_grad():
        local.copy_(part.to_local())
    return parameter


def _root(module: nn.Module) -> FSDPModule:
    if not isinstance(module, FSDPModule):
        raise TypeError(f"{type(module).__name__} is not sharded")
    return module
