"""When a run stops or goes back: signals, the clock, bad steps and ranks that hang; `status.json` says how it ended.

No rank takes a step whose loss or gradient is not finite, or whose loss jumps. Too many in a row end the run, or take
it back to its last checkpoint, from where it goes on without the data that did it.
"""

import faulthandler
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import Tensor

from mega_scale.files import replace_text
from mega_scale.parallel import World
from mega_scale.parallel.mesh import MeshShape
from mega_scale.process import DIVERGED, PEER_LOST, Standing, StopSignals, write_stderr
from mega_scale.training.config import BadStepsConfig

if TYPE_CHECKING:
    from mega_scale.training.trainer import StepResult, Trainer

_MARGIN = 1.2  # steps and saves are not all alike
_TO_LEAVE_S = 2.0  # for leaving the process group, and for Python's end
_UNKNOWN_SAVE_S = 60.0
_UNKNOWN_SAVE_SHARE = 0.1

_LOOKS = 10  # of the watchdog in a timeout
_LONGEST_PAUSE_S = 5.0
_EARLY = 0.9


# How far a run is


@dataclass
class BadSteps:
    """What a run remembers of its bad steps, and what `trainer.json` has of it."""

    total: int = 0
    in_a_row: int = 0  # since the last good one
    rollbacks: int = 0  # how often the run went back
    losses: list[float] = field(default_factory=list)  # of the last good steps, nats per token
    # Data steps to skip, in order, [first, end) each. Without any, optimizer step s takes data step s - 1.
    skipped: list[list[int]] = field(default_factory=list)


