"""One rank of a run, followed through two steps, an evaluation and a save on tensors without memory.

Two depths give any other: beyond a model's first and last blocks, whatever is counted is linear in their number.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mega_scale.checkpoint.folder import find_checkpoint, read_key
from mega_scale.checkpoint.run_folder import resume_path
from mega_scale.checkpoint.saver import build_index, rank_tensors
from mega_scale.config import RunConfig, model_config, require_same
from mega_scale.data.tokenizer import load_tokenizer
from mega_scale.model import causal_lm_class
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.ops import as_if
from mega_scale.parallel import Engine, World, seeded_values
from mega_scale.parallel.devices import Device
from mega_scale.parallel.meter import Event, Meter
from mega_scale.parallel.roofline import collective_seconds, fused, hidden_seconds, seconds
from mega_scale.training.config import Schedule
from mega_scale.training.trained_model import evaluate
from mega_scale.training.trainer import build_engine, take_step

ENGINE = "engine"
"""Kind of what an engine makes for itself while it is built, and keeps: buckets, and buffers of the model."""
PARTS = ("first", "micro-batch", "optimizer")
"""Parts of a step: its first micro-batch, each further one, and what follows the last."""


class Cluster(NamedTuple):
    """Where a run is to be: hosts, ranks of each, and what device they have."""

    nodes: int
    per_node: int
    device: Device
    compiled: bool = False  # whether arithmetic between products is counted as a compiler fuses it

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    def pretended(self) -> AbstractContextManager[None]:
        """Have what lies nowhere lie on its devices."""
        return as_if(self.device.kind, self.device.capability, self.device.multiprocessors)


@dataclass
class Trace:
    """What one rank does in a step, and holds; every number is linear in the number of blocks.

    Attributes:
        peak: bytes at most at one time, in the second step.
        held: of them, by kind (weights, moments, gradients, engine, activations, gathered, temporary, recomputed).
        kept: bytes that the last forward pass leaves for its backward pass, by module.
        at_peak: bytes of activations at the peak by module.
        calls, sent: by part of the step, and "phase operation axis ranks hosts", how many collectives there are, and
            the bytes that this rank puts into them.
        kernels, flops, seconds: by part and phase.
        hidden: by the same, seconds of collectives that pass while products beside them are computed.
        workspace: bytes of symmetric memory, beside all tensors.
        evaluation: peak of an evaluation, bytes.
        written, pinned, index: bytes that this rank writes into a checkpoint, holds pinned on the host for it, and the
            index that the first rank writes.
        places, kinds_at: the same peak by where it is: in a phase, a module and the first or last block.
        timeline: (what the rank does, bytes) at moments of the second step; not extrapolated.
    """

    peak: float = 0.0
    held: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    at_peak: dict[str, float] = field(default_factory=dict)
    calls: dict[str, dict[str, float]] = field(default_factory=dict)
    sent: dict[str, dict[str, float]] = field(default_factory=dict)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)
    flops: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    hidden: dict[str, dict[str, float]] = field(default_factory=dict)
    workspace: float = 0.0
    evaluation: float = 0.0
    written: float = 0.0
    pinned: float = 0.0
    index: float = 0.0
    place: str = ""
    places: dict[str, float] = field(default_factory=dict)
    kinds_at: dict[str, dict[str, float]] = field(default_factory=dict)
    timeline: list[tuple[str, int]] = field(default_factory=list)


class _Watch(Meter):
    """A meter that knows how memory went, and how high it was where: in each phase of each module of a block.

    Where the peak of a whole model is may differ from where that of a few blocks is; in one place it is linear.
    """

    def __init__(self, model: Any, blocks: int) -> None:
        super().__init__(model)
        self._blocks = blocks
        self._kinds: Counter[str] = Counter()
        self.places: dict[str, int] = {}
        self.kinds_at: dict[str, dict[str, int]] = {}
        self.place = ""
        self.timeline: list[tuple[str, int]] = []

    def restart(self) -> None:
        super().restart()
        self.places, self.kinds_at, self.timeline = {}, {}, []

    def _add(self, known: Any, size: int) -> None:
        highest = self.peak
        super()._add(known, size)
        self._kinds[known.kind] += size
        if size <= 0:
            return
        place = f"{self.phase} {_block(known.module, self._blocks)}".strip()
        if self.total > self.places.get(place, 0):
            self.places[place], self.kinds_at[place] = self.total, dict(self._kinds)
        if self.peak > highest:
            self.place = place

    def _metered(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = super()._metered(func, types, args, kwargs)
        if not self.timeline or self.timeline[-1][1] != self.total:
            self.timeline.append((self.phase, self.total))
        return result


# What the run would refuse


def prepare(config: RunConfig, cluster: Cluster) -> tuple[RunConfig, BaseConfig]:
    """Refuse what the run would refuse on a cluster, with its line (ValueError); the run to follow, and its model.

    Neither the folders nor the devices of this machine matter. A tokenizer that cannot be read here may be left out
    where `model.vocab_size` says how large its vocabulary is.
    """
    parallel = config.parallel
    if cluster.device.kind == "cuda":
        if parallel.device == "cpu":
            raise ValueError(
                "parallel.device='cpu' is not possible: GPUs are planned, choose auto or cuda, or --gpu cpu"
            )
        parallel = replace(parallel, device="auto")
    elif parallel.device == "cuda":
        raise ValueError("parallel.device='cuda' is not possible: CPUs are planned, choose auto or cpu")
    # Compiled arithmetic takes the same memory or less, and cannot be followed on tensors without memory.
    planned = replace(config, parallel=parallel, train=replace(config.train, compile=False))
    with cluster.pretended() if parallel.tp_overlap else nullcontext():
        planned.validate(cluster.size, cluster.per_node, here=False)
    tokenizer = None
    if planned.model.vocab_size is None or planned.data.tokenizer == "byte" or os.path.isdir(planned.data.tokenizer):
        try:
            tokenizer = load_tokenizer(planned.data.tokenizer)
        except ValueError as error:
            if planned.model.vocab_size is None:
                raise ValueError(f"{error}; a plan needs the tokenizer, or model.vocab_size") from None
    model = model_config(planned.model, tokenizer)
    origin = resume_path(planned.folder, planned.resume)
    if tokenizer is not None and (origin is not None or planned.init_from is not None):
        found = None if origin is None else find_checkpoint(origin, read_key(planned.checkpoint.key_file))[0]
        require_same(planned, found, model, tokenizer)
    return planned, model


# The steps


def follow(
    config: RunConfig,
    model: BaseConfig,
    cluster: Cluster,
    rank: int,
    layers: int | None = None,
    micro_batches: int = 2,
    *,
    save: bool = True,
) -> Trace:
    """Follow one rank of what `prepare` returned, with `layers` blocks, and so many micro-batches of a step at most.

    With none, only Muon's step is followed, under FSDP2. Without `save`, no checkpoint is. Raises what the run
    would raise.
    """
    if layers is not None:
        model = type(model)(**{**model.to_dict(), "num_hidden_layers": layers})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        cluster.pretended(),
        World.pretend(rank, cluster.size, config.parallel, cluster.per_node) as world,
    ):
        return follow_in(world, config, model, cluster, mode, micro_batches, save=save)


def follow_in(
    world: World,
    config: RunConfig,
    model: BaseConfig,
    cluster: Cluster,
    mode: AbstractContextManager[Any] | None = None,
    micro_batches: int = 2,
    *,
    save: bool = True,
) -> Trace:
    """Follow this rank of a world, on the fake tensors of a `mode`, or else on real ones; collective."""
    inside = nullcontext() if mode is None else mode
    module = _on_meta(model)
    watches: list[_Watch] = []

    @contextmanager
    def memory() -> Iterator[None]:
        if not watches:  # the model's modules are now those that compute
            watches.append(_Watch(module, model.num_hidden_layers))
        with inside, watches[0], watches[0].during(ENGINE):
            yield

    world = replace(world, memory=memory)
    values = _empty if mode is not None else seeded_values(model, config.train.seed)
    engine = build_engine(module, values, config, world)
    try:
        with inside, watches[0]:
            followed = _Followed(config, engine, world, cluster, watches[0])
            return followed.trace(micro_batches, save) if micro_batches else followed.step_alone()
    finally:
        engine.close()


class _Batches(Sequence[dict[str, Tensor]]):
    """Micro-batches of a rank, each made when its turn comes, as one is copied to a device.

    Rows of several documents have them begin everywhere, so that each chunk has a mask, for which a CPU pays by chunk;
    kernels of GPUs take the same memory whatever documents there are.
    """

    def __init__(self, count: int, config: RunConfig) -> None:
        self._count, self._shape = count, (config.train.micro_batch_size, config.data.sequence_length)
        self._documents = config.data.packing == "reset"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._count:
            raise IndexError
        found = {name: torch.zeros(self._shape, dtype=torch.int64) for name in ("input_ids", "shift_labels")}
        return found | ({"document_starts": torch.ones(self._shape, dtype=torch.bool)} if self._documents else {})


class _Followed:
    """An engine whose steps are metered: to a step, it is the engine."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        world: World,
        cluster: Cluster,
        watch: _Watch,
    ) -> None:
        self._config, self._engine, self._world, self._watch = config, engine, world, watch
        self._cluster = cluster
        self._accumulation = config.engine_config(world.size).accumulation
        self._marks: list[tuple[int, int]] = []
        self._kept: Counter[str] = Counter()  # by module, what the last forward pass left

    def trace(self, micro_batches: int, save: bool) -> Trace:
        """Follow a step that makes all that is made once, then one that is counted, an evaluation, and a `save`."""
        found, watch = Trace(), self._watch
        self._label()
        # A later step finds what the first one left, such as moments and buckets.
        self._take_step(0, 1)
        self._label()
        watch.restart()
        self._marks.clear()
        self._take_step(1, min(self._accumulation, micro_batches))
        found.kept = dict(self._kept)
        self._count(found, self._marks)
        found.peak, found.place, found.timeline = watch.peak, watch.place, watch.timeline
        held: Counter[str] = Counter()
        at_peak: Counter[str] = Counter()
        for (kind, name), size in watch.at_peak.items():
            held[kind] += size
            if kind not in ("weights", "moments", "gradients", ENGINE):
                at_peak[f"{kind} {_block(name)}".strip()] += size
        found.held, found.at_peak = dict(held), dict(at_peak)
        watch.restart()
        self._evaluate()
        found.evaluation = watch.peak
        if save:
            self._save(found)
        return found

    def step_alone(self) -> Trace:
        """Follow Muon's step alone, on gradients such as FSDP2's backward pass leaves; moments are there before."""
        found = Trace()
        for parameter in self._engine.module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self._label()
        self._watch.restart()
        self.step(Schedule(self._config).lr(1), skip=False)
        self._count(found, [(0, 0)])
        return found

    def _take_step(self, step: int, micro_batches: int) -> None:
        labelled = micro_batches * self._config.train.micro_batch_size * self._config.data.sequence_length
        engine, batches, lr = cast(Engine, self), _Batches(micro_batches, self._config), Schedule(self._config).lr(step)
        readers = self._world.shape.dp, self._world.shape.dp_rank(self._world.rank)
        take_step(engine, self._world, readers, batches, labelled, step, lr)

    def forward(self, *args: Any) -> Tensor:
        """As of the engine, and note what it leaves."""
        loss = self._engine.forward(*args)
        self._kept.clear()
        for (kind, name), size in self._watch.live.items():
            if kind == "activations" and size:
                self._kept[_block(name)] += size
        return loss

    def backward(self, loss: Tensor, last: bool) -> None:
        """As of the engine, at the end of a micro-batch."""
        self._engine.backward(loss, last)
        self._label()
        self._marks.append((len(self._watch.events), len(self._watch.sent)))

    def step(self, lr: float, skip: bool) -> float:
        """As of the engine."""
        with self._watch.during("optimizer"):
            return self._engine.step(lr, skip)

    def _evaluate(self) -> None:
        engine = self._engine
        for averaged in (False, True) if engine.averages else (False,):
            with engine.averaged() if averaged else nullcontext():
                evaluate(engine.module, engine.forward, _Batches(1, self._config), 1.0, self._world)

    def _save(self, found: Trace) -> None:
        """What a checkpoint takes of this rank, and its index, in which all ranks' ranges lie as evenly as its own."""
        state = self._engine.state()
        tensors, ranges = rank_tensors(state, self._world.rank)
        found.written = sum(tensor.nbytes for tensor in tensors.values())
        asynchronous = self._config.checkpoint.asynchronous
        found.pinned = found.written if asynchronous and self._cluster.device.kind == "cuda" else 0
        if self._world.rank == 0:
            next_file = {name: (tp_rank, stop, 2 * stop - start) for name, (tp_rank, start, stop) in ranges.items()}
            # How many steps were done cannot be read.
            found.index = len(json.dumps(build_index(state._replace(steps=[], averaged=None), [ranges, next_file])))

    def _label(self) -> None:
        for kind, tensors in self._engine.held_tensors().items():
            self._watch.label(_in_memory(tensors), kind)

    def _count(self, found: Trace, marks: list[tuple[int, int]]) -> None:
        """Note the highest places, and sort operators and collectives into the parts of a step."""
        watch, axes = self._watch, _Axes(self._world, self._cluster)
        found.places = dict(watch.places)
        found.kinds_at = {place: dict(kinds) for place, kinds in watch.kinds_at.items()}
        ends = [*marks, (len(watch.events), len(watch.sent))]
        begin = (0, 0)
        for part, end in zip(("first", *(["micro-batch"] * (len(marks) - 1)), "optimizer"), ends, strict=True):
            events, sent = watch.events[begin[0] : end[0]], watch.sent[begin[1] : end[1]]
            begin = end
            if self._cluster.compiled:
                events = fused(events)
            phases: dict[str, list[Event]] = {}
            for event in events:
                phases.setdefault(event.phase, []).append(event)
            found.kernels[part] = {phase: sum(e.kernels for e in some) for phase, some in phases.items()}
            found.flops[part] = {phase: sum(e.flops for e in some) for phase, some in phases.items()}
            device = self._cluster.device
            found.seconds[part] = {phase: sum(seconds(e, device) for e in some) for phase, some in phases.items()}
            calls: Counter[str] = Counter()
            put: Counter[str] = Counter()
            hidden: dict[str, float] = {}
            for call in sent:
                key = f"{call.phase} {call.operation} {axes.of(call.group)}"
                calls[key] += 1
                put[key] += call.bytes
                if call.beside is not None:
                    ranks, hosts = map(int, key.split()[-2:])
                    taken = collective_seconds(call.operation, ranks, hosts, call.bytes, device)
                    hidden[key] = hidden.get(key, 0.0) + hidden_seconds(call.beside, taken, ranks, device)
                    # What a rank puts in to be read by others; of what it puts in to be summed, two parts at a time.
                    parts = call.bytes if "allgather" in call.operation else 2 * call.bytes / ranks
                    found.workspace = max(found.workspace, parts)
            found.calls[part], found.sent[part], found.hidden[part] = dict(calls), dict(put), hidden
        if len(marks) == 1:  # every micro-batch is as the first
            for table in (found.kernels, found.flops, found.seconds, found.calls, found.sent, found.hidden):
                table["micro-batch"] = dict(table.get("first", {}))


