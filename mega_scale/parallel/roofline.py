"""Seconds that a metered step takes on a GPU that need not be there: each kernel as long as what bounds it.

A kernel takes the longer of its products at an attainable rate and its bytes at the memory's, and never less than the
smallest kernel does. `fused` makes of operators between products what a compiler makes of them: one kernel a gap.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

from mega_scale.parallel.devices import Device
from mega_scale.parallel.meter import Event

PARTS = ("products", "average", "attention", "norms", "gates", "loss", "optimizer", "copies")
"""What a step's time is divided into."""
_AVERAGE = "::ema_"
# Operators of our own that attend; others' names say so.
_ATTENTION = {"softmax_weights", "weighted_values", "scores_gradient", "score_products", "values_gradient"}
# Reads neighbours, which inductor writes to memory before: rotary positions turn pairs of channels.
_REVERSE = "prims::rev"
_COPIES = ("copy", "clone", "cat", "chunk", "contiguous", "split", "fsdp::", "foreach_copy")


def seconds(event: Event, device: Device) -> float:
    """How long one operator's kernels take on the device."""
    if not event.kernels:
        return 0.0
    work = (event.read + event.written) / (device.memory * device.memory_share)
    if _AVERAGE in event.name:
        work = max(work, _issue(event, device))
    elif event.flops:
        work = max(work, event.flops / _product_rate(event, device))
    return max(work, event.kernels * device.kernel)


def collective_seconds(operation: str, ranks: int, hosts: int, size: float, device: Device, calls: float = 1) -> float:
    """How long some collectives of `size` bytes together take: rings, over the slowest link in them.

    `size` is what this rank puts in; `operation` is named as in c10d.
    """
    if ranks == 1:
        return 0.0
    rounds = 2 if "allreduce" in operation else 1
    moved = size * (ranks - 1) * rounds
    if "allgather" not in operation:  # the others are given what goes to all ranks, not what goes to each
        moved /= ranks
    bandwidth = device.link * device.link_share
    if hosts > 1:  # ranks of a host bring a link to the network each
        bandwidth = min(bandwidth, device.network * device.network_share * ranks / hosts)
    hops = (ranks - hosts) * device.link_latency + (hosts if hosts > 1 else 0) * device.network_latency
    return moved / bandwidth + calls * rounds * hops


def hidden_seconds(product: Event, taken: float, ranks: int, device: Device) -> float:
    """How much of a collective's seconds passes while the product that it travels beside is computed.

    Both are divided by ranks. Before the first part has come, or after the last one is made, nothing travels beside it.
    """
    return min(taken, seconds(product, device) * (ranks - 1) / ranks)


def _product_rate(event: Event, device: Device) -> float:
    if event.dtype.startswith("float8"):
        return device.products_fp8 * device.products_fp8_share
    if event.dtype in ("bfloat16", "float16"):
        return device.products * device.products_share
    return device.products_fp32 * device.products_fp32_share


def _issue(event: Event, device: Device) -> float:
    """Of the average: the instructions of its kernels; `flops` counts tokens times channels times columns of states."""
    backward = any(word in event.name for word in ("gradients", "adjoints", "backward"))
    instructions = event.flops / 16 * (device.average_backward if backward else device.average_forward)
    return instructions / (device.multiprocessors * device.lanes * device.clock * device.issue_share)


def part(event: Event) -> str:
    """Which of `PARTS` an operator belongs to."""
    name, module = event.name, event.module
    if event.phase == "optimizer":
        return "optimizer"
    if _AVERAGE in name:
        return "average"
    own = name.rpartition("::")[2]
    if own in _ATTENTION or name.startswith(("aten::bmm", "aten::baddbmm")) or "attention" in name:
        return "attention"
    if "cross_entropy" in name or ("." not in module and not name.startswith("fsdp")):
        return "loss"
    if event.flops:
        return "products"
    if "norm" in name or "norm" in module.rpartition(".")[2]:
        return "norms"
    if any(word in name for word in _COPIES):
        return "copies"
    return "gates"


def is_elementwise(event: Event) -> bool:
    """Whether a compiler fuses it with its neighbours."""
    own = event.name.startswith(("aten::", "prims::"))
    return own and not event.flops and event.phase != "optimizer" and part(event) != "loss" and "." in event.module


