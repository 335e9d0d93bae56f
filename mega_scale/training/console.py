"""What a run says: the table at its start, a line a report, progress of what takes long, the line at its end.

All that is said about figures goes to the run's reporters, too.
"""

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm import tqdm

from mega_scale.checkpoint.saver import Saved
from mega_scale.config import RunConfig, load_config, section_of
from mega_scale.files import installed, reason
from mega_scale.settings import values_of
from mega_scale.training.config import schedule_changes
from mega_scale.training.metrics import memory_bytes
from mega_scale.training.reporters import MetricsFile, Reporter, Run, last_steps, versions
from mega_scale.training.stopping import Progress

if TYPE_CHECKING:
    from mega_scale.training.trainer import Trainer

_NAMED = 8  # ranks in a line
_WAITING = 1000  # calls that a reporter which fails may make up for
_PROGRESS_S = 20.0  # between two lines of progress
# Keys by which runs are told apart even where they have the defaults.
_ALWAYS = ("optimizer.lr", "train.steps", "train.global_batch_size", "train.seed", "data.sequence_length")
_FIGURES = 3
# Keys by which the same run would have other numbers; of those of `parallel`, another line tells.
_NUMBERS: tuple[str, ...] = ("model.", "data.", "optimizer.", "schedule.", "bad_steps.", "parallel.ds_config")
_NUMBERS += tuple(
    f"train.{key}" for key in ("steps", "global_", "micro_", "seed", "dtype", "compile", "eval_batches", "weight_")
)
_SILENT = ("data.workers", "data.prefetch", "data.cache_dir")
_LONGEST = 80  # characters of a value in a line


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


# The run in a table at its start, in facts for its trackers, and in one line at its end