@dataclass
class Progress:
    """How far a run is; the same on all ranks."""

    config: BadStepsConfig
    step: int = 0  # optimizer steps done, bad ones included
    tokens: int = 0  # seen in them
    bad: BadSteps = field(default_factory=BadSteps)
    evaluation: dict[str, Any] | None = None  # figures of the model as it is; None where it was not evaluated
    saved: int | None = None  # optimizer steps in the newest checkpoint, None where there is none
    folder: Path | None = None  # of that checkpoint

    def __post_init__(self) -> None:
        self.position = self.data_step(self.step + 1)  # data steps before the next optimizer step

    @classmethod
    def resume(cls, config: BadStepsConfig, folder: Path, state: dict[str, Any]) -> "Progress":
        """A run as `trainer.json` of a checkpoint's folder has it; the oldest ones know of no bad steps."""
        bad = BadSteps(**state.get("bad_steps", {}))
        bad.losses = bad.losses[-config.spike_window :] if config.spike_deviations else []
        return cls(config, state["step"], state["tokens"], bad, state.get("validation"), state["step"], folder)

    def data_step(self, step: int) -> int:
        """Data steps before an optimizer step (1 for the first), skipped ones included."""
        position = step - 1
        for first, end in self.bad.skipped:
            if position >= first:
                position += end - first
        return position

    def problem(self, loss: float) -> str | None:
        """What is wrong with a loss (nats per token), in words; None for a good one. Changes nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        losses = self.bad.losses
        if not self.config.spike_deviations or len(losses) < self.config.spike_window:
            return None
        mean = statistics.fmean(losses)
        limit = mean + self.config.spike_deviations * statistics.pstdev(losses, mean)
        return f"the loss {loss:.4f} is above {limit:.4f}, the limit for spikes" if loss > limit else None

    def count(self, tokens: int, loss: float, taken: bool) -> None:
        """Count a step by the tokens and the loss of its global batch (nats per token), taken or bad."""
        self.step, self.tokens, self.evaluation = self.step + 1, self.tokens + tokens, None
        self.position = self.data_step(self.step + 1)
        self.bad.total += not taken
        self.bad.in_a_row = 0 if taken else self.bad.in_a_row + 1
        if taken and self.config.spike_deviations:
            self.bad.losses = [*self.bad.losses, loss][-self.config.spike_window :]

    def go_back(self, folder: Path, state: dict[str, Any]) -> list[int]:
        """Become what a checkpoint has; returns the data steps after it to skip from now on, [first, end)."""
        first = max(self.step - self.bad.in_a_row, state["step"]) + 1
        skipped = [self.data_step(first), self.data_step(self.step) + 1]
        old = state.get("bad_steps", {})
        outside = [part for part in old.get("skipped", []) if part[0] < skipped[0] or part[1] > skipped[1]]
        now = {"rollbacks": self.bad.rollbacks + 1, "total": self.bad.total, "in_a_row": 0}
        state = state | {"bad_steps": old | now | {"skipped": sorted([*outside, skipped])}}
        vars(self).update(vars(Progress.resume(self.config, folder, state)))
        return skipped


def rows_of(position: int, shares: Tensor, ranks: MeshShape, rows: int) -> tuple[list[int], list[str]]:
    """Rows of the run's data that a bad step took, [first, end); rank and rows of micro-batches with no finite loss.

    `position` counts the data steps before it, `shares` (ranks, micro-batches) are the losses of so many `rows` each.
    """
    micro_batches = shares.shape[1]
    first = position * micro_batches * ranks.dp * rows
    found = []
    for rank, i in (~shares.isfinite()).nonzero().tolist():
        begin = first + (i * ranks.dp + ranks.dp_rank(rank)) * rows
        found.append(f"rank {rank}, rows {begin} to {begin + rows - 1}")
    return [first, first + micro_batches * ranks.dp * rows], found


def after_bad_step(trainer: "Trainer", result: "StepResult") -> bool:
    """Report a step that was not taken; too many in a row end the run, or roll it back, which is returned; collective.

    Raises EndOfRunError where it cannot go back.
    """
    progress, world, config = trainer.progress, trainer.world, trainer.config.bad_steps
    bad, shares = progress.bad, world.all_gather(result.shares)
    position = progress.data_step(progress.step)
    rows, where = rows_of(position, shares, world.shape, trainer.config.train.micro_batch_size)
    trainer.reporter.bad_step(progress.step, str(result.problem), rows, where, result.loss, result.norm, bad.total)
    if bad.in_a_row < config.in_a_row:
        return False
    trainer.log_saves(trainer.saver.finish())
    step, what = progress.step, f"{bad.in_a_row} bad steps in a row up to step {progress.step}: {result.problem}"
    if progress.folder is None or bad.rollbacks >= config.rollbacks:
        last = f"the last good checkpoint is {progress.folder}"
        if progress.folder is None:
            last = "there is no checkpoint before them"
        remedy = "look at those rows, lower optimizer.lr, or set bad_steps.rollbacks"
        raise EndOfRunError(DIVERGED, f"{what}; {last}; {remedy}")
    from mega_scale.checkpoint.state import load_checkpoint

    row = rows[1] - rows[0]
    trainer.watchdog.beat("going back")
    skipped = progress.go_back(progress.folder, load_checkpoint(progress.folder, trainer.engine, world))
    trainer.reporter.rewind(progress.step)
    trainer.reporter.log(
        f"step {step} | {what}; went back to step {progress.step}, and leave out rows {skipped[0] * row} to "
        f"{skipped[1] * row - 1} ({progress.bad.rollbacks} of {config.rollbacks} rollbacks)"
    )
    return True


# What ends it


class EndOfRunError(Exception):
    """Ends the run in one line; raised on all ranks alike, with the exit code of the process."""

    def __init__(self, code: int, line: str) -> None:
        super().__init__(line)
        self.code = code


class OutOfMemory(SystemExit):
    """Ends this rank, with exit code 1 and a line that says what held its memory, and which keys lower it."""

    def __init__(self, line: str) -> None:
        super().__init__(1)
        self.line = line

    def __str__(self) -> str:
        return self.line


class StopRun(Exception):
    """All ranks agreed to stop; raised on all of them at the same place."""


class Stopping:
    """Whether the run is to stop, as all ranks see it: a signal asks, or time runs out.

    Time runs out when the longest step and the longest save so far (`step_s` and `save_s`, which the trainer notes),
    and a fifth more of both, would end later than `limit_s` after `since`, the start of this process (seconds since
    the epoch). Before the first save, one is taken to last a minute, or a tenth of the limit if that is less.
    """

    def __init__(
        self, world: World, signals: StopSignals, limit_s: float = math.inf, since: float | None = None
    ) -> None:
        self._world, self._signals, self._limit_s = world, signals, limit_s
        self._since = psutil.Process().create_time() if since is None else since
        self._agreed = False
        self.step_s = self.save_s = 0.0

    def wanted(self) -> bool:
        """Whether this rank wants to stop; not collective."""
        return self._signals.asked is not None or (self._limit_s < math.inf and self.time_over())

    def time_over(self) -> bool:
        """Whether the clock says so."""
        save_s = self.save_s or min(_UNKNOWN_SAVE_S, _UNKNOWN_SAVE_SHARE * self._limit_s)
        return time.time() - self._since + _MARGIN * (self.step_s + save_s) + _TO_LEAVE_S > self._limit_s

    def agreed(self, wanting: int | None = None) -> bool:
        """Whether any rank wanted to stop: `wanting` is their number; without it, all are asked (collective)."""
        if not self._agreed:
            self._agreed = bool(self._world.sum(torch.tensor(int(self.wanted()))) if wanting is None else wanting)
        return self._agreed

    def reason(self) -> str:
        """Say why the run stops; collective, the same on all ranks."""
        own = signal.Signals[self._signals.asked].value if self._signals.asked else 0
        votes = self._world.all_gather(torch.tensor([own, int(self.time_over())]))[:, 0].tolist()
        causes = []
        for number in sorted({*votes} - {0}):
            ranks = [rank for rank, vote in enumerate(votes) if vote == number]
            named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
            whole = len(ranks) == len(votes) > 1
            causes.append(f"{signal.Signals(number).name} on {'all ranks' if whole else named}")
        return " and ".join(causes) or "train.max_time is nearly over"


State = Literal["running", "stopped", "finished", "failed"]  # stopped: it saved, and goes on when started again


class RunStatus:
    """Writes the state of a run into its folder; on ranks other than the first, every call does nothing."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / "status.json"
        self._active = rank == 0
        self._lock = threading.Lock()

    def write(self, state: State, step: int, reason: str = "", last: bool = False) -> None:
        """Replace the file as a whole, from any thread; no run ends because it cannot be written.

        After the `last` one, calls do nothing: the verdict on a lost rank stands, and not the errors that follow.
        """
        with self._lock:
            if not self._active:
                return
            content = {"state": state, "step": step, "reason": " ".join(reason.split())}
            try:
                replace_text(self._path, json.dumps(content) + "\n")
            except OSError as error:
                print(f"mega_scale | {self._path} is not written: {error.strerror}", file=sys.stderr, flush=True)
            self._active = not last


