"""The DeepSpeed engine: ZeRO stages 0 to 3 around the same model and the same AdamW."""

import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mega_scale.parallel.config import EngineConfig
from mega_scale.parallel.engine import BuildOptimizer, Engine, Stepped
from mega_scale.parallel.shard import WEIGHT, SegmentedLinear, Values, flat
from mega_scale.parallel.world import Axis

_linear = nn.functional.linear
_LARGEST_BUCKET = 500_000_000  # DeepSpeed's own
# Warnings of DeepSpeed about what is meant to be: AdamW is PyTorch's.
_HARMLESS = ("ZeRO with an untested optimizer",)


class _Position(NamedTuple):
    """Where a parameter lies in ZeRO's groups, of which each rank steps a partition."""

    group: int
    first: int  # number of the group where it begins: of a rank's partition in stage 3, else of the whole group
    length: int  # numbers of a rank's partition: of the parameter in stage 3, else of the group


class DeepSpeedEngine(Engine):
    """A model under DeepSpeed ZeRO: 0 replicates all, 1 shards optimizer state, 2 gradients too, 3 weights too.

    To DeepSpeed, ranks along dp_shard and sp are data-parallel, those along tp are model-parallel, and there is one
    copy along dp_replicate. It averages gradients over the first, so the loss is multiplied by their number before its
    backward; gradients of the copies are summed before its step. All that is stepped is fp32.
    """

    _reading: Callable[[], AbstractContextManager[Any]] = nullcontext  # where DeepSpeed itself reads from the device

    def _build(self, values: Values, config: EngineConfig, build_optimizer: BuildOptimizer) -> None:
        model, world = self.module, self._world
        native = config.native_deepspeed(self._fsdp.size)
        # DeepSpeed takes memory for a bucket of 5e8 gradients whatever the model.
        native["zero_optimization"].setdefault("reduce_bucket_size", min(_largest_unit(model), _LARGEST_BUCKET))
        self._deepspeed, self._native = _start_deepspeed(world.device.type), native
        self._spared = ExitStack()
        if world.pretended:
            from mega_scale.parallel.pretended_deepspeed import Zeros, spare

            self._reading, self._spared = Zeros, spare(model)
        # DeepSpeed reads it even where there is no launcher; others take it for a launcher's word, so close removes it,
        # and what is refused before has not set it.
        self._names_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        with world.memory(), self._reading():
            self._materialise(values, config, build_optimizer)

    def _materialise(self, values: Values, config: EngineConfig, build_optimizer: BuildOptimizer) -> None:
        model, world, native, deepspeed = self.module, self._world, self._native, self._deepspeed
        unit = _mesh_unit(self._fsdp, self._tp)
        if self._stage == 3:
            init = partial(
                deepspeed.zero.Init, config_dict_or_path=native, data_parallel_group=self._fsdp.group, mpu=unit
            )
            self._fill(values, partial(self._partition, init))
            if nn.functional.linear is not _linear:
                nn.functional.linear = _linear_of_rows(nn.functional.linear)
        else:
            # A copy of its own: a shard is a view of the whole value.
            self._fill(values, lambda old, value: nn.Parameter(value.to(world.device, copy=True).contiguous()))
        counted = {id(parameter) for parameter in self._counted}
        for parameter in self._parameters.values():
            # In the gradient's norm, DeepSpeed counts other parameters on the first rank of tp only.
            parameter.tensor_model_parallel = id(parameter) in counted
        if config.dtype == "bf16":
            # DeepSpeed turns autocast on in its own forward only; evaluation and generation call the module.
            model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)
        if self._stage == 3 and config.compiles(world.device.type):
            from mega_scale.parallel.compiled_blocks import compiled_kinds

            # Gathered whole, by hooks of the blocks alone: those of modules inside would break a block's graph.
            if kinds := compiled_kinds(model):
                deepspeed.utils.set_z3_leaf_modules(model, kinds)
        if self._stage == 3:
            for module in model.modules():
                if isinstance(module, SegmentedLinear):
                    # It computes by itself with what modules inside own. DeepSpeed sees that only when it finds a
                    # parameter partitioned, and those below its threshold are not, until a step is discarded: its list
                    # of what to fetch, made by then, would lack them.
                    for parameter in module.parameters():
                        deepspeed.zero.register_external_parameter(module, parameter)
        optimizer = self._optimizer_over(build_optimizer)
        _know(type(optimizer))
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=native, mpu=unit, dist_init_required=False
        )
        self._call, self._optimizer = self._engine, self._engine.optimizer
        self._adam = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        for name in self._parameters:
            # What the optimizer steps under each name has to be what the model computes with under it.
            stepped = self._stepped(name)
            numbers = flat(stepped.owner)[stepped.numbers]
            kept = None if self._stage == 3 else self._kept(self._parameters[name], self._fsdp.rank)
            computed = self.local_tensor(name)[slice(*kept) if kept else slice(len(numbers))]
            if world.number((numbers.to(computed.device) != computed).any(), unknown=0.0):
                raise RuntimeError(
                    f"parallel.engine=deepspeed keeps other numbers than the model's for {name}, so that checkpoints "
                    "would be wrong: remove keys of parallel.ds_config.zero_optimization, or use parallel.engine=fsdp"
                )

    def _partition(self, init: Any, old: nn.Parameter, value: Tensor) -> nn.Parameter:
        parameter: Any = nn.Parameter(value.contiguous())
        # Partitions what the module holds in place, so the same parameter then serves in the model.
        init(module=nn.ParameterList([parameter]))
        # Where ranks do not divide a parameter, the last partition ends in memory that DeepSpeed leaves as it found it,
        # and that would go into optimizer and checkpoints.
        partition = parameter.ds_tensor.data
        partition[max(parameter.ds_numel - self._fsdp.rank * partition.numel(), 0) :] = 0
        return parameter

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        with self.row_slice, self._reading():
            self._engine.backward(loss * self._fsdp.size, scale_wrt_gas=False)

    def _step(self, lr: float, skip: bool) -> float:
        with self._reading():
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            if self._copies.size > 1:
                # Of stage 3, which copies require: all gradient partitions lie in one buffer.
                dist.all_reduce(self._optimizer.grad_partitions_flat_buffer, group=self._copies.group)
            if self._stage == 0:
                # Without ZeRO, DeepSpeed has no norm of its own, and would step with any gradient.
                counted = [p.grad for p in self._counted if p.grad is not None]
                gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
                norm = self._world.number(self._clip(gradients, counted, alike=("dp_replicate", "fsdp")))
                if skip or not math.isfinite(norm):
                    self._optimizer.zero_grad(set_to_none=True)
                else:
                    self._engine.step()
                return norm
            if skip:
                return self._discard_step()
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
            return self._world.number(norm) if isinstance(norm, Tensor) else float(norm)

    def _discard_step(self) -> float:
        """Have ZeRO forget the gradients in its own way; returns their true norm, which ZeRO then does not keep.

        ZeRO's optimizers have no call that drops accumulated gradients: `zero_grad` leaves partitions and buckets as
        they are. They do drop them when the norm is infinite, so for one step the function that computes it says so.
        """
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms: list[Tensor] = []
        # What each class asks for the norm, or for those of its groups, just before it decides.
        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        compute = getattr(self._optimizer, name)

        def infinite() -> Any:
            found = compute()
            norms.append(combine_grad_norm_groups(found) if self._stage == 3 else found)
            infinity = torch.full_like(norms[0], math.inf)
            return [infinity] if self._stage == 3 else infinity

        setattr(self._optimizer, name, infinite)
        try:
            self._engine.step()
        finally:
            delattr(self._optimizer, name)
        return self._world.number(norms[0])

    def _stepped(self, name: str) -> Stepped:
        optimizer, rank, parameter = self._optimizer, self._fsdp.rank, self._parameters[name]
        kept, position = self._kept(parameter, rank), self._position(parameter)
        if kept is None or position is None:
            return Stepped(parameter, slice(None))
        start, stop = kept
        if self._stage == 3:
            owner, begin = optimizer.fp32_partitioned_groups_flat[position.group], position.first
        else:
            owner = optimizer.single_partition_of_fp32_groups[position.group]
            begin = start + position.first - rank * position.length
        return Stepped(owner, slice(begin, begin + stop - start))

    def _kept(self, parameter: Any, rank: int) -> tuple[int, int] | None:
        position = self._position(parameter)
        if position is None:
            return None
        if self._stage == 3:  # the last partition ends in padding
            first, numel = rank * position.length, parameter.ds_numel
        else:
            first, numel = rank * position.length - position.first, parameter.numel()
        start, stop = (min(max(number, 0), numel) for number in (first, first + position.length))
        return start, stop

    def _position(self, parameter: Any) -> _Position | None:
        """Where a parameter lies in what is stepped; None where every rank of `fsdp` steps all of it."""
        optimizer = self._optimizer
        if self._stage == 3:
            return _Position(*optimizer.grad_position[optimizer.get_param_id(parameter)])
        if self._stage > 0:
            # It is seen from its memory: DeepSpeed may have ordered the group anew, which its own table does not say.
            memory = parameter.untyped_storage()._cdata  # fake tensors have no addresses
            for group, whole in enumerate(optimizer.bit16_groups_flat):
                if whole.untyped_storage()._cdata == memory:
                    first = parameter.storage_offset() - whole.storage_offset()
                    return _Position(group, first, optimizer.single_partition_of_fp32_groups[group].numel())
        return None

    def loaded(self, step: int) -> None:
        self._engine.global_steps = step
        super().loaded(step)

    def _rewritten(self) -> None:
        optimizer = self._optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            # Gathered weights are dropped, and those that stay gathered are gathered anew.
            optimizer.checkpoint_event_prologue()
            for name, local in self.state().tensors.items():
                # Depending on its settings, DeepSpeed steps a copy of what it gathers.
                partition = self._parameters[name].ds_tensor.data.view(-1)
                partition[: len(local.tensors[WEIGHT])] = local.tensors[WEIGHT]
            optimizer.checkpoint_event_epilogue()

    def local_tensor(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if self._stage < 3:
            return flat(parameter)
        partition = flat(parameter.ds_tensor.data)
        return partition[: max(parameter.ds_numel - self._fsdp.rank * partition.numel(), 0)]

    def held_tensors(self) -> dict[str, list[Tensor]]:
        found = super().held_tensors()
        found["weights"] += [p.ds_tensor.data for p in self._parameters.values() if hasattr(p, "ds_tensor")]
        if self._stage == 3:
            found["gradients"].append(self._optimizer.grad_partitions_flat_buffer)
        return found

    def close(self) -> None:
        self._engine.destroy()
        self._spared.close()
        # zero.Init replaces it for the whole process, and nothing of DeepSpeed puts it back.
        nn.functional.linear = _linear
        if self._names_local_rank:
            os.environ.pop("LOCAL_RANK", None)
            self._names_local_rank = False


def _linear_of_rows(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What ZeRO-3 puts in the place of PyTorch's linear, which keeps parameters for its backward, not rounded copies.

    Of x with other than two dimensions, it would round the product, and then its sum with the bias once more.
    """

    @wraps(linear)  # a compiler asks PyTorch's functions for their names
    def of_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    return of_rows


def _largest_unit(model: Any) -> int:
    """Numbers of the largest block, or of a larger parameter outside: what is worth reducing at once."""
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.base_model.layers]
    return max([*blocks, *(parameter.numel() for parameter in model.parameters())])


def _mesh_unit(partitions: Axis, tp: Axis) -> Any:
    """The mesh as DeepSpeed asks for it, its `mpu`: ranks that partition one copy are data-parallel ones.

    DeepSpeed knows sequence parallelism too, but divides gradients by its size in some ZeRO stages and not in others.
    To it, ranks that share a row are ranks that have different tokens, which they are.
    """
    unit = SimpleNamespace(get_data_parallel_group_ranks=lambda: dist.get_process_group_ranks(partitions.group))
    for name, axis in {"data_parallel": partitions, "model_parallel": tp, "tensor_model_parallel": tp}.items():
        for fact, value in {"group": axis.group, "rank": axis.rank, "world_size": axis.size}.items():
            setattr(unit, f"get_{name}_{fact}", partial(lambda value: value, value))
    return unit


def _start_deepspeed(device: str) -> Any:
    """Import DeepSpeed for a kind of device, cpu or cuda, with warnings and errors only, in our process group."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that PyTorch 2.13 deprecates, and would say so at each of them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    # Its logger is made, and its level set, at import.
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(lambda record: not any(text in record.getMessage() for text in _HARMLESS))
    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != device:
        raise ValueError(
            f"DeepSpeed computes on {chosen}, parallel.device asks for {device}: "
            "unset the environment variable DS_ACCELERATOR, or change parallel.device"
        )
    # A shared-memory all-reduce for inference would be compiled at first start, and need a compiler; training does not
    # call it. DeepSpeed is not asked for its table: that runs compilers, with standard error turned elsewhere.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    _import_muon()
    return deepspeed


def _know(optimizer: type) -> None:
    """Put our optimizer among those that DeepSpeed runs without a warning that it has not tested it."""
    from deepspeed.runtime.zero import utils

    if optimizer not in utils.ZERO_SUPPORTED_OPTIMIZERS:
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which it does to see that our optimizer is another, without having it compiled.

    That imports torch's compiler, a sixth of a rank's start. Who uses that Muon in this process has it as plain Python.
    """
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_