class _Axes:
    """Which axis of the mesh a group is, how many ranks it has, and whether they share a host."""

    def __init__(self, world: World, cluster: Cluster) -> None:
        self._known: dict[str, str] = {}
        self._cluster = cluster
        for name, axis in world.axes.items():
            if axis.group is not None:
                self._known.setdefault(axis.group.group_name, self._describe(name, axis.group))
        self._world = self._describe("world", dist.group.WORLD)

    def _describe(self, name: str, group: Any) -> str:
        ranks = dist.get_process_group_ranks(group)
        hosts = {rank // self._cluster.per_node for rank in ranks}
        # Ranks of a host beside each other share its links to the network.
        return f"{name} {len(ranks)} {len(hosts)}"

    def of(self, group: str) -> str:
        """The axis of a group's name, its ranks and its hosts."""
        return self._known.get(group, self._world)


def _empty(name: str, owner: nn.Module, local_name: str) -> Tensor:
    """Values of a parameter or buffer, which nobody reads."""
    tensor: Any = getattr(owner, local_name)
    return torch.empty(tensor.shape, device="cpu")


def _in_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if not tensor.is_meta]


def _on_meta(model: BaseConfig) -> Any:
    with torch.device("meta"):
        return causal_lm_class(model)(model)


def parameter_count(model: BaseConfig) -> int:
    """Numbers of a model, tied ones once."""
    return sum(parameter.numel() for parameter in _on_meta(model).parameters())


