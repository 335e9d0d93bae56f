"""Seconds of a step and bytes of a rank from its trace, by the figures of a GPU and its links."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from mega_scale.config import RunConfig
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.parallel.roofline import Gpu
from mega_scale.planner.trace import PARTS, Cluster, Trace
from mega_scale.training.metrics import training_flops_per_token

_EXPOSED = ("tp", "sp")  # axes whose collectives stand between two products
_FILE = Path(__file__).with_name("links.yaml")


@dataclass(frozen=True)
class Figures:
    """All that a plan assumes: a GPU, and what `links.yaml` has beside it."""

    gpu: Gpu
    link_latency: float
    network_latency: float
    context: float
    communicator: float
    fragmentation: float

    @classmethod
    def named(cls, name: str, overrides: Mapping[str, float] | None = None) -> "Figures":
        """Those of a GPU of `gpus.yaml`, some of them overridden. Raises ValueError for unknown names."""
        own: dict[str, float] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
        others = {}
        for key, value in (overrides or {}).items():
            if key not in own:
                others[key] = value
            elif value < 0:
                raise ValueError(f"--set {key}={value:g} is not possible: give 0 or more")
            else:
                own[key] = value
        return cls(Gpu.named(name, **others), **{key: float(value) for key, value in own.items()})

    def table(self) -> dict[str, object]:
        """Every figure by name."""
        return {**self.gpu.figures(), **{key: value for key, value in asdict(self).items() if key != "gpu"}}


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


def memory_of(trace: Trace, figures: Figures, config: RunConfig, size: int) -> Memory:
    """What a rank of `size` takes of its device."""
    peak = max(trace.peak, trace.evaluation)
    mesh = config.parallel.mesh(size)
    axes = [mesh.dp_replicate, mesh.fsdp, mesh.sp, mesh.tp]
    communicators = sum(ranks > 1 for ranks in axes) + (size > 1 and size not in axes)
    outside = figures.context + communicators * figures.communicator
    return Memory(peak, peak * figures.fragmentation, outside, communicators, figures.gpu.capacity)


def collective_seconds(key: str, calls: float, size: float, figures: Figures) -> float:
    """Seconds of some collectives of `size` bytes together, as in `Trace`: rings, over the slowest link in them."""
    _, operation, _, ranks_, hosts_ = key.split()
    ranks, hosts = int(ranks_), int(hosts_)
    if ranks == 1:
        return 0.0
    rounds = 2 if "allreduce" in operation else 1
    moved = size * (ranks - 1) * rounds
    if "allgather" not in operation:  # the others are given what goes to all ranks, not what goes to each
        moved /= ranks
    gpu = figures.gpu
    bandwidth = gpu.link * gpu.link_share
    if hosts > 1:  # ranks of a host bring a link to the network each
        bandwidth = min(bandwidth, gpu.network * gpu.network_share * ranks / hosts)
    hops = (ranks - hosts) * figures.link_latency + (hosts if hosts > 1 else 0) * figures.network_latency
    return moved / bandwidth + calls * rounds * hops


def step_time(trace: Trace, figures: Figures, config: RunConfig, model: BaseConfig, cluster: Cluster) -> StepTime:
    """A step of all micro-batches: in each part the slowest of the device, the host that launches, and the network."""
    micro_batches = config.engine_config(cluster.size).accumulation
    total = dict.fromkeys(("kernels", "exposed", "network", "host"), 0.0)
    seconds = launches = flops = 0.0
    bounds: dict[str, float] = {}
    for part, times in zip(PARTS, (1, micro_batches - 1, 1), strict=True):
        kernels = sum(trace.seconds.get(part, {}).values())
        count = sum(trace.kernels.get(part, {}).values())
        exposed = network = 0.0
        for key, calls in trace.calls.get(part, {}).items():
            taken = collective_seconds(key, calls, trace.sent[part][key], figures)
            if key.split()[2] in _EXPOSED:
                exposed += taken
            else:
                network += taken
        host = count * figures.gpu.launch
        terms = {"kernels": kernels + exposed, "host": host, "sharding": network}
        bound = max(terms, key=lambda name: terms[name])
        bounds[bound] = bounds.get(bound, 0.0) + times * terms[bound]
        seconds += times * terms[bound]
        launches += times * count
        flops += times * sum(trace.flops.get(part, {}).values())
        for name, value in (("kernels", kernels), ("exposed", exposed), ("network", network), ("host", host)):
            total[name] += times * value
    length = config.data.sequence_length
    useful = config.train.global_batch_size * length * training_flops_per_token(model, length)
    mfu = useful / (seconds * cluster.size * figures.gpu.products) if seconds else 0.0
    bound = max(bounds, key=lambda name: bounds[name])
    if bound == "kernels" and total["exposed"] > total["kernels"]:
        bound = "exposed collectives"
    return StepTime(**total, seconds=seconds, bound=bound, launches=launches, flops=flops, mfu=mfu)
