"""How often to save, and which share of its time a run makes progress, as GPUs fail: by arithmetic.

Failures come at random, with a mean time M between them that is a GPU's divided by the number of GPUs. A run computes
for tau seconds, stands still for delta seconds to save, and so on; after a failure it starts again, which takes R, from
the newest checkpoint that was complete. A checkpoint is complete `lag` seconds after training has gone on.

* J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974:
  `tau = sqrt(2 delta M)`.
* J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006,
  equation 37; and equation 20, the expected time of a run, failures during restarts included:
  `M exp(R / M) (exp((tau + delta) / M) - 1)` for tau seconds of progress. The lag adds to R here.

It imports nothing, so that a planner may call it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

GPU_MTBF_H = 16_384 * 54 * 24 / 419
"""Hours of one GPU between failures that end a run: Llama 3 405B had 419 unexpected interruptions in 54 days on 16,384
H100s, GPUs, network, hosts and software together (arXiv 2407.21783, section 3.3.4)."""

GPUS = (8, 64, 256, 1024, 4096, 16_384)
_BYTES_A_PARAMETER = 12  # of a checkpoint: the weight and two moments, fp32
_PASSES = 2  # over what is written: it is read back; over what is loaded: it is verified


@dataclass(frozen=True)
class Storage:
    """What times are estimated from where none were measured; guesses, to be replaced by figures of the cluster."""

    gpus_per_host: int = 8
    copy_bytes_s: float = 20e9  # from one GPU to locked host memory
    host_bytes_s: float = 2e9  # between one host and the file system
    system_bytes_s: float = 100e9  # between all hosts and the file system
    notice_s: float = 60.0  # until the last rank has ended after a failure
    launch_s: float = 180.0  # from the launcher's start to the first step, without the checkpoint


@dataclass(frozen=True)
class Costs:
    """Seconds that checkpoints and failures cost one run."""

    stall_s: float  # training stands still for a save
    write_s: float  # from a save's begin until its checkpoint can be resumed from
    restart_s: float  # from a failure to the first step after it

    @property
    def lag_s(self) -> float:
        """For how long a checkpoint is incomplete while training goes on."""
        return max(self.write_s - self.stall_s, 0.0)


@dataclass(frozen=True)
class Row:
    """A run on so many GPUs that saves every `every` steps; shares of its time, which add up to 1."""

    gpus: int
    mtbf_s: float
    costs: Costs
    young_s: float
    daly_s: float
    every: int  # steps: `checkpoint.every`
    goodput: float  # steps that last
    saving: float  # standing still
    restarting: float
    repeating: float  # steps that a failure undid
    failures_a_day: float


def estimate(parameters: int, gpus: int, storage: Storage | None = None) -> Costs:
    """Costs of a model of so many parameters by its bytes and the storage's bandwidths.

    The copy to host memory counts as a stall in full, although forward and backward passes hide some of it.
    """
    storage = storage or Storage()
    size = parameters * _BYTES_A_PARAMETER
    hosts = -(-gpus // storage.gpus_per_host)
    moved_s = _PASSES * size / min(hosts * storage.host_bytes_s, storage.system_bytes_s)
    stall_s = size / gpus / storage.copy_bytes_s
    return Costs(stall_s, stall_s + moved_s, storage.notice_s + storage.launch_s + moved_s)


def young(stall_s: float, mtbf_s: float) -> float:
    """Seconds of progress between two saves, to the first order."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly(stall_s: float, mtbf_s: float) -> float:
    """Seconds of progress between two saves, to a higher order; the mean time between failures where a save takes twice
    that and more."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    root = math.sqrt(stall_s / (2 * mtbf_s))
    return young(stall_s, mtbf_s) * (1 + root / 3 + root**2 / 9) - stall_s


def wall_s(progress_s: float, costs: Costs, mtbf_s: float) -> float:
    """Expected seconds, failures included, from one save to the end of the next one; infinite beyond all bounds."""
    try:
        lost = math.exp((costs.restart_s + costs.lag_s) / mtbf_s)
        return mtbf_s * lost * math.expm1((progress_s + costs.stall_s) / mtbf_s)
    except OverflowError:
        return math.inf


def row(gpus: int, step_s: float, costs: Costs, gpu_mtbf_h: float = GPU_MTBF_H, every: int | None = None) -> Row:
    """The run that saves every so many steps, by default those nearest to Daly's interval.

    No save can begin before the last one is complete, so the default is at least as long as that takes.
    Raises ValueError where a number cannot be.
    """
    _check(gpus=gpus, step_s=step_s, gpu_mtbf_h=gpu_mtbf_h, every=1 if every is None else every)
    for name in ("stall_s", "write_s", "restart_s"):
        if not getattr(costs, name) >= 0:
            raise ValueError(f"{name}={getattr(costs, name)!r}: give seconds, 0 or more")
    mtbf_s = gpu_mtbf_h * 3600 / gpus
    best_s = daly(costs.stall_s, mtbf_s)
    if every is None:
        every = max(1, round(best_s / step_s), math.ceil(costs.lag_s / step_s))
    progress_s = every * step_s
    total = wall_s(progress_s, costs, mtbf_s)
    restarting = -math.expm1(-costs.restart_s / mtbf_s)
    goodput, saving = progress_s / total, costs.stall_s / total
    return Row(
        gpus, mtbf_s, costs, young(costs.stall_s, mtbf_s), best_s, every, goodput, saving, restarting,
        max(1 - goodput - saving - restarting, 0.0), 86_400 / mtbf_s,
    )  # fmt: skip


def table(
    parameters: int,
    step_s: float,
    gpus: Sequence[int] = GPUS,
    *,
    gpu_mtbf_h: float = GPU_MTBF_H,
    stall_s: float | None = None,
    write_s: float | None = None,
    restart_s: float | None = None,
    storage: Storage | None = None,
    every: int | None = None,
) -> list[Row]:
    """Goodput against the number of GPUs, each with as much work a step as before (`step_s`).

    Args:
        parameters: of the model.
        step_s: of one optimizer step.
        gpu_mtbf_h: hours of one GPU between failures.
        stall_s, write_s: as a run logs them of its saves, and `launch/benchmark checkpoint` prints them; estimated from
            the storage's bandwidths where not given.
        restart_s: from a failure to the first step after it; estimated likewise.
        every: steps between saves, by default the best at each number of GPUs.

    Raises ValueError where a number cannot be.
    """
    _check(parameters=parameters)
    given = {"stall_s": stall_s, "write_s": write_s, "restart_s": restart_s}
    known = {name: value for name, value in given.items() if value is not None}
    costs = {count: replace(estimate(parameters, max(count, 1), storage), **known) for count in gpus}
    return [row(count, step_s, costs[count], gpu_mtbf_h, every) for count in gpus]


def report(rows: Sequence[Row], step_s: float) -> str:
    """The rows as text, one a line, and the key to set for each."""
    lines = [
        f"{'GPUs':>7} {'failures':>9} {'stall':>8} {'complete':>9} {'restart':>8} {'Young':>8} {'Daly':>8} "
        f"{'checkpoint.every':>17} {'goodput':>8} {'saving':>7} {'restarts':>9} {'repeated':>9}",
        f"{'':>7} {'a day':>9} {'s':>8} {'after s':>9} {'s':>8} {'s':>8} {'s':>8} {'steps':>17}",
    ]
    for each in rows:
        costs = each.costs
        lines.append(
            f"{each.gpus:>7,} {each.failures_a_day:>9.3f} {costs.stall_s:>8.3f} {costs.write_s:>9.1f} "
            f"{costs.restart_s:>8.1f} {each.young_s:>8.1f} {each.daly_s:>8.1f} {each.every:>17,} {each.goodput:>8.2%} "
            f"{each.saving:>7.2%} {each.restarting:>9.2%} {each.repeating:>9.2%}"
        )
    lines.append(
        f"steps of {step_s:g} s; a GPU fails every {rows[0].mtbf_s * rows[0].gpus / 3600:,.0f} hours" if rows else ""
    )
    return "\n".join(lines)


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0 or math.isinf(value):
            raise ValueError(f"{name}={value!r}: give a number greater than 0")
