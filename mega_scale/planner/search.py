"""Which layout to give a run: all that it could have, pruned on paper, and the best of them traced."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Literal, NamedTuple

from mega_scale.config import RunConfig
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.parallel.devices import Device
from mega_scale.parallel.mesh import divisors
from mega_scale.parallel.roofline import collective_seconds
from mega_scale.planner.times import (
    Memory,
    StepTime,
    Terms,
    crowding,
    link_seconds,
    memory_limit,
    memory_of,
    step_time,
)
from mega_scale.planner.trace import Cluster, Trace, follow, parameter_count, prepare, rehearse

RECOMPUTED: tuple[tuple[int, Literal["full", "save_matmuls"]], ...] = (
    (0, "full"),
    (1, "full"),
    (1, "save_matmuls"),
    (2, "full"),
)
"""parallel.activation_checkpoint and its policy, of the layouts that are looked at."""
_MOST_ROWS = 16  # of a micro-batch
_COPIES = 6  # divisors of the data-parallel ranks that are tried as copies
_SEGMENT_CHUNKS = 4


class Candidate(NamedTuple):
    """One layout, what is thought of it on paper, and what its trace says."""

    config: RunConfig
    paper_bytes: float
    paper_seconds: float
    trace: Trace | None = None
    memory: Memory | None = None
    time: StepTime | None = None

    @property
    def keys(self) -> list[str]:
        """What to give to pretrain.py."""
        parallel = self.config.parallel
        names = ("dp_replicate", "sp", "tp", "activation_checkpoint", "activation_checkpoint_policy")
        found = [f"parallel.{name}={getattr(parallel, name)}" for name in names]
        if parallel.activation_checkpoint_segment:
            found.append(f"parallel.activation_checkpoint_segment={parallel.activation_checkpoint_segment}")
        return [*found, "parallel.dp_shard=-1", f"train.micro_batch_size={self.config.train.micro_batch_size}"]


class Paper(NamedTuple):
    """What a token and block takes, from two small traces: at one rank of tp, and at most of them."""

    tp: tuple[int, int]
    gathers: float  # of the stream over tp, which take as long as all that a block sends over it forward and backward
    kept: tuple[float, float]  # bytes for the backward pass
    seconds: tuple[float, float]  # of the device, forward and backward
    kernels: tuple[float, float]  # launches a block
    hidden: tuple[float, float]  # seconds of tp's collectives beside products

    def at(self, values: tuple[float, float], tp: int) -> float:
        """Between what is shared by ranks of tp, and what is not."""
        if self.tp[0] == self.tp[1]:
            return values[0]
        share = (1 / tp - 1 / self.tp[1]) / (1 / self.tp[0] - 1 / self.tp[1])
        return values[1] + (values[0] - values[1]) * share


def layouts(config: RunConfig, model: BaseConfig, cluster: Cluster) -> Iterator[RunConfig]:
    """Layouts that the run would not refuse, with its engine, stage and global batch."""
    size, batch = cluster.size, config.train.global_batch_size
    for tp in divisors(cluster.per_node):
        for sp in divisors(size // tp):
            dp = size // (tp * sp)
            if batch % dp:
                continue
            rows = [rows for rows in divisors(batch // dp) if rows <= _MOST_ROWS]
            copies = [copies for copies in divisors(dp) if copies & (copies - 1) == 0][:_COPIES]
            alike = [(every, policy, 0) for every, policy in RECOMPUTED]
            if sp == 1 and model.attention_chunk:
                alike.append((1, "full", _SEGMENT_CHUNKS * model.attention_chunk))
            sound: dict[int, bool] = {}
            for micro, replicate, (every, policy, segment) in product(rows, copies, alike):
                if segment >= config.data.sequence_length:
                    continue
                parallel = replace(
                    config.parallel, dp_replicate=replicate, dp_shard=-1, sp=sp, tp=tp, activation_checkpoint=every,
                    activation_checkpoint_policy=policy, activation_checkpoint_segment=segment,
                )  # fmt: skip
                found = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro))
                key = segment
                if key not in sound:  # the mesh and the model decide, once for all micro-batches
                    try:
                        found.validate(size, cluster.per_node, here=False)
                        sound[key] = True
                    except ValueError:
                        sound[key] = False
                try:
                    found.engine_config(size).validate(size, cluster.per_node)
                except ValueError:
                    continue
                if sound[key]:
                    yield found


def without_layout(config: RunConfig, cluster: Cluster) -> RunConfig:
    """The run in a layout that a cluster has if it has any: the layout is what is looked for."""
    batch = config.train.global_batch_size
    if config.parallel.tp_overlap:  # which layouts without tp cannot have
        config = replace(config, parallel=replace(config.parallel, tp_overlap=None))
    for inner in divisors(cluster.size):
        if batch % (cluster.size // inner) == 0:
            tp = max(ranks for ranks in divisors(cluster.per_node) if inner % ranks == 0)
            for channels in (1, tp):
                parallel = replace(
                    config.parallel, dp_replicate=1, dp_shard=-1, sp=inner // channels, tp=channels,
                    activation_checkpoint_segment=0,
                )  # fmt: skip
                found = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=1))
                try:
                    found.validate(cluster.size, cluster.per_node, here=False)
                    return found
                except ValueError:
                    continue
    return config


def calibrate(config: RunConfig, model: BaseConfig, cluster: Cluster) -> Paper:
    """Trace two and three blocks on a short row, as one rank alone and as one of most that can share channels."""
    chunk = model.attention_chunk or config.data.sequence_length
    length = min(config.data.sequence_length, chunk)
    most = 1
    for tp in divisors(cluster.per_node):
        parallel = replace(config.parallel, sp=1, tp=tp, dp_replicate=1, dp_shard=1, activation_checkpoint_segment=0)
        try:
            _small(config, parallel, length, tp).validate(tp, tp, here=False)
        except ValueError:
            continue
        most = tp
    found, gathers = [], 0.0
    for tp in (1, most):
        parallel = replace(
            config.parallel, sp=1, tp=tp, dp_replicate=1, dp_shard=1, activation_checkpoint=0,
            activation_checkpoint_segment=0,
        )  # fmt: skip
        own = cluster._replace(nodes=1, per_node=tp)
        small = _small(config, parallel, length, tp)
        two, three = (follow(small, model, own, 0, layers, 1, save=False) for layers in (2, 3))
        sent = [
            sum(taken for _, axis, taken in link_seconds(trace, "first", own.device) if axis == "tp")
            for trace in (two, three)
        ]
        if tp > 1:
            stream = _stream(config, model, tp) * length
            gathers = (sent[1] - sent[0]) / _seconds("allgather", tp, 1, stream, own.device)
        kept = sum(three.kept.values()) - sum(two.kept.values())
        spent, launched, hidden = (
            sum(many["first"].values()) - sum(few["first"].values())
            for many, few in ((getattr(three, name), getattr(two, name)) for name in ("seconds", "kernels", "hidden"))
        )
        found.append((kept / length, spent / length, launched, hidden / length))
        if most == 1:
            found.append(found[0])
            break
    alone, shared = found
    return Paper((1, most), gathers, *zip(alone, shared, strict=True))


def _stream(config: RunConfig, model: BaseConfig, tp: int) -> float:
    """Bytes of a token's share of the stream."""
    return (2 if config.train.dtype == "bf16" else 4) * model.hidden_size / tp


