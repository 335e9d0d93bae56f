"""What both engines share: the forward pass, gradient norm and clipping, and the state that checkpoints read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mega_scale.model import MegaPreTrainedModel
from mega_scale.parallel.config import EngineConfig
from mega_scale.parallel.sequence_parallel import START, Place, RowSlice
from mega_scale.parallel.shard import (
    MOMENTS,
    EngineState,
    LocalTensor,
    Placer,
    Sharding,
    Values,
    fill,
    persistent_buffers,
    shardings,
    untied,
)
from mega_scale.parallel.world import Axis, World

BuildOptimizer = Callable[[nn.Module], Optimizer]
"""Makes AdamW over the parameters of a model that an engine has sharded."""


class ModelParallelism(NamedTuple):
    """What engines need to know of a model to which model parallelism was applied."""

    template: nn.Module  # the model as it was, on the meta device
    row_slice: RowSlice  # tells the model which part of the global batch it computes
    tp: Axis  # the ranks that share every layer


class Range(NamedTuple):
    """Where an engine keeps the numbers of a parameter that this rank's optimizer steps."""

    shape: Sequence[int]  # of this rank's tensor along `tp`, padding included
    start: int  # first number, in that tensor flattened
    tensors: dict[str, Tensor]  # see `LocalTensor`; may end in padding
    copied: bool  # whether all ranks of `fsdp` have the same range


