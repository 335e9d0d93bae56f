"""A command of the user's, such as lm_eval, on a fresh export every few steps, beside the training.

The first rank starts it when a checkpoint is complete: a process exports that checkpoint, another one runs the command,
and a thread waits for both. Training goes on meanwhile, on all ranks. Whatever goes wrong is a line of the log.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mega_scale.files import discard, forget, reason, shipped
from mega_scale.settings import require

if TYPE_CHECKING:
    from mega_scale.training.trainer import Trainer

FOLDER = "eval_command"
"""Folder of a run for what its commands print and write."""

# Variables by which launchers tell a process its place among the ranks, of which a command is none.
_OF_RANKS = (
    "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "PARALLELISM_CONFIG_",
    "FSDP_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "CROSS_",
)  # fmt: skip
_LONGEST = 2**24  # bytes of JSON
_NAMED = 6  # figures in a line
_POLL_S = 0.5  # between two looks at a command
_RESERVED = ("step", "part", "time")  # what a line of metrics.jsonl says itself


def words_of(command: str, averages: bool = True) -> list[str]:
    """The words of `train.eval_command`, as a shell would split them. Raises ValueError where it cannot run.

    `averages` says whether the run keeps an average of its weights.
    """
    try:
        words, problem = shlex.split(command), ""
    except ValueError as error:
        words, problem = [], f"it cannot be split into words ({error}), correct its quotes"
    require(not problem, "train.eval_command", command, problem)
    require(bool(words), "train.eval_command", command, "it is empty, give a command, or null")
    remedy = "it names no model, write {model}, or {average}, where the folder of the fresh export belongs"
    require("{model}" in command or "{average}" in command, "train.eval_command", command, remedy)
    remedy = "the run keeps no average of its weights, set train.weight_average, or write {model}"
    require(averages or "{average}" not in command, "train.eval_command", command, remedy)
    remedy = f"there is no program {words[0]}, install it, or give its path"
    require(shutil.which(words[0]) is not None, "train.eval_command", command, remedy)
    return words


def figures_of(found: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Finite numbers in nested objects of JSON, by their keys joined with slashes; of lm_eval's, those in `results`."""
    if not prefix and isinstance(found, Mapping) and isinstance(found.get("results"), Mapping):
        found = found["results"]
    if isinstance(found, Mapping):
        for name, value in found.items():
            yield from figures_of(value, f"{prefix}/{name}" if prefix else str(name))
    elif prefix and type(found) in (int, float) and math.isfinite(found):
        yield prefix, found


