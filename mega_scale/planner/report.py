"""What a plan prints: tables of one rank's memory, collectives and time, and of layouts."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mega_scale.planner.times import Memory, StepTime
from mega_scale.planner.trace import PARTS, Trace

GIB, MIB = 2**30, 2**20
_PLACES = 6  # that are named of each list
# Kinds of memory in the order of the table, and what each is.
_KINDS = {
    "weights": "parameters, as this rank keeps them between steps",
    "gradients": "gradients, sharded",
    "moments": "moments of the optimizer, and the average of the weights",
    "engine": "buckets of the engine, buffers of the model",
    "gathered": "weights gathered for the blocks that compute",
    "activations": "kept for the backward pass",
    "recomputed": "computed again in the backward pass",
    "temporary": "gradients and work space of the backward pass",
    "optimizer": "work space of the optimizer's step",
}


def table(rows: Sequence[Sequence[object]], indent: str = "  ") -> list[str]:
    """Lines of columns: text to the left, numbers to the right."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{cell!s:>{width}}" if _is_number(str(cell)) else f"{cell!s:<{width}}"
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append(f"{indent}{'  '.join(cells)}".rstrip())
    return lines


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit())


def memory_lines(trace: Trace, memory: Memory) -> list[str]:
    """Where a rank's memory is when it needs most."""
    rows: list[tuple[str, ...]] = []
    for kind, what in _KINDS.items():
        if size := trace.held.get(kind):
            rows.append((kind, f"{size / GIB:.3f} GiB", what))
    others = sum(size for kind, size in trace.held.items() if kind not in _KINDS)
    if others:
        rows.append(("other", f"{others / GIB:.3f} GiB", ""))
    rows += [
        ("peak", f"{trace.peak / GIB:.3f} GiB", f"of live tensors, in {trace.place}"),
        ("allocator", f"{memory.slack / GIB:.3f} GiB", "left over between tensors, as a share of the peak"),
        (
            "outside",
            f"{memory.outside / GIB:.3f} GiB",
            f"context of the device, {memory.communicators} communicators"
            f"{', symmetric memory' if trace.workspace else ''}",
        ),
        ("total", f"{memory.total / GIB:.2f} GiB", f"of {memory.limit / GIB:.1f} GiB: {_headroom(memory)}"),
    ]
    lines = ["memory at the peak of the second step", *table(rows)]
    places = sorted(trace.at_peak.items(), key=lambda item: -item[1])[:_PLACES]
    if places:
        lines.append("alive at the peak, by module")
        lines += table([(f"{size / MIB:,.1f} MiB", name) for name, size in places])
    kept = sorted(trace.kept.items(), key=lambda item: -item[1])[:_PLACES]
    if kept and sum(trace.kept.values()) >= MIB:
        lines.append(f"kept for the backward pass, {sum(trace.kept.values()) / GIB:.3f} GiB, by module")
        lines += table([(f"{size / MIB:,.1f} MiB", name or "(the rest)") for name, size in kept])
    return lines


def _headroom(memory: Memory) -> str:
    left = memory.limit - memory.total
    return f"{left / GIB:.2f} GiB are left" if left >= 0 else f"{-left / GIB:.2f} GiB too much"


def collective_lines(trace: Trace, micro_batches: int) -> list[str]:
    """Collectives of a step: axis, ranks, link, how many and how large, by direction."""
    counts: Counter[tuple[str, ...]] = Counter()
    sizes: dict[tuple[str, ...], float] = {}
    for part, times in zip(PARTS, (1, micro_batches - 1, 1), strict=True):
        for key, count in trace.calls.get(part, {}).items():
            phase, operation, axis, ranks, hosts = key.split()
            link = "alone" if ranks == "1" else "host" if hosts == "1" else f"network, {hosts} hosts"
            row = (axis, ranks, link, phase, operation.strip("_"))
            counts[row] += times * round(count)
            sizes[row] = sizes.get(row, 0.0) + times * trace.sent[part][key]
    rows: list[tuple[str, ...]] = [("axis", "ranks", "link", "phase", "operation", "calls", "MiB put in")]
    rows += [(*row, f"{counts[row]:,}", f"{sizes[row] / MIB:,.2f}") for row in sorted(counts) if row[1] != "1"]
    if len(rows) == 1:
        return ["collectives of a step: none"]
    return ["collectives of a step", *table(rows)]


def step_lines(time: StepTime, micro_batches: int, tokens: int, steps: int, size: int) -> list[str]:
    """Time of a step by term, and what a run takes."""
    per_second = tokens / time.seconds if time.seconds else 0.0
    days = steps * time.seconds / 86_400
    rows = [
        ("kernels", f"{1e3 * time.kernels:,.1f} ms", "operators at the speed of the device"),
        ("exposed", f"{1e3 * time.exposed:,.1f} ms", "collectives of tp and sp, which are waited for"),
        ("sharding", f"{1e3 * time.network:,.1f} ms", "collectives beside the kernels: weights, gradients"),
        ("host", f"{1e3 * time.host:,.1f} ms", f"{time.launches:,.0f} launches by Python"),
        ("step", f"{1e3 * time.seconds:,.1f} ms", f"bounded by {time.bound}; {micro_batches} micro-batches"),
    ]
    return [
        "time of a step", *table(rows),
        f"  {time.flops:.3g} FLOPs of matrix products a rank, MFU {time.mfu:.1%}, {per_second:,.0f} tokens/s; "
        f"{steps:,} steps: {days:,.1f} days, {24 * days * size:,.0f} device hours",
    ]  # fmt: skip


def save_lines(trace: Trace) -> list[str]:
    """What checkpoints and evaluations take."""
    return [
        f"a checkpoint: this rank writes {trace.written / MIB:,.1f} MiB and holds {trace.pinned / MIB:,.1f} MiB locked "
        f"on the host; the index has about {trace.index / MIB:,.2f} MiB",
        f"an evaluation: {trace.evaluation / GIB:.3f} GiB at most",
    ]


def layout_lines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A table of layouts that were traced, best first."""
    names = (
        "layout", "GiB", "left", "kernels ms", "exposed", "sharding", "host", "step ms", "bound by", "MFU", "tokens/s",
        "days", "device hours",
    )  # fmt: skip
    return table([names, *(tuple(row[name] for name in names) for row in rows)])
