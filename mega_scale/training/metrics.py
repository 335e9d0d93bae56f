"""What a run reports: a console line, TensorBoard scalars, a JSON line, all of the same numbers; and slow ranks."""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mega_scale.files import append_line, reason, replace_text
from mega_scale.model import MegaConfig
from mega_scale.parallel import World

# Dense bf16 matrix products, FLOP/s, from the vendors' data sheets; the first name contained in the device's counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}

_PROBES = 5
_WORTH_SAYING = 0.1  # of a step: less than that, a wait for data holds nobody up
_NAMED = 8  # ranks in a line
_LONGEST_LINE = 2**20  # bytes


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak of the device's matrix products, FLOP/s; None where it is not known."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def training_flops_per_token(config: MegaConfig, sequence_length: int) -> int:
    """Operations of forward and backward per token of a sequence, in tokens; a multiply-add counts as two.

    What the algorithm needs counts, three times the forward pass: neither masked scores nor recomputed activations.
    Raises ValueError where the model attends to an encoder, whose length would count too.
    """
    if config.add_cross_attention:
        raise ValueError("add_cross_attention=True: operations depend on an encoder, give a model without it")
    keys: float = min(config.chunk_size, sequence_length) if config.use_chunking else sequence_length
    if config.is_decoder:
        keys = (keys + 1) / 2  # that a query sees, on average
    d, z, e = config.hidden_size, config.shared_representation_size, config.intermediate_size
    projections = 2 * (d * e + d * (2 * d + z + e) + e * d)
    feed_forward = 4 * d * config.nffn_hidden_size if config.use_normalized_ffn else 0
    averages = 6 * config.ema_projection_size * d * (2 if config.bidirectional else 1)
    attention = int(2 * keys * (z + e))
    head = 2 * d * config.vocab_size + (2 * d * d if config.add_lm_hidden_dense_layer else 0)
    return 3 * (config.num_hidden_layers * (projections + feed_forward + averages + attention) + head)


def memory_bytes(device: torch.device) -> int:
    """Most memory allocated on a GPU so far, or memory held by this process on a CPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class Throughput:
    """Time and tokens since the last report; evaluations, samples and checkpoints can be left out of the time."""

    def __init__(self, model: MegaConfig, device: torch.device, dtype: str, ranks: int) -> None:
        self.peak, self._ranks = peak_flops(device, dtype), ranks
        self._flops_per_token = cache(partial(training_flops_per_token, model))
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self._since, self._tokens, self._flops, self._steps, self._waited = now, 0, 0, 0, 0.0

    def add(self, tokens: int, waited: float, length: int) -> None:
        """Count a step of so many tokens over all ranks, in sequences of a length, for which it waited some seconds."""
        self._tokens += tokens
        self._flops += tokens * self._flops_per_token(length)
        self._steps += 1
        self._waited += waited

    def skip(self, seconds: float) -> None:
        """Leave out time that was not training."""
        self._since += seconds

    def per_step(self) -> tuple[float, float]:
        """Seconds for which this rank waited for data, and seconds in all, in a step of the interval, in the mean."""
        steps = max(self._steps, 1)
        return self._waited / steps, (time.perf_counter() - self._since) / steps

    def report(self, steps_left: int) -> dict[str, float]:
        """Figures of the interval that ends now; `loader_wait` is this rank's share of it, `mfu` of a known peak."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        found = {
            "tokens_per_second": self._tokens / seconds,
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