class EvalCommand:
    """Runs the command of a run, one at a time; only on the first rank is anything started.

    `report` is given a step, a part of metrics.jsonl and figures; `held` holds steps whose checkpoints are not to be
    deleted. Raises ValueError where the command cannot run.
    """

    def __init__(
        self,
        command: str,
        timeout_s: float,
        run_dir: Path,
        key_file: str | None,
        held: set[int],
        log: Callable[[str], None],
        report: Callable[[int, str, Mapping[str, Any]], None],
    ) -> None:
        self._words, self._timeout_s, self._folder = words_of(command), timeout_s, run_dir / FOLDER
        self._key, self._held = [] if key_file is None else ["--key-file", key_file], held
        self._log, self._report = log, report
        self._step, self._next = 0, None
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = ""  # why it was ended, if it was
        self._result: Future[dict[str, float]] | None = None

    _next: tuple[int, Path] | None

    def start(self, step: int, checkpoint: Path, last: bool) -> None:
        """Run on the checkpoint of a step, unless it runs already; the `last` one of a run then waits for its turn."""
        if not self.poll():
            if last:
                self._next = step, checkpoint
            else:
                self._log(f"step {step} | eval_command is left out: that of step {self._step} still runs")
            return
        self._step, self._ended, self._result = step, "", Future()
        self._held.add(step)
        threading.Thread(target=self._run, args=(checkpoint,), name="eval_command", daemon=True).start()

    def poll(self) -> bool:
        """Report what has come out, and start what waits; whether nothing runs."""
        if self._result is None or not self._result.done():
            return self._result is None
        result, self._result = self._result, None
        problem = "" if (error := result.exception()) is None else self._ended or reason(error)
        if problem:
            self._log(f"step {self._step} | eval_command failed: {problem}; see {self._path()}")
        else:
            figures = result.result()
            self._report(self._step, FOLDER, figures)
            shown = ", ".join(f"{name} {value:.6g}" for name, value in list(figures.items())[:_NAMED])
            more = f" and {len(figures) - _NAMED} more" if len(figures) > _NAMED else ""
            self._log(f"step {self._step} | eval_command: {shown}{more}")
        if self._next is not None:
            waiting, self._next = self._next, None
            self.start(*waiting, last=True)
            return False
        return True

    def end(self, why: str) -> None:
        """End what runs, and wait for that; nothing is started any more."""
        self._next = None
        if self._result is not None:
            self._ended = why
            self._kill()
            with contextlib.suppress(Exception):
                self._result.exception(timeout=10)
            self.poll()

    def _path(self) -> Path:
        return self._folder / f"step-{self._step:08d}"

    def _run(self, checkpoint: Path) -> None:
        assert self._result is not None
        try:
            figures = self._figures(checkpoint)
        except BaseException as error:  # whatever it is, the run goes on and says it
            self._result.set_exception(error)
        else:
            self._result.set_result(figures)

    def _figures(self, checkpoint: Path) -> dict[str, float]:
        """Export what the command names, run it, and read what it found; the exports are gone afterwards."""
        folder, deadline = self._path(), time.monotonic() + self._timeout_s
        output, printed = folder / "output", folder / "out.txt"
        exports = {"{model}": (folder / "model", []), "{average}": (folder / "average", ["--average"])}
        exports = {name: export for name, export in exports.items() if any(name in word for word in self._words)}
        try:
            discard(folder)
            folder.mkdir(parents=True)
            export = [sys.executable, str(shipped("launch") / "export.py"), str(checkpoint)]
            try:
                for model, options in exports.values():
                    self._call("the export", [*export, str(model), *options, *self._key], printed, deadline)
            finally:
                self._held.discard(self._step)
            names = {name: str(model) for name, (model, _) in exports.items()}
            names |= {"{output}": str(output), "{step}": str(self._step)}
            words = self._words
            for name, value in names.items():
                words = [word.replace(name, value) for word in words]
            self._call("the command", words, printed, deadline)
            return _read(output, printed)
        finally:
            for model, _ in exports.values():
                forget(model)

    def _call(self, what: str, words: list[str], printed: Path, deadline: float) -> None:
        """Run a program to its end. Raises RuntimeError where that is not a good one."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_RANKS)}
        with printed.open("wb") as out, printed.with_name("log.txt").open("ab") as log:
            # In a session of its own, so that what it starts ends with it, and Ctrl-C reaches the run alone.
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=environment, start_new_session=True
            )
        try:
            code = self._process.wait(0 if self._ended else max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
            raise RuntimeError(f"{what} took longer than train.eval_command_timeout_s={self._timeout_s:g}") from None
        if code:
            raise RuntimeError(f"{what} ended with exit code {code}")

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def finish_command(trainer: "Trainer", stopped: str | None) -> None:
    """Wait for the command of a run, as long as it may take, unless the run is to stop (`stopped`); collective."""
    command = trainer.eval_command
    while stopped is None:
        trainer.watchdog.beat("waiting for eval_command")
        done = command is None or command.poll()
        if trainer.world.all_agree(done) or trainer.stopping.agreed():
            break
        time.sleep(_POLL_S)
    if command is not None:
        command.end("the run stops")


def _read(output: Path, printed: Path) -> dict[str, float]:
    """Figures of the newest JSON file that the command wrote, else of the last line of JSON that it printed."""
    written = [output] if output.is_file() else sorted(output.rglob("*.json"), key=lambda path: path.stat().st_mtime)
    if written:
        found = json.loads(_text(written[-1]))
    else:
        lines = [line for line in _text(printed).splitlines() if line.lstrip().startswith("{")]
        found = json.loads(lines[-1]) if lines else {}
    figures = {name: value for name, value in figures_of(found) if name not in _RESERVED}
    if not figures:
        raise RuntimeError("it gave no figures: print a line of JSON last, or write a JSON file to {output}")
    return figures


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise RuntimeError(f"{path.name} has more than {_LONGEST:,} bytes: write the figures alone")
    return content.decode("utf-8", errors="replace")
