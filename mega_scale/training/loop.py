"""The training loop: the same for every engine and every number of ranks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mega_scale.parallel import Engine, Place, World
from mega_scale.training.bad_steps import BadStepsError, rows_of
from mega_scale.training.checkpoint import CheckpointConfig, Saved, Saver, load_checkpoint
from mega_scale.training.evaluate import Evaluation
from mega_scale.training.metrics import Reporter, Throughput, memory_bytes
from mega_scale.training.preemption import Stopping, StopRun
from mega_scale.training.progress import Progress
from mega_scale.training.slow_ranks import SlowRanks
from mega_scale.training.train_config import TrainConfig
from mega_scale.training.watchdog import Watchdog

NOT_SAVED = 74
"""Exit code of a run whose last checkpoint could not be written."""


class NotSavedError(OSError):
    """The last checkpoint could not be written."""


class Batches(Protocol):
    """Where batches come from: a pure function of the step."""

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of one step, `input_ids` and `shift_labels` (B, L) int64, where rows hold documents
        to keep apart `document_starts` (B, L) bool."""
        ...

    def state_dict(self, step: int) -> dict[str, Any]:
        """Plain JSON: the position before `step`, and what the data was."""
        ...

    def report(self, step: int) -> dict[str, float]:
        """Figures by name: tokens and epochs of every source before `step`, padding, bad rows."""
        ...


@dataclass(frozen=True)
class Run:
    """What one run consists of.

    Args:
        run_dir: folder of the run.
        engine: sharded model and optimizer.
        world: all ranks.
        data: batches by step.
        learning_rate: of an update, by the number of updates before it.
        evaluate: loss on the validation text; none without one. Raises StopRun when the run is to stop.
        sample: generates text, by step. Raises StopRun when the run is to stop.
        describe: writes configuration and tokenizer into a folder.
        flops_per_token: of forward and backward, by the position in the data (steps).
        peak_flops: of one device, FLOP/s; none where it is not known.
        key: secret with which checkpoints are signed, if there is one.
        facts: plain JSON to find again in every checkpoint.
        stopping: whether somebody asked the run to stop.
        watchdog: is told of every progress.
    """

    run_dir: Path
    engine: Engine
    world: World
    data: Batches
    learning_rate: Callable[[int], float]
    evaluate: Callable[[], Evaluation] | None
    sample: Callable[[int], str]
    describe: Callable[[Path], None]
    flops_per_token: Callable[[int], int]
    peak_flops: float | None
    key: bytes | None
    facts: dict[str, Any]
    stopping: Stopping
    watchdog: Watchdog


class Trained(NamedTuple):
    """How a run ended.

    Args:
        step: optimizer steps done; there is a checkpoint of them.
        stopped: why it stopped before its end, one line; None at its end.
    """

    step: int
    stopped: str | None


def train(run: Run, config: TrainConfig, checkpoint: CheckpointConfig, now: Progress) -> Trained:
    """Train from where the run is to its end, or until it is asked to stop; collective.

    Args:
        run: what is trained, on what.
        config: how long, and how often to report.
        checkpoint: how often to save.
        now: how far the run is; goes on with it.

    Returns:
        How it ended; there is a checkpoint of that.

    Raises:
        NotSavedError: the last checkpoint could not be written.
        BadStepsError: too many bad steps in a row; nothing is saved from the first of them on.
    """
    world = run.world
    reporter = Reporter(run.run_dir, world.rank, now.step, config.steps, config.tensorboard)
    throughput = Throughput(run.peak_flops, world.size)
    slow = SlowRanks(world, config.slow_rank_factor) if config.slow_rank_factor and world.size > 1 else None
    saver = Saver(run.run_dir, run.engine, world, run.describe, checkpoint, run.key)
    stopped = None
    try:
        while now.step < config.steps:
            flops = run.flops_per_token(now.position)
            done = _step(run, now, saver)
            throughput.add(done.tokens, done.waited, flops)
            reporter.advance()
            if _count(run, now, done, config.micro_batch_size, saver, reporter):
                continue  # there is nothing to report of a step that it went back to
            if now.step % config.log_every == 0 or now.step == config.steps:
                for line in slow.report(*throughput.per_step()) if slow is not None else []:
                    reporter.say(f"step {now.step} | {line}")
                values = {
                    "loss": done.loss,
                    "grad_norm": done.norm,
                    "lr": done.lr,
                    "memory_bytes": memory_bytes(world.device),
                }
                values |= {
                    "tokens": now.tokens,
                    "bad_steps": now.bad.total,
                    **throughput.report(config.steps - now.step),
                }
                reporter.step(now.step, values | run.data.report(now.position))

            paused = time.perf_counter()
            _report(run, now, saver.poll(), reporter)
            if _due(now.step, config.eval_every) or now.step == config.steps:
                _evaluate(run, now, reporter)
            if _due(now.step, config.sample_every):
                run.watchdog.beat("generating text")
                reporter.sample(now.step, run.sample(now.step))
            # A state whose last steps were bad is none to go back to.
            if _due(now.step, checkpoint.every) and now.bad.row == 0:
                _save(run, now, saver, reporter)
            throughput.skip(time.perf_counter() - paused)
        if now.evaluation is None:  # it was asked to stop in its last evaluation
            _evaluate(run, now, reporter)
    except StopRun:
        stopped = run.stopping.reason()
        reporter.say(f"step {now.step} | asked to stop: {stopped}")
    if now.saved != now.step:
        _save(run, now, saver, reporter)
    _report(run, now, saver.finish(), reporter)
    reporter.close()
    if now.saved != now.step:
        raise NotSavedError(
            f"the checkpoint of step {now.step} could not be written; "
            + (f"the last one is {now.folder}" if now.folder is not None else "there is none")
        )
    return Trained(now.step, stopped)