class Engine(ABC):
    """A sharded model with its optimizer; every method is collective unless it says otherwise.

    Args:
        model: `MegaForCausalLM` on the meta device, with model parallelism applied; becomes `module`.
        parallelism: how it was applied.
        config: number format, clipping and so on.
        world: ranks and device.

    Attributes:
        module: the model; call it on all ranks alike for evaluation and generation, under `no_grad`.
        row_slice: inside a `with` statement of it, the model computes this rank's part of the rows last taken.
    """

    module: MegaPreTrainedModel

    def __init__(
        self, model: MegaPreTrainedModel, parallelism: ModelParallelism, config: EngineConfig, world: World
    ) -> None:
        self.module = model
        self.row_slice = parallelism.row_slice
        self._parallelism, self._world = parallelism, world
        self._max_grad_norm = config.max_grad_norm
        self._parameters: dict[str, Any] = {}
        self._counted: list[Any] = []
        self._call: Callable[..., Any] = model

    def _fill(self, values: Values, place: Placer) -> None:
        tp = self._parallelism.tp
        fill(self.module, values, place, self._world.device, template=self._parallelism.template, tp=tp)
        self._parameters = dict(self.module.named_parameters())
        table = shardings(self.module)
        # What every rank of tp holds counts once in the gradient's norm, on the first.
        self._counted = [p for name, p in self._parameters.items() if tp.rank == 0 or table[name].dim is not None]

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        num_items: int,
        place: Place = START,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Loss of one micro-batch of this rank: the sum over its tokens divided by `num_items`.

        Args:
            input_ids: (B, L) int64, whole rows; ranks that share them are given the same.
            shift_labels: (B, L) int64, the next tokens, -100 where there is none.
            num_items: labelled tokens of the global batch, over all ranks and micro-batches.
            place: of the micro-batch in the run, on which dropout depends.
            document_starts: (B, L) bool, true at the first token of every document that shares a row with others;
                given to all ranks or to none.

        Returns:
            Scalar fp32, nats. The loss of the global batch is the sum over micro-batches and over ranks, of which those
            along `tp` hold the same.
        """
        inputs, labels = self.row_slice.take(place, input_ids, shift_labels)
        starts = None if document_starts is None else self.row_slice.split(document_starts, False)
        with self.row_slice:
            loss: Tensor = self._call(
                input_ids=inputs,
                shift_labels=labels,
                num_items_in_batch=num_items,
                document_starts=starts,
                use_cache=False,
                skip_logits=True,
            ).loss
        return loss

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of the loss of all ranks.

        Args:
            loss: what `forward` returned.
            last: whether this is the last micro-batch of the step.
        """

    @abstractmethod
    def step(self, lr: float, skip: bool = False) -> float:
        """Clip the gradients, take one AdamW step, and forget the gradients.

        Where the norm is not finite, on all ranks alike, none of them takes the step: the gradients are forgotten, and
        weights, moments and counts of steps stay as they are, to the bit.

        Args:
            lr: learning rate of this step, absolute.
            skip: do not take the step, whatever the norm; the same on all ranks.

        Returns:
            L2 norm of the whole gradient before clipping; inf or NaN where it is not finite.
        """

    def _norm(self, counted: Sequence[Tensor], alike: Sequence[str]) -> Tensor:
        """L2 norm of the whole gradient from this rank's part, of which ranks along `alike` hold copies."""
        norms = torch._foreach_norm(list(counted)) if counted else []
        own = torch.stack(list(norms)).square().sum() if norms else torch.zeros((), device=self._world.device)
        return self._world.sum(own, alike=alike).sqrt()

    def _clip(self, gradients: Sequence[Tensor], norm: Tensor) -> None:
        if self._max_grad_norm > 0:
            torch._foreach_mul_(list(gradients), (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))

    def state(self) -> EngineState:
        """Model and optimizer as this rank holds them, between two steps; not collective.

        Returns:
            Views of the engine's memory: read them to save, write into them to load, and then call `loaded`.
        """
        steps = self._optimizer_steps()
        table, ties = untied(self.module)
        tp = self._world.axis("tp")
        tensors = {name: self._local(name, sharding) for name, sharding in table.items()}
        return EngineState(table, ties, tp.size, tp.rank, tensors, steps, persistent_buffers(self.module))

    def _local(self, name: str, sharding: Sharding) -> LocalTensor:
        found, tp = self._range(name), self._world.axis("tp")
        shape = sharding.whole_shape(found.shape, tp.size)
        shard = sharding.shard(shape, tp.rank, tp.size)
        count = max(shard.numel - found.start, 0)
        copies, copy = 1, 0
        alike = [self._world.axis("dp_replicate")]
        alike += [tp] * (sharding.dim is None) + [self._world.axis("fsdp")] * found.copied
        for axis in alike:
            copies, copy = copies * axis.size, copy * axis.size + axis.rank
        tensors = {kind: tensor[:count] for kind, tensor in found.tensors.items()}
        return LocalTensor(shape, shard, found.start, tensors, copies, copy)

    @abstractmethod
    def _optimizer_steps(self) -> list[Tensor]:
        """AdamW's counters of steps; its moments exist from here on, before the first step too."""

    @abstractmethod
    def _range(self, name: str) -> Range: ...

    @abstractmethod
    def loaded(self, step: int) -> None:
        """Have whatever depends on the state follow after it was written; settings stay this run's.

        Args:
            step: optimizer steps of the run before.
        """

    @abstractmethod
    def local_tensor(self, name: str) -> Tensor:
        """What this rank keeps of a parameter of `module` between steps, flat; not collective."""

    @abstractmethod
    def local_shard(self, name: str, value: Tensor) -> Tensor:
        """What `local_tensor` would be if the parameter had a value, given whole or as this rank's shard along `tp`."""

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds; needs no other rank, and may be called after an error or twice."""


def ensure_moments(optimizer: Optimizer, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Have AdamW keep state for some of its tensors even before its first step, as the first step would make it.

    Returns:
        Its counters of steps.
    """
    on_device = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
    steps = []
    for tensor in tensors:
        if not optimizer.state[tensor]:
            device = tensor.device if on_device else torch.device("cpu")
            state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=device)}
            state |= {name: torch.zeros_like(tensor, requires_grad=False) for name in MOMENTS}
            optimizer.state[tensor] = state
        step = optimizer.state[tensor]["step"]
        steps.append(step.to_local() if isinstance(step, DTensor) else step)
    return steps


def flat(tensor: Tensor) -> Tensor:
    """This rank's numbers of a tensor, as a 1-D view."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().view(-1)