def _small(config: RunConfig, parallel: Any, length: int, tp: int) -> RunConfig:
    train = replace(config.train, micro_batch_size=1, global_batch_size=1)
    data = replace(config.data, sequence_length=length, length_schedule=None)
    return replace(config, parallel=parallel, train=train, data=data)


def estimate(
    config: RunConfig, model: BaseConfig, cluster: Cluster, paper: Paper, parameters: int
) -> tuple[float, float]:
    """Bytes of a rank and seconds of a step, on paper: good enough to leave out most layouts."""
    parallel, mesh, gpu = config.parallel, config.parallel.mesh(cluster.size), cluster.device
    layers, width, tp = model.num_hidden_layers, model.hidden_size, mesh.tp
    tokens = config.train.micro_batch_size * config.data.sequence_length / mesh.sp
    size = 2 if config.train.dtype == "bf16" else 4
    every, policy = parallel.activation_checkpoint, parallel.activation_checkpoint_policy
    whole = paper.at(paper.kept, tp) * tokens
    stream = _stream(config, model, tp) * tokens
    saved = 0.5 if policy == "save_matmuls" else 0.0
    recomputed = 0.0 if every == 0 else (1 - saved) / every
    kept = layers * (whole * (1 - recomputed) + stream * recomputed) + (whole if every else 0)
    own = parameters / tp
    stage = parallel.zero_stage
    states = own * (4 * (1 if stage < 3 else 1 / mesh.fsdp) + 4 * (1 if stage < 2 else 1 / mesh.fsdp) + 8 / mesh.fsdp)
    gathered = 4 * size * own / layers
    head = 4 * tokens * width * size
    total = (states + kept + gathered + head) * (1 + gpu.fragmentation)
    axes = [ranks for ranks in (mesh.dp_replicate, mesh.fsdp, mesh.sp, mesh.tp) if ranks > 1]
    total += gpu.context + gpu.communicator * (len(axes) + 1)

    micro_batches = config.engine_config(cluster.size).accumulation
    again = 1 + recomputed / 3
    device = paper.at(paper.seconds, tp) * tokens * layers * again
    host = paper.at(paper.kernels, tp) * layers * again * gpu.launch
    hosts = max(1, mesh.fsdp * tp // cluster.per_node)
    shard = size * own / layers / mesh.fsdp
    gathers = (2 if stage == 3 else 1) * layers * _seconds("allgather", mesh.fsdp, hosts, shard, gpu)
    reduces = layers * _seconds("reduce_scatter", mesh.fsdp, hosts, 4 * own / layers, gpu)
    across = min(mesh.dp_replicate, cluster.nodes)
    copies = layers * _seconds("allreduce", mesh.dp_replicate, across, 4 * own / layers / mesh.fsdp, gpu)
    exposed = 0.0
    if tp > 1:
        exposed = layers * paper.gathers * _seconds("allgather", tp, 1, stream, gpu)  # recomputed blocks send nothing
        exposed = max(exposed - layers * tokens * paper.at(paper.hidden, tp), 0.0)
    if mesh.sp > 1:
        state = 8 * config.train.micro_batch_size * width * model.ema_projection_size / tp
        exposed += 2 * layers * _seconds("allgather", mesh.sp, max(1, mesh.sp * tp // cluster.per_node), state, gpu)
    seconds, _ = Terms(device, exposed, gathers + reduces, host).together(gpu)
    return total, crowding(cluster) * (micro_batches * seconds + copies)


def _seconds(operation: str, ranks: int, hosts: int, size: float, gpu: Device) -> float:
    return collective_seconds(operation, ranks, min(hosts, ranks), size, gpu)


def search(config: RunConfig, model: BaseConfig, cluster: Cluster, top: int, log: Any = print) -> list[Candidate]:
    """The `top` layouts by their traces, fastest first; those that do not fit last. `config` is of `prepare`.

    Raises ValueError where no layout runs.
    """
    paper, parameters = calibrate(config, model, cluster), parameter_count(model)
    found = [
        Candidate(layout, *estimate(layout, model, cluster, paper, parameters))
        for layout in layouts(config, model, cluster)
    ]
    if not found:
        raise ValueError(
            f"train.global_batch_size={config.train.global_batch_size} has no layout on {cluster.size} ranks: choose a "
            "multiple of the data-parallel ranks, or fewer hosts"
        )
    # On paper, a layout may be a fifth too large and still fit.
    fitting = [one for one in found if one.paper_bytes <= 1.1 * memory_limit(cluster)]
    log(f"{len(found):,} layouts, of which {len(fitting):,} fit on paper")
    chosen = sorted(fitting or found, key=lambda one: (one.paper_seconds, one.paper_bytes))[:top]
    traced = []
    for one in chosen:
        planned, model = prepare(one.config, cluster)
        trace = rehearse(planned, model, cluster, 0, micro_batches=1, save=False)
        memory, time = memory_of(trace, planned, cluster), step_time(trace, planned, model, cluster)
        traced.append(one._replace(trace=trace, memory=memory, time=time))
    return sorted(traced, key=lambda one: (not (one.memory and one.memory.fits), one.time.seconds if one.time else 0.0))
