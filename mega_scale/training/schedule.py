"""The learning rate as a function of the step, and what a resumed run changes in it."""

import math

from mega_scale.config import RunConfig
from mega_scale.training.config import ScheduleConfig


def learning_rate(step: int, config: RunConfig) -> float:
    """Learning rate of the update after `step` others: a function of the step, so that nothing about it needs saving.

    The first one already lies one step up the rise, so that no update is spent at a rate of zero.
    """
    schedule, base_lr, total_steps = config.schedule, config.optimizer.lr, config.train.steps
    warmup_steps = schedule.warmup(total_steps)
    if step < warmup_steps:
        return schedule.warmup_init_lr + (base_lr - schedule.warmup_init_lr) * (step + 1) / warmup_steps
    begin = fall_begin(schedule, total_steps)
    if begin is None or step < begin:
        return base_lr
    done = min((step - begin) / max(total_steps - begin, 1), 1.0)
    shape = schedule.decay_shape if schedule.decay == "wsd" else schedule.decay
    if shape == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        left = 1.0 - (math.sqrt(done) if shape == "sqrt" else done)
    return schedule.min_lr + (base_lr - schedule.min_lr) * left


def fall_begin(schedule: ScheduleConfig, total_steps: int) -> int | None:
    """Updates before the learning rate begins to fall, None where it never does."""
    if schedule.decay == "constant":
        return None
    return schedule.warmup(total_steps) if schedule.decay != "wsd" else total_steps - schedule.fall(total_steps)


def stable_step(config: RunConfig) -> int | None:
    """Step whose checkpoint a wsd run keeps for other ends, the last one at the full rate; None where there is none."""
    if config.schedule.decay != "wsd":
        return None
    begin = fall_begin(config.schedule, config.train.steps)
    return begin if begin and begin < config.train.steps else None


def schedule_changes(now: RunConfig, before: RunConfig, step: int) -> str:
    """What other keys do to the learning rate of a run resumed after `step` updates, "" for nothing.

    A cosine or linear fall is stretched over the whole run, so that another `train.steps` changes every rate of it.
    """
    parts = []
    horizons = [run.train.steps for run in (now, before)]
    if now.schedule.decay == before.schedule.decay in ("cosine", "linear") and horizons[0] != horizons[1]:
        parts.append("the {} fall now ends at step {} (was {})".format(now.schedule.decay, *horizons))
    rates = [learning_rate(step, run) for run in (now, before)]
    if rates[0] != rates[1]:
        parts.append("the learning rate of step {} is {:.4g} (was {:.4g})".format(step + 1, *rates))
    return "; ".join(parts)
