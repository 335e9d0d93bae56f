"""The FSDP2 engine: PyTorch's `fully_shard` over a mesh of ranks, AdamW on sharded parameters."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mega_scale.model import MegaPreTrainedModel
from mega_scale.parallel.activation_checkpoint import blocks
from mega_scale.parallel.config import EngineConfig
from mega_scale.parallel.engine import BuildOptimizer, Engine, ModelParallelism, Range, ensure_moments, flat
from mega_scale.parallel.shard import MOMENTS, WEIGHT, Values
from mega_scale.parallel.world import Axis, World


class FsdpEngine(Engine):
    """A model sharded by `fully_shard`, in the three stages that DeepSpeed calls ZeRO.

    Stage 3 gathers a block for its forward and again for its backward; stage 2 keeps it from forward to backward;
    stage 1 keeps weights and gradients whole until the last micro-batch, and reduces gradients once a step. Gradients
    are summed over ranks in fp32, as the loss is already divided by the tokens of the global batch. Parameters are
    sharded over dp_shard and sp together, within what tp leaves of them, and copied along dp_replicate. Parameters, EMA
    and optimizer are fp32 whatever the number format of forward and backward.
    """

    def __init__(
        self,
        model: MegaPreTrainedModel,
        values: Values,
        parallelism: ModelParallelism,
        config: EngineConfig,
        world: World,
        build_optimizer: BuildOptimizer,
    ) -> None:
        super().__init__(model, parallelism, config, world)
        stage = config.parallel.zero_stage
        self._keep_gradients_whole = stage == 1
        copies = world.shape.dp_replicate > 1
        mesh = world.mesh["dp_replicate", "fsdp"] if copies else world.mesh["fsdp"]
        _shard(model, mesh, config.dtype, reshard=stage == 3)
        model.to_empty(device=world.device)
        self._fill(values, _placer(world.axis("fsdp")))
        self._optimizer = build_optimizer(model)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients, see `Engine.backward`."""
        if self._keep_gradients_whole:
            root = self.module
            assert isinstance(root, FSDPModule)
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_backward(last)
        with self.row_slice:
            loss.backward()

    @torch.no_grad()
    def step(self, lr: float, skip: bool = False) -> float:
        """Clip, step, forget gradients, see `Engine.step`."""
        self._drop_gathered()
        norm = self._norm(_local_gradients(self._counted), alike=("dp_replicate",))
        if not skip and norm.isfinite():
            self._clip(_local_gradients(list(self.module.parameters())), norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _optimizer_steps(self) -> list[Tensor]:
        self._drop_gathered()
        return ensure_moments(self._optimizer, [p for p in self.module.parameters() if p.requires_grad])

    def _range(self, name: str) -> Range:
        parameter, fsdp = self._parameters[name], self._world.axis("fsdp")
        tensors = {WEIGHT: flat(parameter)}
        if parameter.requires_grad:
            tensors |= {moment: flat(self._optimizer.state[parameter][moment]) for moment in MOMENTS}
        rows, *rest = parameter.shape
        # As in _rows: every rank has as many rows as the first, as long as there are some left.
        first = min(fsdp.rank * -(-rows // fsdp.size), rows)
        return Range(parameter.shape, first * math.prod(rest), tensors, copied=False)

    def loaded(self, step: int) -> None:
        """Nothing else depends on the state, see `Engine.loaded`."""

    def local_tensor(self, name: str) -> Tensor:
        """This rank's rows, see `Engine.local_tensor`."""
        return _local(self._parameters[name]).detach().flatten()

    def local_shard(self, name: str, value: Tensor) -> Tensor:
        """This rank's rows of a value, see `Engine.local_shard`."""
        return _rows(value, self._world.axis("fsdp")).flatten()

    def close(self) -> None:
        """Nothing outside the module to free, see `Engine.close`."""

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
            average = block.get_submodule("mega_layer.ema_gate")
            fully_shard(average, mesh=mesh, mp_policy=exact, reshard_after_forward=reshard)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # A cache that is given to the model keeps its states in fp32; blocks round what they compute with themselves.
    policy = replace(policy, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # Nothing edits the logits in place, of which the root warns because they are a view.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            # A factor would otherwise be multiplied in by the reduction itself, which gloo cannot do.
            unit.set_force_sum_reduction_for_comms(True)


def _rows(value: Tensor, fsdp: Axis) -> Tensor:
    """The rows of a value that FSDP keeps on this rank; the last ranks have none where there are fewer chunks."""
    rows = value.chunk(fsdp.size)
    return rows[fsdp.rank] if fsdp.rank < len(rows) else value[:0]


def _placer(fsdp: Axis) -> Callable[[nn.Parameter, Tensor], nn.Parameter]:
    def place(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
        """Copy this rank's rows of a value into a sharded parameter, without communication."""
        with torch.no_grad():
            _local(parameter).copy_(_rows(value, fsdp))
        return parameter

    return place


def _local(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        raise TypeError(f"a parameter of shape {tuple(parameter.shape)} was left out of sharding")
    return parameter.to_local()


def _local_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
