"""What both engines share: forward, gradient norm and clipping, the state of checkpoints. And the engine of FSDP2."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer
from transformers import PreTrainedModel

from mega_scale.parallel.config import EngineConfig
from mega_scale.parallel.shard import (
    AVERAGE,
    MOMENTS,
    MOMENTUM,
    START,
    WEIGHT,
    EngineState,
    Held,
    LocalTensor,
    Place,
    Placer,
    RowSlice,
    Values,
    fill,
    flat,
    on_meta,
    shardings,
)
from mega_scale.parallel.world import World

if TYPE_CHECKING:
    from mega_scale.parallel.weight_average import WeightAverage

BuildOptimizer = Callable[[nn.Module], Optimizer]
"""Makes AdamW, or `Muon`, over the parameters of a model that an engine has sharded."""


class Stepped(NamedTuple):
    """Where the numbers of a parameter lie that this rank's optimizer steps."""

    owner: Tensor  # what the optimizer steps, and has moments for
    numbers: slice  # which of its numbers, flattened; may end in padding


class Engine(ABC):
    """A sharded model with its optimizer; every method is collective unless it says otherwise.

    `module` is the model: call it on all ranks alike for evaluation and generation, under `no_grad`. In a `with`
    statement of `row_slice` it computes this rank's part of the rows last taken.
    """

    _adam: Optimizer
    _average: "WeightAverage | None" = None

    def __init__(
        self,
        model: PreTrainedModel,
        values: Values,
        row_slice: RowSlice,
        config: EngineConfig,
        world: World,
        build_optimizer: BuildOptimizer,
    ) -> None:
        self.module, self.row_slice, self._world = model, row_slice, world
        self._template = on_meta(type(model), model.config)
        self._tp, self._fsdp, self._copies = world.axes["tp"], world.axes["fsdp"], world.axes["dp_replicate"]
        self._stage, self._max_grad_norm = config.parallel.zero_stage, config.max_grad_norm
        self._call: Callable[..., Any] = model
        self._matrices: set[str] = set()  # parameters that Muon steps
        self._build(values, config, build_optimizer)
        if self._matrices:
            self._optimizer_steps(self._moments())
            muon: Any = self._adam
            muon.attach(
                [(name, self._shape(name), *self._stepped(name)[:2]) for name in self._matrices], self.held, world
            )
        if config.weight_average:
            from mega_scale.parallel.weight_average import WeightAverage

            held = {name: local.tensors for name, local in self.state().tensors.items()}
            trained = {name: tensors[WEIGHT] for name, tensors in held.items() if len(tensors) > 1}
            with world.memory():
                self._average = WeightAverage(config.weight_average, trained, world.number)

    @abstractmethod
    def _build(self, values: Values, config: EngineConfig, build_optimizer: BuildOptimizer) -> None:
        """Shard the model, give it its values, and make the optimizer."""

    def _fill(self, values: Values, place: Placer) -> None:
        """Give the model its values, and note what follows from its parameters for good."""
        model = self.module
        fill(model, values, place, self._world.device, template=self._template, tp=self._tp)
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self._table, self._ties = shardings(model), dict[str, str]()
        # What every rank of tp holds counts once in the gradient's norm, on the first.
        self._counted: list[Any] = [
            p for name, p in self._parameters.items() if self._tp.rank == 0 or self._table[name].dim is not None
        ]
        first: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if first.setdefault(parameter, name) != name:
                self._ties[self._table.pop(name).source] = self._table[first[parameter]].source

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        num_items: int,
        place: Place = START,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Loss of one micro-batch of this rank, scalar fp32 in nats: the sum over its tokens divided by `num_items`.

        The loss of the global batch, whose labelled tokens `num_items` counts, is the sum over micro-batches and over
        ranks, of which those along `tp` hold the same. Inputs and next tokens, -100 where there is none, are (B, L)
        int64, whole rows; ranks that share them are given the same. Dropout depends on the `place`. `document_starts`
        (B, L) bool are true at the first token of a document, and given to all ranks or to none.
        """
        input_ids, shift_labels = self.row_slice.take(place, input_ids, shift_labels)
        if document_starts is not None:
            document_starts = self.row_slice.split(document_starts, False)
        with self.row_slice:
            return loss_of(self._call, input_ids, shift_labels, num_items, document_starts=document_starts)

    def _optimizer_over(self, build_optimizer: BuildOptimizer) -> Optimizer:
        """Make the optimizer, and note which parameters Muon steps while they are what it is given."""
        optimizer = build_optimizer(self.module)
        stepped = {parameter for group in optimizer.param_groups if group.get("muon") for parameter in group["params"]}
        self._matrices = {name for name in self._table if self._parameters[name] in stepped}
        return optimizer

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of the loss of all ranks, as `forward` returned it; `last`: of the step."""

    def step(self, lr: float, skip: bool = False) -> float:
        """Clip the gradients, take one optimizer step at an absolute learning rate, and forget the gradients.

        Returns the L2 norm of the whole gradient before clipping. Where it is not finite, or with `skip`, the same on
        all ranks, none takes the step: weights, moments, average and counts stay as they are, to the bit.
        """
        norm = self._step(lr, skip)
        if self._average is not None and not skip and math.isfinite(norm):
            self._average.update()
        return norm

    @abstractmethod
    def _step(self, lr: float, skip: bool) -> float:
        """What `step` does, but for the average of the weights."""

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is kept."""
        return self._average is not None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with the average of the weights in a `with` statement, in which nothing is trained, saved or loaded.

        Raises ValueError where none is kept.
        """
        if self._average is None:
            raise ValueError("the engine keeps no average of the weights: give EngineConfig.weight_average")
        self._average.swap()
        self._rewritten()
        try:
            yield
        finally:
            self._average.swap()
            self._rewritten()

    def _clip(self, gradients: list[Tensor], counted: list[Tensor], alike: Sequence[str]) -> Tensor:
        """Clip this rank's gradients; returns the L2 norm of the whole gradient before.

        `counted` are those that count in the norm, of which ranks along `alike` hold copies. Where the norm is not
        finite, the gradients are of no use.
        """
        own = torch.zeros((), device=self._world.device)
        if counted:
            own = torch.stack(torch._foreach_norm(counted)).square().sum()
        norm = self._world.sum(own, alike=alike).sqrt()
        if self._max_grad_norm > 0 and gradients:  # this rank may hold none
            torch._foreach_mul_(gradients, (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def state(self) -> EngineState:
        """Model and optimizer as this rank holds them, between two steps; not collective.

        These are views of the engine's memory: read them to save, write into them to load, and then call `loaded`.
        """
        moments, tensors = self._moments(), {}
        steps = self._optimizer_steps(moments)
        for name in self._table:
            stepped, held = self._stepped(name), self.held(name, self._world.rank)
            kinds = {WEIGHT: stepped.owner}
            if self._parameters[name].requires_grad:
                kinds |= {kind: self._adam.state[stepped.owner][kind] for kind in moments[stepped.owner]}
            count = held.stop - held.start
            local = {kind: flat(tensor)[stepped.numbers][:count] for kind, tensor in kinds.items()}
            if len(local[WEIGHT]) != count:
                raise RuntimeError(f"rank {self._world.rank} holds {len(local[WEIGHT])} numbers of {name}, not {count}")
            if self._average is not None and name in self._average.tensors:
                local[AVERAGE] = self._average.tensors[name]
            tensors[name] = LocalTensor(self._shape(name), held.shard, held.start, local, held.copies, held.copy)
        persistent = self._template.state_dict()
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}
        averaged = None if self._average is None else self._average.steps
        return EngineState(self._table, self._ties, self._tp.size, self._tp.rank, tensors, steps, buffers, averaged)

    def _moments(self) -> dict[Tensor, Sequence[str]]:
        """The kinds of moments of what is stepped."""
        trained = [name for name in self._table if self._parameters[name].requires_grad]
        return {self._stepped(name).owner: (MOMENTUM,) if name in self._matrices else MOMENTS for name in trained}

    def _optimizer_steps(self, owners: Mapping[Tensor, Sequence[str]]) -> list[Tensor]:
        """AdamW's counters of steps, from what is stepped with the kinds of its moments.

        The moments exist from here on, before the first step too, as that makes them.
        """
        defaults, steps = self._adam.defaults, []
        for tensor, kinds in owners.items():
            if not self._adam.state[tensor]:
                device = tensor.device if defaults.get("fused") or defaults.get("capturable") else torch.device("cpu")
                state: dict[str, Any] = {kind: torch.zeros_like(tensor, requires_grad=False) for kind in kinds}
                if MOMENTUM not in kinds:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                self._adam.state[tensor] = state
            if MOMENTUM not in kinds:
                step = self._adam.state[tensor]["step"]
                steps.append(step.to_local() if isinstance(step, DTensor) else step)
        return steps

    def _shape(self, name: str) -> torch.Size:
        """Of the whole parameter."""
        sharding = self._table[name]
        whole = self._template.get_parameter(sharding.source).shape
        if sharding.rows is None:
            return whole
        first, end = sharding.rows
        return torch.Size((end - first, *whole[1:]))

    def held(self, name: str, rank: int) -> Held:
        """Which numbers of a parameter any rank holds, by the layout: no rank has to ask another."""
        sharding, (copy_rank, fsdp_rank, tp_rank) = self._table[name], self._world.place(rank)
        shard = sharding.shard(self._shape(name), tp_rank, self._tp.size)
        kept = self._kept(self._parameters[name], fsdp_rank)
        copies, copy = self._copies.size, copy_rank
        if sharding.dim is None:
            copies, copy = copies * self._tp.size, copy * self._tp.size + tp_rank
        if kept is None:
            copies, copy, kept = copies * self._fsdp.size, copy * self._fsdp.size + fsdp_rank, (0, shard.numel)
        # The last ranks' tensors along `tp` end in padding.
        start, stop = (min(number, shard.numel) for number in kept)
        return Held(shard, start, stop, copies, copy)

    @abstractmethod
    def _kept(self, parameter: Any, rank: int) -> tuple[int, int] | None:
        """Which numbers, [first, end), of a parameter of this rank of `tp` are kept by one of `fsdp`; None for all."""

    @abstractmethod
    def _stepped(self, name: str) -> Stepped: ...

    def loaded(self, step: int) -> None:
        """Have what depends on the state follow after it was written, `step` optimizer steps into the run."""
        self._rewritten()

    @abstractmethod
    def _rewritten(self) -> None:
        """Have the weights that are computed with follow those that are stepped."""

    @abstractmethod
    def local_tensor(self, name: str) -> Tensor:
        """What this rank keeps of a parameter of `module` between steps, flat; not collective."""

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """What this rank holds of weights, gradients and moments now, some perhaps twice; not collective."""
        stepped = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        weights = [*self._parameters.values(), *stepped]
        states = [value for state in self._adam.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in weights if parameter.grad is not None]
        moments = [value for value in states if isinstance(value, Tensor)]
        return {"weights": weights, "gradients": gradients, "moments": moments}

    def close(self) -> None:  # noqa: B027
        """Free what the engine holds outside the module; needs no other rank, may be called after an error or twice."""


def loss_of(
    call: Callable[..., Any],
    input_ids: Tensor,
    shift_labels: Tensor,
    num_items: int,
    *,
    document_starts: Tensor | None = None,
) -> Tensor:
    """Loss by a model that is called on all that it is given; arguments as in `Engine.forward`."""
    loss: Tensor = call(
        input_ids=input_ids,
        shift_labels=shift_labels,
        num_items_in_batch=num_items,
        document_starts=document_starts,
        use_cache=False,
        skip_logits=True,
    ).loss
    return loss


class FsdpEngine(Engine):
    """A model sharded by PyTorch's `fully_shard`, in the three stages that DeepSpeed calls ZeRO.

    Stage 3 gathers a block for its forward and again for its backward; stage 2 keeps it from forward to backward;
    stage 1 keeps weights and gradients whole until the last micro-batch, and reduces gradients once a step. Gradients
    are summed over ranks in fp32, as the loss is already divided by the tokens of the global batch. Parameters, EMA and
    optimizer are fp32 whatever the number format of forward and backward. Where that is bf16, every rank keeps the
    parameters of the EMA whole, which compute in fp32: 0.2 % of the model, and its gradients are summed once a step.
    """

    def _build(self, values: Values, config: EngineConfig, build_optimizer: BuildOptimizer) -> None:
        self._shard_modules(config.dtype)
        with self._world.memory():
            self._materialise(values, build_optimizer)

    def _materialise(self, values: Values, build_optimizer: BuildOptimizer) -> None:
        model = self.module
        model.to_empty(device=self._world.device)

        def place(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
            """Copy this rank's rows of a value into a sharded parameter, without communication."""
            own, (first, _) = flat(parameter), self._kept(parameter, self._fsdp.rank) or (0, 0)
            with torch.no_grad():
                own.copy_(value.flatten()[first : first + len(own)])
            return parameter

        self._fill(values, place)
        self._whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
        if self._fsdp.rank > 0:
            self._counted = [p for p in self._counted if isinstance(p, DTensor)]
        self._adam = self._optimizer_over(build_optimizer)
        for group in list(self._adam.param_groups):  # PyTorch steps tensors of one kind at a time
            of_kind = [[p for p in group["params"] if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
            if all(of_kind):
                group["params"] = of_kind[0]
                self._adam.param_groups.append(group | {"params": of_kind[1]})

    def _shard_modules(self, dtype: str) -> None:
        """Make every block a unit, without the EMA in it where its precision differs, and the rest the root."""
        model: Any = self.module
        world = self._world
        # Ranks of this one's tp, (dp_replicate, fsdp); without copies, (fsdp,).
        ranks = torch.arange(world.size, device="cpu").view(*world.shape)[..., world.axes["tp"].rank].flatten(1)
        names = ("dp_replicate", "fsdp") if len(ranks) > 1 else ("fsdp",)
        groups: list[Any] = [world.axes[name].group for name in names]
        mesh = DeviceMesh.from_group(groups, world.device.type, ranks.squeeze(0), mesh_dim_names=names)
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": self._stage == 3}
        policy, blocks = MixedPrecisionPolicy(), list(model.base_model.layers)
        if dtype == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            exact = [module for name, module in model.named_modules() if name.split(".")[-1] in model.fp32_modules]
            options["ignored_params"] = {parameter for module in exact for parameter in module.parameters()}
        for block in blocks:
            fully_shard(block, mp_policy=policy, **options)
        # A cache that is given to the model keeps its states in fp32; blocks round what they compute with themselves.
        fully_shard(model, mp_policy=replace(policy, cast_forward_inputs=False), **options)
        # Nothing edits the logits in place, of which the root warns because they are a view.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        self._units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
        for unit in self._units:
            if mesh.size() > 1:  # FSDP divides the gradients of a single rank by 1
                unit.set_gradient_divide_factor(1.0)
            # A factor would otherwise be multiplied in by the reduction itself, which gloo cannot do.
            unit.set_force_sum_reduction_for_comms(True)

    def backward(self, loss: Tensor, last: bool) -> None:
        root: Any = self.module
        root.set_requires_all_reduce(last)  # between copies, once a step
        if self._stage == 1:
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_backward(last)
        with self.row_slice:
            loss.backward()

    @torch.no_grad()
    def _step(self, lr: float, skip: bool) -> float:
        for unit in self._units:
            unit.reshard()  # as in `_rewritten`
        whole = [p.grad for p in self._whole if p.grad is not None]
        if whole:
            total = parameters_to_vector(whole)
            for axis in (self._fsdp, self._copies):
                if axis.size > 1:
                    dist.all_reduce(total, group=axis.group)
            vector_to_parameters(total, whole)
        gradients = [flat(p.grad) for p in self.module.parameters() if p.grad is not None]
        counted = [flat(p.grad) for p in self._counted if p.grad is not None]
        norm = self._world.number(self._clip(gradients, counted, alike=("dp_replicate",)))
        if not skip and math.isfinite(norm):
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def _stepped(self, name: str) -> Stepped:
        return Stepped(self._parameters[name], slice(None))

    def _kept(self, parameter: Any, rank: int) -> tuple[int, int] | None:
        if not isinstance(parameter, DTensor):
            return None
        rows, *rest = parameter.shape
        each, width = -(-rows // self._fsdp.size), math.prod(rest)  # as many rows as the first, while there are some
        return min(rank * each, rows) * width, min((rank + 1) * each, rows) * width

    def _rewritten(self) -> None:
        # Free weights that a forward without backward left gathered: they stand in for the sharded ones until then.
        for unit in self._units:
            unit.reshard()

    def local_tensor(self, name: str) -> Tensor:
        return flat(self._parameters[name])