class _Step(NamedTuple):
    """What a step found.

    Args:
        loss: of the global batch (nats per token).
        norm: of its gradient.
        lr: learning rate.
        tokens: of the global batch.
        waited: for data, by this rank (seconds).
        shares: (micro-batches,) losses of this rank's.
        problem: why it was not taken; None for a good step.
    """

    loss: float
    norm: float
    lr: float
    tokens: int
    waited: float
    shares: Tensor
    problem: str | None


def _step(run: Run, now: Progress, saver: Saver) -> _Step:
    """Do the next optimizer step, unless it is bad. Raises StopRun, before it computes, when the run is to stop."""
    world, step = run.world, now.step + 1
    lr = run.learning_rate(step - 1)
    run.watchdog.beat("waiting for data", step)
    began = time.perf_counter()
    batches = run.data.batches(now.position)
    waited = time.perf_counter() - began
    run.watchdog.beat("computing")
    labelled = sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)
    # One sum says how many tokens there are, and whether the step is to be done at all.
    own = [0 if world.at.sp or world.at.tp else labelled, int(run.stopping.wanted())]
    seen, wanting = world.sum(torch.tensor(own, device=world.device)).tolist()
    run.stopping.decide(wanting)
    loss, shares = torch.zeros((), device=world.device), []
    for i, batch in enumerate(batches):
        given = {name: tensor.to(world.device, non_blocking=True) for name, tensor in batch.items()}
        inputs, labels, starts = given["input_ids"], given["shift_labels"], given.get("document_starts")
        # The rows of a global batch lie micro-batch by micro-batch, and in each of them rank by rank.
        place = Place(step - 1, (i * world.shape.dp + world.shape.dp_rank(world.rank)) * len(inputs))
        share = run.engine.forward(inputs, labels, seen, place, starts)
        run.engine.backward(share, last=i == len(batches) - 1)
        shares.append(share.detach())
        loss += shares[-1]
    total = float(world.sum(loss, alike=("tp",)))
    problem = now.bad.problem(total)
    saver.wait_copied()
    norm = run.engine.step(lr, skip=problem is not None)
    if problem is None and not math.isfinite(norm):
        problem = f"the gradient norm is {norm}"
    run.stopping.step(time.perf_counter() - began)
    return _Step(total, norm, lr, seen, waited, torch.stack(shares), problem)


def _count(run: Run, now: Progress, done: _Step, rows_each: int, saver: Saver, reporter: Reporter) -> bool:
    """Count a step, of so many rows a micro-batch.

    Too many bad ones in a row end the run, or lead back to the last checkpoint; then this is true.
    """
    position = now.position
    now.step, now.tokens, now.evaluation = now.step + 1, now.tokens + done.tokens, None
    if done.problem is None:
        now.bad.good(done.loss)
        return False
    now.bad.bad()
    shares = run.world.all_gather(done.shares)
    rows, where = rows_of(position, shares, run.world.shape, rows_each)
    reporter.bad_step(now.step, done.problem, rows, where, done.loss, done.norm, now.bad.total)
    if not now.bad.too_many:
        return False
    _report(run, now, saver.finish(), reporter)
    what = f"{now.bad.row} bad steps in a row up to step {now.step}: {done.problem}"
    last = (
        f"the last good checkpoint is {now.folder}" if now.folder is not None else "there is no checkpoint before them"
    )
    if now.folder is None or now.bad.rollbacks >= now.bad.config.rollbacks:
        raise BadStepsError(f"{what}; {last}; look at those rows, lower optimizer.lr, or set bad_steps.rollbacks")
    bad, row = now.step, rows[1] - rows[0]
    run.watchdog.beat("going back")
    skipped = now.go_back(now.folder, load_checkpoint(now.folder, run.engine, run.world))
    reporter.rewind(now.step)
    reporter.say(
        f"step {bad} | {what}; went back to step {now.step}, and leave out rows {skipped[0] * row} to "
        f"{skipped[1] * row - 1} ({now.bad.rollbacks} of {now.bad.config.rollbacks} rollbacks)"
    )
    return True


def _evaluate(run: Run, now: Progress, reporter: Reporter) -> None:
    if run.evaluate is not None:
        run.watchdog.beat("evaluating")
        now.evaluation = run.evaluate()._asdict()
        reporter.evaluation(now.step, now.evaluation)


def _save(run: Run, now: Progress, saver: Saver, reporter: Reporter) -> None:
    run.watchdog.beat("saving")
    state = {**now.state_dict(), "data": run.data.state_dict(now.position), **run.facts}
    now.saved = now.step
    _report(run, now, saver.save(now.step, state), reporter)


def _report(run: Run, now: Progress, ended: list[Saved], reporter: Reporter) -> None:
    """Say how saves ended, and remember the last checkpoint."""
    for saved in ended:
        if saved.folder is None:
            if now.saved == saved.step:
                now.saved = None
            reporter.say(f"step {saved.step} | checkpoint not written, older ones are untouched: {saved.problem}")
            continue
        now.folder = saved.folder
        run.stopping.save(saved.write_s)
        reporter.say(
            f"step {saved.step} | saved {saved.folder} ({saved.bytes / 1e6:,.1f} MB in {saved.write_s:.2f} s, "
            f"training stood still {saved.stall_s:.2f} s){f'; {saved.problem}' if saved.problem else ''}"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
