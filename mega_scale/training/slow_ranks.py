"""Names ranks that hold the others up.

In a step with collectives all ranks take equally long, so a rank's step time says nothing of it. What is its own: the
time for which it waited for its data, and how fast its device computes when it needs nobody, in a short probe.
"""

import statistics
import time

import torch

from mega_scale.parallel import World

_PROBE_SIZE = {"cpu": 192, "cuda": 2048}
_PROBES = 5
_WORTH_SAYING = 0.1  # of a step: less than that, a wait for data holds nobody up


def probe(device: torch.device) -> float:
    """Time one product of two square fp32 matrices; the least of five, as other work on the machine only adds to it.

    Args:
        device: where this rank computes.

    Returns:
        Seconds.
    """
    size = _PROBE_SIZE.get(device.type, _PROBE_SIZE["cpu"])
    matrix = torch.ones(size, size, device=device)
    least = float("inf")
    for _ in range(_PROBES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        _ = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - began)
    return least


def slower(seconds: list[float], factor: float, at_least: float = 0.0) -> list[int]:
    """Say which ranks take longer than a multiple of the median.

    Args:
        seconds: of each rank.
        factor: that multiple.
        at_least: seconds below which no rank is slow.

    Returns:
        Ranks. Of an even number of ranks the lower median counts: of two, one may be slow.
    """
    median = statistics.median_low(seconds)
    return [rank for rank, own in enumerate(seconds) if own > max(factor * median, at_least)]


class SlowRanks:
    """Compares ranks at every report, and names those that were slow at this one and at the one before.

    Args:
        world: all ranks.
        factor: how many times the median is slow.
    """

    def __init__(self, world: World, factor: float) -> None:
        self._world, self._factor = world, factor
        self._before: set[tuple[int, str]] = set()

    def report(self, waited_s: float, step_s: float) -> list[str]:
        """Compare the ranks; collective.

        Args:
            waited_s: for which this rank waited for data in a step, in the mean (seconds).
            step_s: that a step took, in the mean (seconds).

        Returns:
            A line for each slow rank, the same on all ranks.
        """
        own = torch.tensor([waited_s, probe(self._world.device), step_s])
        waits, probes, steps = self._world.all_gather(own).T.tolist()
        found = {(rank, "waits for data") for rank in slower(waits, self._factor, _WORTH_SAYING * min(steps))}
        found |= {(rank, "computes") for rank in slower(probes, self._factor)}
        lines = []
        for rank, what in sorted(found & self._before):
            figures = waits if what == "waits for data" else probes
            lines.append(
                f"rank {rank} is slow: it {what} for {figures[rank] * 1e3:.3g} ms, the median is "
                f"{statistics.median_low(figures) * 1e3:.3g} ms ({'a step' if figures is waits else 'a fixed product'})"
            )
        self._before = found
        return lines