def short(count: float) -> str:
    """A large number in a few digits: 672K, 1.38B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.{_FIGURES}g}{name}"
    return f"{count:g}"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def describe_run(trainer: "Trainer", parameters: int) -> Run:
    """The run as its trackers are told of it."""
    config = trainer.config
    packages = {"deepspeed": ("deepspeed",), "fsdp": ()}[config.parallel.engine]
    defaults = values_of(RunConfig()) | values_of(type(config.model)(), "model.") | {"model.type": "mega"}
    differing = {key: value for key, value in values_of(config).items() if key in _ALWAYS or value != defaults[key]}
    facts = {
        "parameters": parameters,
        "parameters_per_rank": trainer.parameters_per_rank,
        "training_tokens": trainer.loader.dataset.tokens,
        "tokens_per_step": config.train.global_batch_size * config.data.sequence_length,
        "ranks": trainer.world.size,
        "device": _device(trainer.world.device),
        "layout": trainer.layout,
        "versions": versions(*packages),
    }
    return Run(
        trainer.run_dir,
        trainer.progress.step,
        config.train.steps,
        trainer.checkpoint is not None,
        dataclasses.asdict(config),
        differing,
        facts,
        config.train.tracker_project,
        last_steps(trainer.run_dir) if trainer.checkpoint is not None else {},
    )


def table(trainer: "Trainer", parameters: int) -> dict[str, str]:
    """What runs, in eight rows, or nine under tp."""
    config, model, world, progress = trainer.config, trainer.model_config, trainer.world, trainer.progress
    train, data, length = config.train, config.data, config.data.sequence_length
    dataset, micro, dp = trainer.loader.dataset, config.train.micro_batch_size, trainer.mesh.dp
    tokens = train.global_batch_size * length
    validation = "" if trainer.validation is None else f", {short(trainer.validation.tokens)} to validate"
    total = f"{train.steps:,} steps = {short(train.steps * tokens)} tokens"
    if dataset.tokens:
        total += f" ({train.steps * tokens / dataset.tokens:.{_FIGURES}g} epochs)"
    known = "a stream of" if dataset.tokens is None else short(dataset.tokens)
    layout, ranks = trainer.layout, f"{world.size} rank{'s' if world.size > 1 else ''}"
    axes = " x ".join(f"{name} {size}" for name, size in zip(trainer.mesh._fields, trainer.mesh, strict=True))
    state = _state_bytes(trainer, parameters)
    trackers = ["metrics.jsonl", *trainer.trackers]
    if "TensorBoard" in trackers:
        trackers[-1] += f"; tensorboard --logdir {trainer.run_dir}"
    begun = "a new run" if trainer.checkpoint is None else f"{trainer.checkpoint}"
    if trainer.checkpoint is None and config.init_from is not None:
        begun += f" with the weights of {config.init_from}"
    every = f"a checkpoint every {config.checkpoint.every} steps" if config.checkpoint.every else "one checkpoint"
    sharing = {"tp": f"collectives are waited for: {world.waits}"} if world.waits else {}
    if world.axes["tp"].overlaps:
        sharing["tp"] = "collectives travel beside products, by symmetric memory"
    return {
        "model": f"{model.model_type}, {short(parameters)} parameters ({model.num_hidden_layers} layers of "
        f"{model.hidden_size}, vocabulary {model.vocab_size:,}), {train.dtype}",
        "data": f"{_source(data)}, tokenizer {data.tokenizer}: {known} tokens{validation}, in rows of "
        f"{data.length_schedule if data.lengths else f'{length:,}'}",
        "batch": f"{train.global_batch_size} rows, {short(tokens)} tokens a step ({dp} x {micro} rows x "
        f"{train.global_batch_size // (micro * dp)} accumulated); {total}",
        "layout": f"{ranks} ({axes}), {layout['engine']} ZeRO-{layout['zero_stage']}, {_device(world.device)}",
        **sharing,
        "memory": f"{gib(state)} a rank for weights, gradients and moments of {short(trainer.parameters_per_rank)} "
        f"parameters, activations not counted; {gib(memory_bytes(world.device))} in use of {gib(_total(world.device))}",
        "run folder": f"{config.run_dir}, {every}",
        "trackers": ", ".join(trackers),
        "resume": f"from step {progress.step} of {train.steps}: {begun}",
    }


def header(trainer: "Trainer", parameters: int) -> list[str]:
    """What runs, in a line a row, then what there is to say of the text."""
    rows = table(trainer, parameters)
    width = max(map(len, rows))
    validation = [] if trainer.validation is None else trainer.validation.tally.lines()
    lines = [f"{name:<{width}} | {text}" for name, text in rows.items()]
    return [*lines, *trainer.loader.dataset.tally().lines(), *(f"validation text: {line}" for line in validation)]


def save_line(run_dir: str, saved: Saved) -> str:
    """How a save ended."""
    if saved.folder is None:
        return f"step {saved.step} | checkpoint not written, older ones are untouched: {saved.problem}"
    figures = f"{saved.bytes / 1e6:,.1f} MB in {saved.write_s:.2f} s, training stood still {saved.stall_s:.2f} s"
    place = f"{run_dir}/checkpoints/{saved.folder.name}"
    return f"step {saved.step} | saved {place} ({figures}){saved.problem and f'; {saved.problem}'}"


def end_line(run_dir: str, progress: Progress, steps: int, stopped: str | None, began: float) -> str:
    """What was reached, where it lies, and what to do next; `began` is a time of `time.monotonic`."""
    place = None if progress.folder is None else f"{run_dir}/checkpoints/{progress.folder.name}"
    reached = f"step {progress.step} of {steps} in {duration(time.monotonic() - began)}"
    if progress.evaluation is not None:
        reached += f", validation loss {progress.evaluation['loss']:.4f}"
    if stopped is not None:
        return f"stopped at {reached} ({stopped}); it lies in {place}; go on: the same command with --resume"
    export = Path("exports") / Path(run_dir).name
    command = "mega-scale export" if installed() else "python launch/export.py"
    return f"finished {reached}; it lies in {place}; next: {command} {run_dir} {export}"


def _source(data: Any) -> str:
    named = data.path or data.hub_name
    return f"{data.source} {', '.join(named) if isinstance(named, list) else named}" if named else str(data.source)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _total(device: torch.device) -> int:
    """Memory of a GPU, or of this machine for all its ranks (bytes)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _state_bytes(trainer: "Trainer", parameters: int) -> float:
    """What this rank keeps of weights, gradients and moments, in fp32, as the ZeRO stage shards them (bytes)."""
    stage, mesh = trainer.config.parallel.zero_stage, trainer.mesh
    whole = parameters / mesh.tp
    sharded = whole / (mesh.dp_shard * mesh.sp)
    gradients, moments = (sharded if stage >= least else whole for least in (2, 1))
    average = moments if trainer.engine.averages else 0
    return 4 * (trainer.parameters_per_rank + gradients + 2 * moments + average)


def changes(config: RunConfig, checkpoint: Path, step: int) -> str:
    """Say in one line which keys that decide the numbers differ from those of a checkpoint; empty where none does.

    `checkpoint` is verified; `step` is the number of optimizer steps that it has done.
    """
    from mega_scale.training.trained_model import read_model  # takes a second, which a new run does without

    try:
        before = dataclasses.replace(load_config(checkpoint / "config.yaml"), model=section_of(read_model(checkpoint)))
    except ValueError as error:
        return f"the keys of the checkpoint cannot be compared: {error}"
    differing = []
    earlier = values_of(before)
    for key, now in values_of(config).items():
        then = earlier.get(key)
        if key.startswith(_NUMBERS) and key not in _SILENT and now != then:
            texts = (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in (str(now), str(then)))
            differing.append("{}={} (was {})".format(key, *texts))
    if not differing:
        return ""
    line = f"resumed with other keys: {', '.join(differing)}"
    return "; ".join(filter(None, (line, schedule_changes(config, before, step))))
