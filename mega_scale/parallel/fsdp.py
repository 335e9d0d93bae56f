"""The FSDP2 engine: PyTorch's `fully_shard` over a mesh of ranks, AdamW on sharded parameters."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from mega_scale.model import MegaPreTrainedModel
from mega_scale.parallel.collectives import Axis
from mega_scale.parallel.engine import BuildOptimizer
from mega_scale.parallel.materialize import Values, fill
from mega_scale.parallel.pieces import Piece, pieces
from mega_scale.parallel.shards import shard_dimension
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
from mega_scale.parallel.structure import blocks, ema_of
from mega_scale.parallel.window import START, Place
from mega_scale.parallel.world import World


class FsdpEngine:
    """A model sharded by `fully_shard`, in the three stages that DeepSpeed calls ZeRO.

    Stage 3 gathers a block for its forward and again for its backward; stage 2 keeps it from forward to backward;
    stage 1 keeps weights and gradients whole until the last micro-batch, and reduces gradients once a step. Gradients
    are summed over ranks in fp32, as the loss is already divided by the tokens of the global batch. Parameters are
    sharded over dp_shard and sp together, on top of tp, and copied along dp_replicate.

    Args:
        model: `MegaForCausalLM` on the meta device, spread; becomes `module`.
        values: full values of its parameters and persistent buffers.
        parts: how it was spread.
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
        parts: Spread,
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
        self._window = parts.window
        if parts.tp.size > 1:
            _declare_parts(model, world.mesh["tp"])
        copies = world.shape.dp_replicate > 1
        _shard(model, world.mesh["dp_replicate", "fsdp"] if copies else world.mesh["fsdp"], dtype, reshard=stage == 3)
        model.to_empty(device=world.device)
        fill(model, values, _placer(world.axis("fsdp")), world.device, template=parts.template, tp=parts.tp)
        self._parameters = dict(model.named_parameters())
        table = pieces(model)
        # What every rank of tp holds is counted by the first.
        self._counted = [
            parameter
            for name, parameter in self._parameters.items()
            if parts.tp.rank == 0 or table[name].dim is not None
        ]
        self._optimizer = build_optimizer(model)

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
            output = self.module(
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
        if self._keep_gradients_whole:
            _root(self.module).set_requires_gradient_sync(last)
            _root(self.module).set_reshard_after_backward(last)
        with self._window:
            loss.backward()

    @torch.no_grad()
    def step(self, lr: float, skip: bool = False) -> float:
        """Clip, step, forget gradients, see `Engine.step`."""
        self._drop_gathered()
        norm = self._gradient_norm()
        if skip or not norm.isfinite():
            self._optimizer.zero_grad(set_to_none=True)
            return float(norm)
        if self._max_grad_norm > 0:
            gradients = _local_gradients(list(self.module.parameters()))
            torch._foreach_mul_(gradients, (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _gradient_norm(self) -> Tensor:
        """L2 norm of the whole gradient: every number of it is counted once, on the rank that holds it."""
        gradients = _local_gradients(self._counted)
        norms = torch._foreach_norm(gradients) if gradients else []
        own = torch.stack(list(norms)).square().sum() if norms else torch.zeros((), device=self._world.device)
        return self._world.sum(own, alike=("dp_replicate",)).sqrt()

    def state(self) -> EngineState:
        """This rank's rows and their moments, see `Engine.state`."""
        self._drop_gathered()
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        ensure_moments(self._optimizer, trained)
        names = names_of(self.module, self._world.shape.tp)
        held = {name: self._held(name, piece) for name, piece in names.table.items()}
        steps = [self._optimizer.state[parameter]["step"] for parameter in trained]
        return EngineState(names, held, [_own(step) for step in steps], persistent_buffers(self.module))

    def _held(self, name: str, piece: Piece) -> Held:
        parameter, fsdp, tp = self._parameters[name], self._world.axis("fsdp"), self._world.axis("tp")
        tensors = {WEIGHT: flat(parameter)}
        if parameter.requires_grad:
            tensors |= {moment: flat(self._optimizer.state[parameter][moment]) for moment in MOMENTS}
        shape = list(parameter.shape)
        if piece.dim is not None:
            shape[piece.dim] //= tp.size
        # As in _rows: every rank has as many rows as the first, as long as there are some left.
        first = min(fsdp.rank * -(-shape[0] // fsdp.size), shape[0])
        alike = [self._world.axis("dp_replicate"), *([tp] if piece.dim is None else [])]
        return held_range(piece, shape, first * math.prod(shape[1:]), tensors, tp, alike)

    def loaded(self, step: int) -> None:
        """Nothing else depends on the state, see `Engine.loaded`."""

    def held(self, name: str) -> Tensor:
        """This rank's rows, see `Engine.held`."""
        return _local(self._parameters[name]).detach().flatten()

    def part(self, name: str, value: Tensor) -> Tensor:
        """This rank's rows of a value, see `Engine.part`."""
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
            fully_shard(ema_of(block), mesh=mesh, mp_policy=exact, reshard_after_forward=reshard)
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


def _declare_parts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tell FSDP and checkpoints which part of a whole tensor each parameter is.

    Without it, parts of different ranks of tp would overwrite each other in a checkpoint.
    """
    declared: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in declared:
                    dim = shard_dimension(module, name)
                    placement = Replicate() if dim is None else Shard(dim)
                    declared[parameter] = nn.Parameter(
                        DTensor.from_local(parameter.detach(), mesh, [placement], run_check=False)
                    )
                module._parameters[name] = declared[parameter]


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


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _root(module: nn.Module) -> FSDPModule:
    if not isinstance(module, FSDPModule):
        raise TypeError(f"{type(module).__name__} is not sharded")
    return module
