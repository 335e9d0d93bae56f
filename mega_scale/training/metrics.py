"""Figures of a run: tokens per second, use of the device, memory; and ranks that are slow."""

import math
import statistics
import time
from functools import cache, partial
from typing import Any

import psutil
import torch

from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.parallel import World

_PROBES = 5
_WORTH_SAYING = 0.1  # of a step: less than that, a wait for data holds nobody up


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak of the device's matrix products, FLOP/s; None where it is not known."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    from mega_scale.parallel.devices import peak_products  # noqa: PLC0415  # a file less to start with

    return peak_products(torch.cuda.get_device_name(device))


def training_flops_per_token(config: BaseConfig, sequence_length: int) -> int:
    """Operations of forward and backward per token of a sequence, in tokens; a multiply-add counts as two.

    What the algorithm needs counts, three times the forward pass: neither masked scores nor recomputed activations.
    Raises ValueError where the model attends to an encoder, whose length would count too.
    """
    keys: float = min(config.attention_chunk or sequence_length, sequence_length)
    if getattr(config, "is_decoder", True):
        keys = (keys + 1) / 2  # that a query sees, on average
    block, head = _FORWARD[config.model_type](config)
    attention = int(2 * keys * (config.shared_representation_size + config.intermediate_size))
    return 3 * (config.num_hidden_layers * (block + attention) + head)


def _mega_flops(config: Any) -> tuple[int, int]:
    """Operations per token of a block's forward pass but for attention, and of the head's."""
    if config.add_cross_attention:
        raise ValueError("add_cross_attention=True: operations depend on an encoder, give a model without it")
    d, z, e = config.hidden_size, config.shared_representation_size, config.intermediate_size
    projections = 2 * (d * e + d * (2 * d + z + e) + e * d)
    feed_forward = 4 * d * config.nffn_hidden_size if config.use_normalized_ffn else 0
    averages = 6 * config.ema_projection_size * d * (2 if config.bidirectional else 1)
    head = 2 * d * config.vocab_size + (2 * d * d if config.add_lm_hidden_dense_layer else 0)
    return projections + feed_forward + averages, head


def _megalodon_flops(config: Any) -> tuple[int, int]:
    """The same of a Megalodon; a complex average is twice a real one."""
    d, z, e = config.hidden_size, config.shared_representation_size, config.intermediate_size
    projections = 2 * (d * e + d * (z + e + d) + e * d)
    feed_forward = (6 if config.swiglu else 4) * d * config.nffn_hidden_size
    return projections + feed_forward + 12 * config.ema_projection_size * d, 2 * d * config.vocab_size


_FORWARD = {"mega": _mega_flops, "megalodon": _megalodon_flops}


def memory_bytes(device: torch.device) -> int:
    """Most memory allocated on a GPU so far, or memory held by this process on a CPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class Throughput:
    """Time and tokens since the last report.

    Attributes:
        since: when the interval began, by `time.perf_counter`; add to it what is to be left out of the time.
    """

    def __init__(self, model: BaseConfig, device: torch.device, dtype: str, ranks: int) -> None:
        self.peak, self._ranks = peak_flops(device, dtype), ranks
        self._flops_per_token = cache(partial(training_flops_per_token, model))
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self.since, self._tokens, self._flops, self._steps, self._waited = now, 0, 0, 0, 0.0

    def add(self, tokens: int, waited: float, length: int) -> None:
        """Count a step of so many tokens over all ranks, in sequences of a length, for which it waited some seconds."""
        self._tokens += tokens
        self._flops += tokens * self._flops_per_token(length)
        self._steps += 1
        self._waited += waited

    def per_step(self) -> tuple[float, float]:
        """Seconds for which this rank waited for data, and seconds in all, in a step of the interval, in the mean."""
        steps = max(self._steps, 1)
        return self._waited / steps, (time.perf_counter() - self.since) / steps

    def report(self, steps_left: int) -> dict[str, float]:
        """Figures of the interval that ends now; `loader_wait` is this rank's share of it, `mfu` of a known peak."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        found = {
            "tokens_per_second": self._tokens / seconds,
            "step_seconds": seconds / max(self._steps, 1),
            "eta_seconds": steps_left * seconds / max(self._steps, 1),
            "loader_wait": self._waited / seconds,
        }
        if self.peak is not None:
            found["mfu"] = self._flops / seconds / (self.peak * self._ranks)
        self._begin(now)
        return found


# Slow ranks
#
# In a step with collectives all ranks take equally long, so a rank's step time says nothing of it. What is its own: the
# time for which it waited for its data, and how fast its device computes when it needs nobody, in a short probe.


def probe(device: torch.device) -> float:
    """Seconds of a product of two square matrices; the least of five, as other work only adds to it."""
    size = 2048 if device.type == "cuda" else 192
    matrix = torch.ones(size, size, device=device)
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    least = math.inf
    for _ in range(_PROBES):
        synchronize()
        began = time.perf_counter()
        _ = matrix @ matrix
        synchronize()
        least = min(least, time.perf_counter() - began)
    return least


def slower(seconds: list[float], factor: float, at_least: float = 0.0) -> list[int]:
    """Ranks above `factor` times the lower median, so that one of two may be slow, and above `at_least` seconds."""
    median = statistics.median_low(seconds)
    return [rank for rank, own in enumerate(seconds) if own > max(factor * median, at_least)]


class SlowRanks:
    """Names ranks above `factor` times the median at this report and at the one before; 0 compares nothing."""

    def __init__(self, world: World, factor: float) -> None:
        self._world, self._factor = world, factor
        self._before: set[tuple[int, str]] = set()

    def report(self, waited_s: float, step_s: float) -> list[str]:
        """A line for each slow rank, the same on all ranks; collective. Takes what `Throughput.per_step` returns."""
        if not self._factor:
            return []
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