class Reporter:
    """Writes on rank 0; on other ranks every call does nothing. A disk that fails is reported, and ends no run.

    What `metrics.jsonl` and `tensorboard/` in `run_dir` hold from `start` on, the run's first step, is superseded.
    """

    def __init__(self, run_dir: Path, rank: int, start: int, steps: int, tensorboard: bool) -> None:
        self._active, self._fails = rank == 0, False
        self._path, self._steps = run_dir / "metrics.jsonl", steps
        self._writer: Any = None
        shown = self._active and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=not shown, dynamic_ncols=True, leave=False)
        if self._active:
            self._supersede(start)
        if self._active and tensorboard:
            self._open_tensorboard(run_dir / "tensorboard", start)

    def _supersede(self, start: int) -> None:
        """Keep of metrics.jsonl what was written up to a step; what is no line of it goes into a file beside it."""
        kept, bad = [], []
        try:
            for line in self._path.read_bytes().splitlines() if start and self._path.is_file() else ():
                try:
                    step = json.loads(line.decode("utf-8-sig"))["step"]
                except (ValueError, KeyError, TypeError, RecursionError):  # as half a line that a killed run leaves
                    step = None
                if type(step) is not int or len(line) > _LONGEST_LINE:
                    bad += [line] if line.strip() else []
                elif step <= start:
                    kept.append(line.decode("utf-8-sig"))
            if bad:
                aside = self._path.with_name(f"{self._path.name}.bad")
                with aside.open("ab") as file:
                    file.writelines(line + b"\n" for line in bad)
                self.log(f"{len(bad)} lines of {self._path} cannot be read: they are in {aside.name} now")
            replace_text(self._path, "".join(line + "\n" for line in kept))
        except OSError as error:
            self.log(f"{self._path.name} keeps what it held: {reason(error)}")

    def advance(self) -> None:
        """Count one step on the progress bar."""
        self._bar.update()

    def rewind(self, step: int) -> None:
        """Show that the run went back; lines of metrics.jsonl stay, and later ones supersede them."""
        self._bar.n = step
        self._bar.refresh()
        self._tensorboard(lambda writer: writer.close())
        if self._writer is not None:
            self._open_tensorboard(Path(self._writer.log_dir), step)

    def log(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._active:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(self, step: int, values: dict[str, float]) -> None:
        """Report a training step; `values` are those that `Trainer.log_step` gathers."""
        minutes, seconds = divmod(int(values["eta_seconds"]), 60)
        parts = [
            f"step {step:>{len(str(self._steps))}}/{self._steps}",
            f"loss {values['loss']:.4f}",
            f"grad {values['grad_norm']:.3f}",
            f"lr {values['lr']:.2e}",
            f"{values['tokens_per_second']:,.0f} tok/s",
            f"mem {values['memory_bytes'] / 2**30:.2f} GiB",
            f"eta {minutes // 60}:{minutes % 60:02d}:{seconds:02d}",
        ]
        if "mfu" in values:
            parts.insert(5, f"mfu {values['mfu']:.1%}")
        shown = {"loader_wait": "wait {:.1%}", "sequence_length": "length {:,}", "padding": "padding {:.1%}"}
        parts += [text.format(values[key]) for key, text in shown.items() if key in values]
        counts = {
            "bad rows {:,.0f}": sum(value for name, value in values.items() if name.startswith("bad_rows/")),
            "lost {:,.0f} bytes of text": values.get("lost_bytes", 0),
            "bad steps {:,.0f}": values.get("bad_steps", 0),
        }
        parts += [text.format(count) for text, count in counts.items() if count]
        names = [key.removeprefix("tokens/") for key in values if key.startswith("tokens/")]
        if len(names) == 1 and f"epochs/{names[0]}" in values:
            parts.append(f"epoch {values[f'epochs/{names.pop()}']:.2f}")
        for name in names:
            epochs = f"{values[f'epochs/{name}']:.2f} epochs, " if f"epochs/{name}" in values else ""
            parts.append(f"{name} {epochs}{values[f'tokens/{name}']:,.0f} tok")
        self.log(" | ".join(parts))
        self._record(step, "train", values)

    def bad_step(
        self, step: int, problem: str, rows: list[int], where: list[str], loss: float, norm: float, total: int
    ) -> None:
        """Report a step that was not taken, the rows [first, end) that it took, and where its loss was not finite."""
        named = f": {', '.join(where[:_NAMED])}" if where else ""
        more = f" and {len(where) - _NAMED} more" if len(where) > _NAMED else ""
        self.log(f"step {step} | bad step {total}, not taken: {problem} | rows {rows[0]} to {rows[1] - 1}{named}{more}")
        values = {"loss": loss, "grad_norm": norm, "total": total}
        self._write(step, "bad_step", {**values, "problem": problem, "rows": rows, "where": where})
        self._tensorboard(lambda writer: writer.add_scalar("train/bad_steps", total, step))

    def evaluation(self, step: int, values: dict[str, float], average: bool = False) -> None:
        """Report an evaluation of the weights, or of their average: loss, perplexity, bits_per_byte, tokens."""
        self.log(
            f"step {step} | {'averaged weights: ' if average else ''}validation loss {values['loss']:.4f} nats/token | "
            f"perplexity {values['perplexity']:.3f} | {values['bits_per_byte']:.4f} bits/byte | "
            f"{values['tokens']:,.0f} tokens"
        )
        self._record(step, "validation_average" if average else "validation", values)

    def sample(self, step: int, text: str) -> None:
        """Report generated text."""
        self.log(f"step {step} | sample: {text!r}")
        self._tensorboard(lambda writer: writer.add_text("sample", "    " + text.replace("\n", "\n    "), step))

    def _open_tensorboard(self, folder: Path, start: int) -> None:
        """Begin a file of events that supersedes all points after `start`, and at it where nothing is done yet."""
        try:
            self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)
        except OSError as error:
            self._writer = None
            self.log(f"TensorBoard events are not written: {reason(error)}")

    def _write(self, step: int, part: str, values: dict[str, Any]) -> None:
        if not self._active:
            return
        # JSON has no word for what is not finite.
        known = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        try:
            append_line(self._path, json.dumps({"step": step, "part": part, **known}))
            self._fails = False
        except OSError as error:
            if not self._fails:
                self.log(f"step {step} | {self._path.name} is not written: {reason(error)}")
            self._fails = True

    def _record(self, step: int, part: str, values: dict[str, float]) -> None:
        self._write(step, part, values)

        def add(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(f"{part}/{name}", value, step)
            writer.flush()

        self._tensorboard(add)

    def _tensorboard(self, write: Callable[[Any], None]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:  # after which its thread has ended
            self._writer = None
            self.log(f"TensorBoard events are written no more: {reason(error)}")

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._tensorboard(lambda writer: writer.close())