def in_fp8(events: Iterable[Event]) -> Iterator[Event]:
    """The linear layers' products of bf16 tensors in fp8, each after a kernel that casts what it takes.

    A cast reads its tensor twice, for the largest number and to convert it, and writes it in a byte a number. A tensor
    is cast once in each pass, whatever multiplies it there, as a compiler finds.
    """
    cast: set[tuple[str, int]] = set()
    for event in events:
        if part(event) != "products" or event.dtype != "bfloat16":
            yield event
            continue
        fresh = [(number, size) for number, size in event.inputs if (event.phase, number) not in cast]
        cast |= {(event.phase, number) for number, _ in fresh}
        size = sum(size for _, size in fresh)
        if size:
            yield event._replace(
                name="cast to fp8", read=2 * size, written=size // 2, flops=0, kernels=2 * len(fresh),
                inputs=tuple(fresh), outputs=(),
            )  # fmt: skip
        yield event._replace(read=event.read // 2, dtype="float8_e4m3fn")


@dataclass
class _Group:
    """Elementwise operators that wait to be computed by one kernel."""

    events: list[Event] = field(default_factory=list)
    reads: dict[int, int] = field(default_factory=dict)  # from outside, bytes by storage
    made: dict[int, int] = field(default_factory=dict)
    passed: int = 0  # bytes that its kernels write for each other to read, both

    def add(self, event: Event) -> None:
        self.events.append(event)
        if event.name == _REVERSE:
            self.passed += sum(2 * size for number, size in event.inputs if number in self.made)
        for number, size in event.inputs:
            if number not in self.made:
                self.reads[number] = max(self.reads.get(number, 0), size)
        for number, size in event.outputs:
            self.made[number] = max(self.made.get(number, 0), size)

    def join(self, other: "_Group") -> None:
        self.events += other.events
        self.passed += other.passed
        self.made |= other.made
        self.reads = {n: size for n, size in (self.reads | other.reads).items() if n not in self.made}


def _from_the_narrowest(events: Sequence[Event]) -> list[Event]:
    """Operators that read what a widening cast was made from, in place of its result; casts then write nothing."""
    source: dict[int, tuple[int, int]] = {}  # of the result of a cast: number and bytes
    found = []
    for event in events:
        inputs = tuple(dict(source.get(number, (number, size)) for number, size in event.inputs).items())
        outputs = event.outputs
        if event.name == "aten::_to_copy" and is_elementwise(event) and event.read < event.written:
            source[outputs[0][0]] = inputs[0]
            outputs = ()
        read, written = (sum(size for _, size in each) for each in (inputs, outputs))
        found.append(event._replace(read=read, written=written, inputs=inputs, outputs=outputs))
    return found


def fused(events: Sequence[Event]) -> list[Event]:
    """Operators as a compiler runs them: elementwise ones that share tensors become one kernel before what needs them.

    A kernel reads what comes from outside once, and writes what something else reads later, or nothing ever reads (it
    leaves the step). Other operators stay as they are. Kernels that sum over tokens (gradients of biases) count with
    the kernel whose numbers they sum. What was only made wider is not kept, but made again from what it was. What a
    reversal reads is written before, and read.
    """
    events = _from_the_narrowest(events)
    last_read: dict[int, int] = {}
    for place, event in enumerate(events):
        for number, _ in event.inputs:
            last_read[number] = place
    waiting: list[_Group] = []
    found: list[Event] = []

    def run(group: _Group, place: int) -> None:
        writes = {n: size for n, size in group.made.items() if last_read.get(n, len(events)) >= place}
        longest = max(group.events, key=lambda event: event.read + event.written)
        found.append(
            longest._replace(
                name="fused", read=sum(group.reads.values()) + group.passed // 2,
                written=sum(writes.values()) + group.passed // 2, kernels=2 if group.passed else 1,
                inputs=tuple(group.reads.items()), outputs=tuple(writes.items()),
            )
        )  # fmt: skip

    phase = ""
    for place, event in enumerate(events):
        touched = {number for number, _ in (*event.inputs, *event.outputs)}
        if event.phase != phase and "recompute" not in (event.phase, phase):
            for group in waiting:
                run(group, place)
            waiting, phase = [], event.phase
        if is_elementwise(event):
            own = _Group()
            for group in [each for each in waiting if touched & (each.made.keys() | each.reads.keys())]:
                waiting.remove(group)
                own.join(group)
            own.add(event)
            waiting.append(own)
            continue
        for group in [each for each in waiting if touched & each.made.keys()]:
            waiting.remove(group)
            run(group, place)
        found.append(event)
    for group in waiting:
        run(group, len(events))
    return found


@dataclass(frozen=True)
class Row:
    """What one part of a step takes: launches, bytes, operations, seconds."""

    kernels: float = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Row") -> "Row":
        return Row(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def times(self, factor: float) -> "Row":
        return Row(self.kernels * factor, round(self.bytes * factor), round(self.flops * factor), self.seconds * factor)


def table(events: Iterable[Event], device: Device) -> dict[str, Row]:
    """What each of `PARTS` takes."""
    rows = dict.fromkeys(PARTS, Row())
    for event in events:
        flops = 0 if _AVERAGE in event.name else event.flops
        rows[part(event)] += Row(event.kernels, event.read + event.written, flops, seconds(event, device))
    return rows


def extrapolated(
    fewer: Mapping[str, Row], more: Mapping[str, Row], layers: tuple[int, int], wanted: int
) -> dict[str, Row]:
    """Rows of a model of `wanted` layers, from those of two numbers of layers: what a layer adds, so many times."""
    steps = (wanted - layers[0]) / (layers[1] - layers[0])
    return {name: fewer[name] + (more[name] + fewer[name].times(-1)).times(steps) for name in fewer}


def total(rows: Mapping[str, Row]) -> Row:
    """The sum of all parts."""
    return sum(rows.values(), Row())


def mfu(flops: float, seconds: float, device: Device) -> float:
    """Operations of the model in these seconds, as a share of the peak of bf16 products."""
    return flops / seconds / device.products
