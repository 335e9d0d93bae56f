"""Seconds of a step and bytes of a rank from its trace, by the figures of a device and its links."""

from collections.abc import Iterator
from typing import NamedTuple

from mega_scale.config import RunConfig
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.parallel.devices import Device
from mega_scale.parallel.roofline import collective_seconds
from mega_scale.planner.trace import PARTS, Cluster, Trace
from mega_scale.training.metrics import training_flops_per_token

_EXPOSED = ("tp", "sp")  # axes whose collectives stand between two products


class Memory(NamedTuple):
    """Bytes of one rank on its device."""

    peak: float  # of live tensors
    slack: float  # what the allocator keeps beside them
    outside: float  # of which PyTorch does not know
    communicators: int
    limit: float

    @property
    def total(self) -> float:
        return self.peak + self.slack + self.outside

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


class StepTime(NamedTuple):
    """Seconds of an optimizer step, and of its terms."""

    kernels: float
    exposed: float
    network: float
    host: float
    seconds: float
    bound: str
    launches: float
    flops: float  # of this rank
    mfu: float


def memory_of(trace: Trace, config: RunConfig, cluster: Cluster) -> Memory:
    """What a rank takes of its device, or of its share of a host's memory."""
    peak = max(trace.peak, trace.evaluation)
    device, size, mesh = cluster.device, cluster.size, config.parallel.mesh(cluster.size)
    axes = [mesh.dp_replicate, mesh.fsdp, mesh.sp, mesh.tp]
    communicators = sum(ranks > 1 for ranks in axes) + (size > 1 and size not in axes)
    outside = device.context + communicators * device.communicator + trace.workspace
    return Memory(peak, peak * device.fragmentation, outside, communicators, memory_limit(cluster))


def memory_limit(cluster: Cluster) -> float:
    """Bytes that a rank may take: of its device, or its share of a host's memory."""
    return cluster.device.capacity / (cluster.per_node if cluster.device.cores else 1)


class Terms(NamedTuple):
    """Seconds of a part of a step: the device's kernels, collectives that it waits for, those beside it, the host's."""

    kernels: float
    exposed: float
    network: float
    host: float

    def together(self, device: Device) -> tuple[float, str]:
        """Seconds of all, and which of them bounds it: a GPU, its host and its links work beside each other; a core
        does one after the other."""
        if device.cores:
            names = {"exposed": "exposed collectives", "network": "sharding"}
            bound = max(self._fields, key=lambda name: getattr(self, name))
            return sum(self), names.get(bound, bound)
        found = {"kernels": self.kernels + self.exposed, "host": self.host, "sharding": self.network}
        bound = max(found, key=lambda name: found[name])
        return found[bound], "exposed collectives" if bound == "kernels" and self.exposed > self.kernels else bound


def crowding(cluster: Cluster) -> float:
    """How many ranks take turns on a core; one where each has a device of its own."""
    return max(1.0, cluster.per_node / (cluster.device.cores or cluster.per_node))


def step_time(trace: Trace, config: RunConfig, model: BaseConfig, cluster: Cluster) -> StepTime:
    """A step of all micro-batches."""
    micro_batches = config.engine_config(cluster.size).accumulation
    total = dict.fromkeys(Terms._fields, 0.0)
    bounds: dict[str, float] = {}
    launches = flops = seconds = 0.0
    for part, times in zip(PARTS, (1, micro_batches - 1, 1), strict=True):
        terms = _terms(trace, part, cluster)
        taken, bound = terms.together(cluster.device)
        bounds[bound] = bounds.get(bound, 0.0) + times * taken
        seconds += times * taken
        for name, value in terms._asdict().items():
            total[name] += times * value
        launches += times * sum(trace.kernels.get(part, {}).values())
        flops += times * sum(trace.flops.get(part, {}).values())
    length = config.data.sequence_length
    useful = config.train.global_batch_size * length * training_flops_per_token(model, length)
    peak = cluster.size / crowding(cluster) * cluster.device.products
    mfu = useful / (seconds * peak) if seconds else 0.0
    bound = max(bounds, key=lambda name: bounds[name])
    return StepTime(**total, seconds=seconds, bound=bound, launches=launches, flops=flops, mfu=mfu)


def link_seconds(trace: Trace, part: str, device: Device) -> Iterator[tuple[str, str, float]]:
    """Each kind of collective of a part of a step, as `Trace` names it; its axis; seconds of all of it."""
    for key, calls in trace.calls.get(part, {}).items():
        _, operation, axis, ranks, hosts = key.split()
        yield key, axis, collective_seconds(operation, int(ranks), int(hosts), trace.sent[part][key], device, calls)


def _terms(trace: Trace, part: str, cluster: Cluster) -> Terms:
    device, turns = cluster.device, crowding(cluster)
    links = {True: 0.0, False: 0.0}
    hidden = trace.hidden.get(part, {})
    for key, axis, taken in link_seconds(trace, part, device):
        links[axis in _EXPOSED] += taken - hidden.get(key, 0.0)
    kernels = sum(trace.seconds.get(part, {}).values())
    host = sum(trace.kernels.get(part, {}).values()) * device.launch
    return Terms(*(turns * each for each in (kernels, links[True], links[False], host)))
