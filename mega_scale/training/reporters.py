"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases, trackio, or a class of yours.

A reporter takes figures by their names in metrics.jsonl. Trackers show them as charts, whose groups sort in the order
in which people look at them: loss, throughput, optimizer, data, health.
"""

import importlib.util
import json
import math
import platform
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mega_scale.files import append_line, reason, replace_text
from mega_scale.settings import load_object, require

IDENTITIES = "trackers.json"
"""File of a run folder that says under which names trackers know the run."""

_LONGEST_LINE = 2**20  # bytes
_WANDB_S = 30.0  # for its start, and for its end: other ranks wait for this one


@dataclass(frozen=True)
class Run:
    """What trackers are told of a run once, so that it can be told from others and gone on with."""

    folder: Path
    start: int = 0  # optimizer steps done
    steps: int = 1  # of the whole run
    resumed: bool = False  # whether it goes on from a checkpoint
    config: Mapping[str, Any] = field(default_factory=dict)  # sections and keys, as config.yaml has them
    differing: Mapping[str, Any] = field(default_factory=dict)  # dotted keys by which runs are told apart
    facts: Mapping[str, Any] = field(default_factory=dict)  # layout, sizes, versions, commit
    project: str | None = None  # in which W&B and trackio keep it
    reported: Mapping[str, int] = field(default_factory=dict)  # by part, the last step in metrics.jsonl when it began

    def identity(self, tracker: str) -> "Identity":
        """What a tracker knows of the run, by the run folder if it goes on; else a new name. Raises OSError.

        A tracker cannot take back what a run reported between the checkpoint that it goes on from and its end. Those
        steps are noted, so that they are not reported again, however often the run goes on.
        """
        path, known = self.folder / IDENTITIES, {}
        if path.is_file():
            try:
                known = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                known = {}  # half a file: the run gets a new name
        name, steps = (known.get(tracker), known.get(f"{tracker}_steps")) if self.resumed else (None, None)
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,64}", name):
            name, steps = secrets.token_hex(4), {}
        else:
            earlier = steps if isinstance(steps, dict) else {}
            steps = {part: step for part, step in earlier.items() if type(step) is int}
            steps |= {part: max(step, steps.get(part, step)) for part, step in self.reported.items()}
        known |= {tracker: name, f"{tracker}_steps": steps}
        replace_text(path, json.dumps(known) + "\n")
        return Identity(name, steps)


class Identity(NamedTuple):
    """A run as a tracker knows it."""

    name: str
    steps: Mapping[str, int]  # by part, the last step of which it has figures

    def has(self, step: int, part: str) -> bool:
        """Whether a part of a step was reported before this run began."""
        return step <= self.steps.get(part, -1)


class Reporter(Protocol):
    """Takes what a run reports; a class of yours is made as `YourReporter(run)`, on the first rank only.

    An error that one of these methods raises is told in one line and ends no run; the call is tried again later.
    """

    def log(self, step: int, part: str, values: Mapping[str, Any]) -> None:
        """Take figures of a step; `part` is train, validation, validation/SET, bad_step, or a callback's own name."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text, such as a generated sample."""

    def rewind(self, step: int) -> None:
        """Note that the run went back to a step: what it reported after that is superseded."""

    def close(self) -> None:
        """Write what is left; nothing comes after."""


# Charts

_GROUPS = {
    "model_throughput": ("tokens_per_second", "step_seconds", "mfu"),
    "optimizer": ("lr", "grad_norm"),
    "training_data": ("tokens", "epochs", "sequence_length", "padding", "loader_wait", "bad_rows", "lost_bytes"),
    "training_health": ("bad_steps", "memory_gib"),
}