class Watchdog:
    """Ends the run when this rank's main thread has not beaten for `timeout_s` (0: never); a context manager.

    Before that, every rank prints where it stands, with all stacks. All ranks do the same in the same order and wait
    for each other, so one that hangs stops all; it is the one that is behind. `at_end` is called with one line that
    says why, in another thread, before this process ends because of a hang or of another rank.

    A main thread that holds the interpreter's lock keeps this watchdog from looking. Then a timer that needs no lock
    prints the stacks, and ends a process that is alone with exit code 1; other ranks notice that this one is silent.
    """

    def __init__(self, world: World, timeout_s: float, at_end: Callable[[str], None]) -> None:
        self._world, self._timeout_s, self._at_end = world, timeout_s, at_end
        self._beats, self.step, self._phase, self._since = 0, 0, "start-up", time.monotonic()
        # Sets a timer that needs no lock; set anew at every look, it goes off when there are no more looks. Among
        # others, a bit early: the launcher may end this rank as soon as they have ended.
        alone = world.monitor is None
        longest = timeout_s if alone else _EARLY * timeout_s
        self._arm = partial(faulthandler.dump_traceback_later, longest, exit=alone, file=2)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self, phase: str, step: int | None = None) -> None:
        """Note progress, on all ranks alike, and what is done from now on, in which optimizer step."""
        self._beats, self._phase, self._since = self._beats + 1, phase, time.monotonic()
        if step is not None:
            self.step = step

    def __enter__(self) -> "Watchdog":
        if self._world.monitor is not None:
            self._world.monitor.watch(self._stand, self._at_end)
        self.beat("start-up")
        if self._timeout_s:
            self._arm()
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # How the run ended is known by now, unless it is an error: the monitor may find that another rank is its cause.
        if self._world.monitor is not None and error is None:
            self._world.monitor.watch(self._stand, None)
        self._stopped.set()
        if self._timeout_s:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._timeout_s / _LOOKS, _LONGEST_PAUSE_S)):
            self._arm()
            if time.monotonic() - self._since <= self._timeout_s:
                continue
            if self._world.monitor is not None:
                self._world.monitor.declare_hang()
                continue
            found = self._stand()
            reason = f"the run hangs: no progress for {found.idle_s:.0f} s in step {found.step}, {found.phase}"
            write_stderr(f"error: {reason}; start it again with --resume")
            writer = threading.Thread(target=self._at_end, args=(reason,), daemon=True)
            writer.start()
            writer.join(_LONGEST_PAUSE_S)
            os._exit(PEER_LOST)

    def _stand(self) -> Standing:
        """Print this rank's stacks, and say where it stands.

        Each line is written whole, as all ranks write into one pipe, and past Python's buffers, whose locks the main
        thread may hold; without source lines, as a file system that hangs may be why the run does.
        """
        found = Standing(self._beats, self.step, self._phase, time.monotonic() - self._since)
        late = bool(self._timeout_s) and found.idle_s > self._timeout_s
        rank = f"rank {self._world.rank}"
        write_stderr(
            f"mega_scale | {rank} {'makes no progress' if late else 'is stopped'}: step {found.step}, {found.phase}, "
            f"for {found.idle_s:.0f} s; stacks of all threads:"
        )
        for thread, top in sys._current_frames().items():
            write_stderr(f"{rank} | Thread {thread:#x} (most recent call first):")
            for frame, line in traceback.walk_stack(top):
                code = frame.f_code
                write_stderr(f'{rank} |   File "{code.co_filename}", line {line} in {code.co_name}')
        return found
