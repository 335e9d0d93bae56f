"""Seconds that a metered step takes on a GPU that need not be there: each kernel as long as what bounds it.

A kernel takes the longer of its products at an attainable rate and its bytes at the memory's, and never less than the
smallest kernel does. `fused` makes of operators between products what a compiler makes of them: one kernel a gap.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mega_scale.parallel.meter import Event

_FILE = Path(__file__).with_name("gpus.yaml")
PARTS = ("products", "average", "attention", "norms", "gates", "loss", "optimizer", "copies")
"""What a step's time is divided into."""
_AVERAGE = "::ema_"
# Operators of our own that attend; others' names say so.
_ATTENTION = {"softmax_weights", "weighted_values", "scores_gradient", "score_products", "values_gradient"}
_COPIES = ("copy", "clone", "cat", "chunk", "contiguous", "split", "fsdp::", "foreach_copy")
_LANES = 32 * 4  # threads whose instructions a multiprocessor issues in a cycle


@dataclass(frozen=True)
class Gpu:
    """One GPU with its links: peaks and attainable shares, in the units of `gpus.yaml`."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    products: float
    products_fp8: float
    products_fp32: float
    memory: float
    capacity: float
    link: float
    network: float
    products_share: float
    products_fp8_share: float
    products_fp32_share: float
    memory_share: float
    issue_share: float
    kernel: float
    launch: float
    link_share: float
    network_share: float
    average_forward: float
    average_backward: float

    @classmethod
    def known(cls) -> list[str]:
        """Names of GPUs that `named` takes."""
        return list(_figures()["gpus"])

    @classmethod
    def named(cls, name: str, **overrides: float) -> "Gpu":
        """A GPU of `gpus.yaml`, with other figures in place of its own. Raises ValueError for unknown names."""
        figures = _figures()
        if name.lower() not in figures["gpus"]:
            raise ValueError(f"gpu={name!r} is unknown: choose one of {', '.join(figures['gpus'])}")
        own = {**figures["gpus"][name.lower()], **figures["attainable"]}
        changeable = [each for each in own if each not in ("name", "capability")]
        for key, value in overrides.items():
            if key not in changeable:
                raise ValueError(f"gpu.{key} is unknown: choose one of {', '.join(changeable)}")
            if not value > 0:
                raise ValueError(f"gpu.{key}={value} is not possible: give a number above 0")
            own[key] = type(own[key])(value)
        return cls(**{**own, "capability": tuple(own["capability"])})

    def figures(self) -> dict[str, Any]:
        """All figures by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def _figures() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return found


def seconds(event: Event, gpu: Gpu) -> float:
    """How long one operator's kernels take on the device."""
    if not event.kernels:
        return 0.0
    work = (event.read + event.written) / (gpu.memory * gpu.memory_share)
    if _AVERAGE in event.name:
        work = max(work, _issue(event, gpu))
    elif event.flops:
        work = max(work, event.flops / _product_rate(event, gpu))
    return max(work, event.kernels * gpu.kernel)


def _product_rate(event: Event, gpu: Gpu) -> float:
    if event.dtype.startswith("float8"):
        return gpu.products_fp8 * gpu.products_fp8_share
    if event.dtype in ("bfloat16", "float16"):
        return gpu.products * gpu.products_share
    return gpu.products_fp32 * gpu.products_fp32_share


def _issue(event: Event, gpu: Gpu) -> float:
    """Of the average: the instructions of its kernels; `flops` counts tokens times channels times columns of states."""
    backward = "gradients" in event.name or "adjoints" in event.name
    instructions = event.flops / 16 * (gpu.average_backward if backward else gpu.average_forward)
    return instructions / (gpu.multiprocessors * _LANES * gpu.clock * gpu.issue_share)


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

    def add(self, event: Event) -> None:
        self.events.append(event)
        for number, size in event.inputs:
            if number not in self.made:
                self.reads[number] = max(self.reads.get(number, 0), size)
        for number, size in event.outputs:
            self.made[number] = max(self.made.get(number, 0), size)

    def join(self, other: "_Group") -> None:
        self.events += other.events
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
    the kernel whose numbers they sum. What was only made wider is not kept, but made again from what it was.
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
                name="fused", read=sum(group.reads.values()), written=sum(writes.values()), kernels=1,
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

    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Row") -> "Row":
        return Row(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def times(self, factor: float) -> "Row":
        return Row(
            round(self.kernels * factor), round(self.bytes * factor), round(self.flops * factor), self.seconds * factor
        )


def table(events: Iterable[Event], gpu: Gpu) -> dict[str, Row]:
    """What each of `PARTS` takes."""
    rows = dict.fromkeys(PARTS, Row())
    for event in events:
        flops = 0 if _AVERAGE in event.name else event.flops
        rows[part(event)] += Row(event.kernels, event.read + event.written, flops, seconds(event, gpu))
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


def mfu(flops: float, seconds: float, gpu: Gpu) -> float:
    """Operations of the model in these seconds, as a share of the peak of bf16 products."""
    return flops / seconds / gpu.products