def charts(part: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of the charts that show figures; trackers sort them by name, and loss/ comes first."""
    shown = {name: value for name, value in values.items() if type(value) in (int, float)}
    shown.pop("eta_seconds", None)
    if "memory_bytes" in shown:
        shown["memory_gib"] = shown.pop("memory_bytes") / 2**30
    for name, value in shown.items():
        section, _, rest = part.partition("/")
        suffix = f"/{rest}" if rest else ""
        if part == "bad_step":
            if name == "total":
                yield "training_health/bad_steps", value
        elif section in ("validation", "validation_average"):
            chart = section if name == "loss" else f"{section}_{name}"
            yield f"{'training_data' if name == 'tokens' else 'loss'}/{chart}{suffix}", value
        elif part != "train":
            yield f"{part}/{name}", value
        elif name == "loss":
            yield "loss/train", value
        else:
            first = name.partition("/")[0]
            yield f"{next((group for group, names in _GROUPS.items() if first in names), 'train')}/{name}", value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested sections."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def versions(*packages: str) -> dict[str, str]:
    """Releases of Python, of this package and of others that are installed; the checkout's commit if there is one."""
    found = {"python": platform.python_version()}
    for package in ("mega_scale", "torch", "transformers", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if (root / ".git").exists():
        try:
            found["commit"] = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found["commit"] = "unknown"
    return found


# The reporters


class MetricsFile:
    """metrics.jsonl: a JSON line a report, with the time in seconds since the epoch.

    What it holds from the run's first step on is superseded. A first line, `part` run, has the run's facts.
    """

    def __init__(self, run: Run, log: Callable[[str], None]) -> None:
        self._path, self._run, self._log, self._described = run.folder / "metrics.jsonl", run, log, not run.facts
        try:
            self._supersede(run.start)
        except OSError as error:
            log(f"{self._path.name} keeps what it held: {reason(error)}")

    def _supersede(self, start: int) -> None:
        """Keep what was written up to a step; what is no line of it goes into a file beside it."""
        kept, bad = [], []
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
            self._log(f"{len(bad)} lines of {self._path} cannot be read: they are in {aside.name} now")
        replace_text(self._path, "".join(line + "\n" for line in kept))

    def log(self, step: int, part: str, values: Mapping[str, Any]) -> None:
        if not self._described:  # not before there is something to report: the line makes the folder one of a run
            self._append(self._run.start, "run", self._run.facts)
            self._described = True
        self._append(step, part, values)

    def _append(self, step: int, part: str, values: Mapping[str, Any]) -> None:
        # JSON has no word for what is not finite.
        known = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        append_line(self._path, json.dumps({"step": step, "part": part, "time": round(time.time(), 3), **known}))

    def text(self, step: int, name: str, text: str) -> None: ...

    def rewind(self, step: int) -> None: ...  # its lines stay, and later ones supersede them

    def close(self) -> None: ...


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics.jsonl that can be read, as objects with a `step` and a `part`. Raises OSError."""
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("part"), str):
            yield row


def last_steps(run_dir: Path) -> dict[str, int]:
    """By part, the last step in a run's metrics.jsonl; empty where there is none that can be read."""
    path, found = run_dir / "metrics.jsonl", dict[str, int]()
    try:
        for row in rows(path) if path.is_file() else ():
            found[row["part"]] = max(row["step"], found.get(row["part"], row["step"]))
    except OSError:
        return {}
    return found


def read_charts(run_dir: Path) -> dict[str, list[dict[str, float]]]:
    """Points of a run's charts by name, in order: step, value, and where they are known tokens and hours.

    A step that was done again, after a rollback, counts as it was last. Raises ValueError where there is no point.
    """
    path = run_dir / "metrics.jsonl"
    found: list[dict[str, Any]] = []
    for row in rows(path) if path.is_file() else ():
        first = len(found)
        while row["part"] == "train" and first and found[first - 1]["step"] >= row["step"]:
            first -= 1
        if any(old["part"] == "train" or old["step"] > row["step"] for old in found[first:]):
            del found[first:]
        found.append(row)
    charts_of: dict[str, list[dict[str, float]]] = {}
    began = next((row["time"] for row in found if "time" in row), 0.0)
    tokens = {row["step"]: row["tokens"] for row in found if row["part"] == "train" and "tokens" in row}
    for row in found:
        place = {"step": row["step"]}
        if row["step"] in tokens:
            place["tokens"] = tokens[row["step"]]
        if "time" in row:
            place["hours"] = (row["time"] - began) / 3600
        for name, value in charts(row["part"], {key: row[key] for key in row.keys() - {"step", "part", "time"}}):
            charts_of.setdefault(name, []).append({**place, "value": value})
    if not charts_of:
        raise ValueError(f"{path} has no figures to draw: name the folder of a run that has reported a step")
    return charts_of


class TensorBoard:
    """Events in the tensorboard folder of the run; those after the run's first step are superseded."""

    def __init__(self, run: Run) -> None:
        self._folder = run.folder / "tensorboard"
        earlier = self._earlier(run)
        # Points after `start` are superseded, and those at it where nothing is done yet.
        self._open(run.start + 1 if run.start else 0)
        for row in earlier:
            self.log(row.pop("step"), row.pop("part"), row)
        self._describe(run)

    def _open(self, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(self._folder), purge_step=purge_step)

    def _earlier(self, run: Run) -> list[dict[str, Any]]:
        """Rows of a run that earlier versions began, whose charts had other names: they are drawn anew."""
        path = run.folder / "metrics.jsonl"
        old = [row for row in rows(path) if "time" not in row] if run.start and path.is_file() else []
        if not old or any(b"loss/train" in file.read_bytes() for file in self._folder.glob("events.out.tfevents.*")):
            return []
        return old

    def _describe(self, run: Run) -> None:
        """The run as texts and as hparams, and a page of charts in the order of their groups."""
        if not run.facts:
            return
        from torch.utils.tensorboard.summary import hparams

        facts = flatten(run.facts)
        table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
        self._writer.add_text("run/facts", f"| fact | value |\n|---|---|\n{table}", run.start)
        self.text(run.start, "run/config", json.dumps(run.config, indent=2, default=str))
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in (facts | flatten(run.differing)).items()
            if value is not None
        }
        # Without the first part, the experiment's, TensorBoard has the keys of all runs, those that differ first.
        for summary in hparams(plain, {})[1:]:
            self._writer.file_writer.add_summary(summary)
        layout = {"loss": {"train and validation": ["Multiline", ["loss/train$", "loss/validation(/.*)?$"]]}}
        for group, names in _GROUPS.items():
            layout[group] = {name: ["Multiline", [f"{group}/{name}"]] for name in names}
        self._writer.add_custom_scalars(layout)
        self._writer.flush()

    def _write(self, act: Callable[[Any], None]) -> None:
        if self._writer is None:
            self._open()
        try:
            act(self._writer)
            self._writer.flush()
        except OSError:  # after which its thread has ended
            self._writer = None
            raise

    def log(self, step: int, part: str, values: Mapping[str, Any]) -> None:
        def add(writer: Any) -> None:
            for name, value in charts(part, values):
                writer.add_scalar(name, value, step)

        self._write(add)

    def text(self, step: int, name: str, text: str) -> None:
        self._write(lambda writer: writer.add_text(name, "    " + text.replace("\n", "\n    "), step))

    def rewind(self, step: int) -> None:
        self.close()
        self._open(step + 1)

    def close(self) -> None:
        if self._writer is not None:
            self._write(lambda writer: writer.close())


class WeightsAndBiases:
    """A W&B run, whose files lie in the run folder; its variables (WANDB_MODE=offline, WANDB_PROJECT) count."""

    def __init__(self, run: Run) -> None:
        import wandb

        settings = wandb.Settings(console="off", init_timeout=_WANDB_S, finish_timeout=_WANDB_S, silent=True)
        config = {**run.config, "facts": dict(run.facts)}
        self._known = run.identity("wandb")
        self._run: Any = wandb.init(
            project=run.project, name=run.folder.name, id=self._known.name, resume="allow", dir=str(run.folder),
            config=config, settings=settings,
        )  # fmt: skip
        self._run.config.update(config, allow_val_change=True)
        self.where = self._run.url or f"wandb sync {self._run.dir.removesuffix('/files')}"
        # W&B's own steps only rise, ours may go back.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, part: str, values: Mapping[str, Any]) -> None:
        if not self._known.has(step, part):
            self._run.log({**dict(charts(part, values)), "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        if not self._known.has(step, "train"):
            self._run.log({name: wandb.Html(f"<pre>{_escape(text)}</pre>"), "step": step})

    def rewind(self, step: int) -> None: ...

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A trackio run; its variables (TRACKIO_DIR, TRACKIO_SPACE_ID) say where it is kept."""

    def __init__(self, run: Run) -> None:
        import trackio

        self._known = run.identity("trackio")
        name = f"{run.folder.name}-{self._known.name}"
        config = flatten(run.config) | flatten(run.facts)
        known = {key: value for key, value in config.items() if not key.startswith("_")}
        self._run: Any = trackio.init(
            project=run.project or "mega_scale", name=name, config=known, resume="allow", embed=False
        )
        self.where = f"project {run.project or 'mega_scale'}, run {name}"

    def log(self, step: int, part: str, values: Mapping[str, Any]) -> None:
        if not self._known.has(step, part):
            self._run.log(dict(charts(part, values)), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        import trackio

        if not self._known.has(step, "train"):
            self._run.log({name: trackio.Markdown(f"```\n{text}\n```")}, step=step)

    def rewind(self, step: int) -> None: ...

    def close(self) -> None:
        self._run.finish()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


# Which of them a run has

TRACKERS: dict[str, tuple[str, Callable[[Run], Reporter]]] = {
    "wandb": ("wandb", WeightsAndBiases),
    "trackio": ("trackio", Trackio),
}
"""Trackers that train.trackers names: the package that each needs, and its class."""


def find_trackers(names: list[str]) -> dict[str, Callable[[Run], Reporter]]:
    """Classes of `train.trackers`, by name; refuses (ValueError) a name that is none, and a package that is missing."""
    found: dict[str, Callable[[Run], Reporter]] = {}
    for name in names:
        if name in TRACKERS:
            package, found[name] = TRACKERS[name]
            remedy = f"the package {package} is not installed: pip install {package}, or leave it out"
            require(importlib.util.find_spec(package) is not None, "train.trackers", name, remedy)
        else:
            others = f"choose {' or '.join(TRACKERS)}, or name a class as MODULE:CLASS or FILE.py:CLASS"
            found[name] = load_object(name, "train.trackers", others)
    return found
