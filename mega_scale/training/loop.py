"""The training loop: the same for every engine and every number of ranks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mega_scale.parallel import Engine, Place, World
from mega_scale.training.checkpoint import CheckpointConfig, save_checkpoint
from mega_scale.training.evaluate import Evaluation
from mega_scale.training.metrics import Reporter, Throughput, memory_bytes
from mega_scale.training.train_config import TrainConfig


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
        evaluate: loss on the validation text; none without one.
        sample: generates text, by step.
        describe: writes configuration and tokenizer into a folder.
        flops_per_token: of forward and backward, by the number of updates before.
        peak_flops: of one device, FLOP/s; none where it is not known.
        facts: plain JSON to find again in every checkpoint.
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
    facts: dict[str, Any]


def train(run: Run, config: TrainConfig, checkpoints: CheckpointConfig, start: int, tokens: int) -> dict[str, Any]:
    """Train from a step to the end; collective.

    Args:
        run: what is trained, on what.
        config: how long, and how often to report.
        checkpoints: how often to save.
        start: optimizer steps done before.
        tokens: tokens seen before.

    Returns:
        What the last checkpoint's `trainer.json` holds.

    Raises:
        FloatingPointError: loss or gradient are not finite; nothing is saved from that step on.
    """
    reporter = Reporter(run.run_dir, run.world.rank, start, config.steps, config.tensorboard)
    throughput = Throughput(run.peak_flops, run.world.size)
    state = _state(run, start, tokens, None)
    for step in range(start + 1, config.steps + 1):
        lr = run.learning_rate(step - 1)
        loss, norm, seen, waited = _step(run, step, lr)
        tokens += seen
        throughput.add(seen, waited, run.flops_per_token(step - 1))
        reporter.advance()
        if step % config.log_every == 0 or step == config.steps:
            speed = throughput.report(config.steps - step)
            values = {"loss": loss, "grad_norm": norm, "lr": lr, "memory_bytes": memory_bytes(run.world.device)}
            reporter.step(step, {**values, "tokens": tokens, **speed, **run.data.report(step)})

        paused = time.perf_counter()
        evaluation = None
        if run.evaluate is not None and (_due(step, config.eval_every) or step == config.steps):
            evaluation = run.evaluate()
            reporter.evaluation(step, evaluation._asdict())
        if _due(step, config.sample_every):
            reporter.sample(step, run.sample(step))
        if _due(step, checkpoints.every) or step == config.steps:
            state = _state(run, step, tokens, evaluation)
            folder = save_checkpoint(run.run_dir, step, run.engine, run.world, state, run.describe, checkpoints.keep)
            reporter.say(f"step {step} | saved {folder}")
        throughput.skip(time.perf_counter() - paused)
    reporter.close()
    return state


def _step(run: Run, step: int, lr: float) -> tuple[float, float, int, float]:
    """One optimizer step: loss in nats per token, gradient norm and tokens of the global batch, seconds of waiting."""
    began = time.perf_counter()
    world, batches = run.world, run.data.batches(step - 1)
    waited = time.perf_counter() - began
    labelled = sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)
    seen = int(world.sum(torch.tensor(labelled, device=world.device), alike=("sp", "tp")))
    loss = torch.zeros((), device=world.device)
    for i, batch in enumerate(batches):
        given = {name: tensor.to(world.device, non_blocking=True) for name, tensor in batch.items()}
        inputs, labels, starts = given["input_ids"], given["shift_labels"], given.get("document_starts")
        # The rows of a global batch lie micro-batch by micro-batch, and in each of them rank by rank.
        place = Place(step - 1, (i * world.shape.dp + world.shape.dp_rank(world.rank)) * len(inputs))
        share = run.engine.forward(inputs, labels, seen, place, starts)
        run.engine.backward(share, last=i == len(batches) - 1)
        loss += share.detach()
    norm = run.engine.step(lr)
    total = float(world.sum(loss, alike=("tp",)))
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step} has loss {total} and gradient norm {norm}: lower optimizer.lr, or look at the rows of that "
            f"step; resume from the last checkpoint in {run.run_dir / 'checkpoints'}"
        )
    return total, norm, seen, waited


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _state(run: Run, step: int, tokens: int, evaluation: Evaluation | None) -> dict[str, Any]:
    found = {"step": step, "tokens": tokens, "data": run.data.state_dict(step), **run.facts}
    if evaluation is not None:
        found["validation"] = evaluation._asdict()
    return found