def _block(name: str, blocks: int | None = None) -> str:
    """The name of a module, whichever block it is in; or, of so many blocks, whether it is in the first or the last."""

    def called(number: int) -> str:
        if blocks is None:
            return "*"
        return "first" if number == 0 else "last" if number == blocks - 1 else "middle"

    return ".".join(called(int(part)) if part.isdigit() else part for part in name.split("."))


# Other depths


def depths(model: BaseConfig, config: RunConfig) -> tuple[int, int] | None:
    """Two numbers of blocks whose traces give any larger one; None where all blocks are to be followed.

    DeepSpeed fills buckets, and keeps weights gathered, up to sizes that have nothing to do with a block's.
    """
    every = max(config.parallel.activation_checkpoint, 1)
    # With three there is a block between the first and the last, and what is fetched ahead has begun.
    small, large = 3 * every, 4 * every
    return None if config.parallel.engine == "deepspeed" or model.num_hidden_layers <= large else (small, large)


def extrapolate(small: Trace, large: Trace, counts: tuple[int, int], layers: int, step: Trace | None = None) -> Trace:
    """A trace of `layers` blocks from traces of two numbers of them, and of the optimizer's step where it is given."""
    share = (layers - counts[0]) / (counts[1] - counts[0])

    def at(a: Any, b: Any) -> Any:
        if isinstance(b, Mapping) or isinstance(a, Mapping):
            a, b = a or {}, b or {}
            return {key: at(a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b])}
        a, b = a or 0, b or 0
        return a + (b - a) * share

    first, second = asdict(small), asdict(large)
    plain = ("place", "timeline")
    # A place that only one of the two knows has no line.
    for name in ("places", "kinds_at"):
        first[name] = {place: value for place, value in first[name].items() if place in second[name]}
        second[name] = {place: value for place, value in second[name].items() if place in first[name]}
    found = Trace(**{name: at(first[name], second[name]) for name in first if name not in plain})
    if step is not None:
        for name in ("calls", "sent", "kernels", "flops", "seconds"):
            tables, own = getattr(found, name), getattr(step, name)
            tables["optimizer"] = _with_step(tables["optimizer"], own["optimizer"])
        # Beside its work space, the same lies in memory throughout the step, and all of it is linear.
        kinds = found.kinds_at["optimizer"]
        kinds["optimizer"] = step.kinds_at["optimizer"]["optimizer"]
        found.places["optimizer"] = sum(kinds.values())
    found.place = max(found.places, key=lambda place: found.places[place])
    found.peak, found.held = found.places[found.place], found.kinds_at[found.place]
    if {small.place, large.place} != {found.place}:
        found.at_peak = {}  # which is known where the peak of few blocks is
    found.timeline = large.timeline
    return found


def _with_step(table: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """A table whose keys begin with a phase, with the optimizer's from another."""
    stepped = {key for key in (*table, *step) if key.split()[0] == "optimizer"}
    return {key: value for key, value in table.items() if key not in stepped} | {
        key: value for key, value in step.items() if key in stepped
    }


def rehearse(
    config: RunConfig,
    model: BaseConfig,
    cluster: Cluster,
    rank: int,
    *,
    full: bool = False,
    micro_batches: int = 2,
    save: bool = True,
) -> Trace:
    """The trace of one rank, from two small depths unless the model is to be followed in `full`; as by `follow`."""
    counts = None if full else depths(model, config)
    if counts is None:
        return follow(config, model, cluster, rank, None, micro_batches, save=save)
    small, large = (follow(config, model, cluster, rank, count, micro_batches, save=save) for count in counts)
    # Of Muon's, a rank's share is not linear: ranks compute matrices in turns.
    step = follow(config, model, cluster, rank, None, 0) if config.optimizer.name == "muon" else None
    return extrapolate(small, large, counts, model.num_hidden_layers, step)
