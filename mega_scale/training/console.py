"""What a run says: the table at its start, a line a report, progress of what takes long, the line at its end.

All that is said about figures goes to the run's reporters, too.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from mega_scale.files import reason
from mega_scale.training.reporters import MetricsFile, Reporter, Run

_NAMED = 8  # ranks in a line
_WAITING = 1000  # calls that a reporter which fails may make up for
_PROGRESS_S = 20.0  # between two lines of progress


class _Outlet:
    """A reporter whose failures end nothing: one line says that it fails, and its calls are made again in order."""

    def __init__(self, name: str, make: Callable[[], Reporter], log: Callable[[str], None]) -> None:
        self._name, self._log = name, log
        self._waiting: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._failing, self._lost = False, 0
        self._reporter: Reporter | None = None
        try:
            self._reporter = make()
        except Exception as error:  # whatever a tracker raises, the run does not depend on it
            log(f"{name} is not written, the run goes on without it: {reason(error)}")
            return
        if where := getattr(self._reporter, "where", None):
            log(f"{name}: {where}")

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of the reporter, after those calls that failed before."""
        if self._reporter is None:
            return
        self._waiting.append((method, arguments))
        if len(self._waiting) > _WAITING:
            self._waiting.popleft()
            self._lost += 1
        step = f"step {arguments[0]} | " if arguments else ""
        late = len(self._waiting) - 1
        while self._waiting:
            name, given = self._waiting[0]
            try:
                getattr(self._reporter, name)(*given)
            except Exception as error:
                if name == "close":
                    self._log(f"{self._name} cannot be closed: {reason(error)}")
                elif not self._failing:
                    self._log(f"{step}{self._name} is not written: {reason(error)}; every report tries it again")
                self._failing = True
                return
            self._waiting.popleft()
        if self._failing:
            lost = f", {self._lost} are lost" if self._lost else ""
            self._log(f"{step}{self._name} is written again: {late} reports came late{lost}")
        self._failing, self._lost = False, 0

    def close(self) -> None:
        """Close the reporter; what it never took is said."""
        self.call("close")
        missing = len(self._waiting) - 1 + self._lost  # of which one is the call to close it
        if self._failing and missing > 0:
            self._log(f"{self._name} lacks the last {missing} reports")


class Reporters:
    """The console and the reporters of a run; on ranks other than the first, every call does nothing.

    `trackers` makes reporters beside metrics.jsonl, by name. One that fails is told of, and ends no run.
    """

    def __init__(
        self, run: Run, rank: int = 0, trackers: Mapping[str, Callable[[Run], Reporter]] | None = None
    ) -> None:
        self._active, self._steps = rank == 0, run.steps
        self.shown = self._active and sys.stderr.isatty()  # whether there is a progress bar
        self._bar = tqdm(
            total=run.steps, initial=run.start, unit="step", disable=not self.shown, dynamic_ncols=True, leave=False
        )
        self._told = 0.0  # when progress was, by the monotonic clock
        self._outlets: list[_Outlet] = []
        if not self._active:
            return
        self._outlets.append(_Outlet("metrics.jsonl", lambda: MetricsFile(run, self.log), self.log))
        for name, make in (trackers or {}).items():
            self._outlets.append(_Outlet(name, lambda make=make: make(run), self.log))  # type: ignore[misc]

    def advance(self) -> None:
        """Count one step on the progress bar."""
        self._bar.update()

    def rewind(self, step: int) -> None:
        """Show that the run went back; what is reported from now on supersedes what came after that step."""
        self._bar.n = step
        self._bar.refresh()
        self._call("rewind", step)

    def log(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._active:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, step: int, what: str, done: float, total: float, unit: str = "", *, since: float) -> None:
        """Say how far something that takes long is: beside the progress bar, or in a line every 20 seconds.

        It began at `since`, as `time.monotonic` counts seconds.
        """
        if not self._active:
            return
        text = f"{what}: {done:,.0f} of {total:,.0f}{unit and f' {unit}'}"
        if self.shown:
            self._bar.set_postfix_str("" if done >= total else text)
        now = time.monotonic()
        if now - max(self._told, since) > _PROGRESS_S and not self.shown and done < total:
            self.log(f"step {step} | {text}, {now - since:.0f} s so far")
            self._told = now

    def step(self, step: int, values: Mapping[str, float]) -> None:
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
        self.values(step, "train", values)

    def bad_step(
        self, step: int, problem: str, rows: list[int], where: list[str], loss: float, norm: float, total: int
    ) -> None:
        """Report a step that was not taken, the rows [first, end) that it took, and where its loss was not finite."""
        named = f": {', '.join(where[:_NAMED])}" if where else ""
        more = f" and {len(where) - _NAMED} more" if len(where) > _NAMED else ""
        self.log(f"step {step} | bad step {total}, not taken: {problem} | rows {rows[0]} to {rows[1] - 1}{named}{more}")
        values = {"loss": loss, "grad_norm": norm, "total": total}
        self.values(step, "bad_step", {**values, "problem": problem, "rows": rows, "where": where})

    def evaluation(self, step: int, values: Mapping[str, float], average: bool = False, name: str = "") -> None:
        """Report an evaluation of the weights, or of their average: loss, perplexity, bits_per_byte, tokens.

        `name` is that of a validation set, where there are several.
        """
        self.log(
            f"step {step} | {'averaged weights: ' if average else ''}validation{name and f' {name}'} "
            f"loss {values['loss']:.4f} nats/token | perplexity {values['perplexity']:.3f} | "
            f"{values['bits_per_byte']:.4f} bits/byte | {values['tokens']:,.0f} tokens"
        )
        self.values(step, f"validation{'_average' if average else ''}{name and f'/{name}'}", values)

    def sample(self, step: int, text: str) -> None:
        """Report generated text."""
        self.log(f"step {step} | sample: {text!r}")
        self._call("text", step, "sample", text)

    def values(self, step: int, part: str, values: Mapping[str, Any]) -> None:
        """Report figures by name, without a line on the console; charts of a part of your own are part/name."""
        self._call("log", step, part, dict(values))

    def _call(self, method: str, *arguments: Any) -> None:
        for outlet in self._outlets:
            outlet.call(method, *arguments)

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        for outlet in self._outlets:
            outlet.close()
