"""The learning rate as a function of the step, and what a resumed run changes in it."""

import math

from mega_scale.config import RunConfig


class Schedule:
    """The learning rate of a run, a function of the step, so that nothing about it needs saving.

    Attributes:
        stable_step: the step whose checkpoint a wsd run keeps for other ends, the last one at the full rate; None where
            there is none.
    """

    def __init__(self, config: RunConfig) -> None:
        schedule, self._steps = config.schedule, config.train.steps
        self._first_lr, self._lr, self._min_lr = schedule.warmup_init_lr, config.optimizer.lr, schedule.min_lr
        self._rise = schedule.warmup(self._steps)  # updates of the rise
        # Updates before the fall, which has a shape unless there is none.
        self._begin, self._shape, self.stable_step = self._rise, str(schedule.decay), None
        if schedule.decay == "wsd":
            self._begin, self._shape = self._steps - schedule.fall(self._steps), schedule.decay_shape
            if 0 < self._begin < self._steps:
                self.stable_step = self._begin

    def lr(self, step: int) -> float:
        """Learning rate of the update after `step` others.

        The first one already lies one step up the rise, so that no update is spent at a rate of zero.
        """
        if step < self._rise:
            return self._first_lr + (self._lr - self._first_lr) * (step + 1) / self._rise
        if step < self._begin or self._shape == "constant":
            return self._lr
        done = min((step - self._begin) / max(self._steps - self._begin, 1), 1.0)
        if self._shape == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        else:
            left = 1.0 - (math.sqrt(done) if self._shape == "sqrt" else done)
        return self._min_lr + (self._lr - self._min_lr) * left


def schedule_changes(now: RunConfig, before: RunConfig, step: int) -> str:
    """What other keys do to the learning rate of a run resumed after `step` updates, "" for nothing.

    A cosine or linear fall is stretched over the whole run, so that another `train.steps` changes every rate of it.
    """
    parts = []
    horizons = [run.train.steps for run in (now, before)]
    if now.schedule.decay == before.schedule.decay in ("cosine", "linear") and horizons[0] != horizons[1]:
        parts.append("the {} fall now ends at step {} (was {})".format(now.schedule.decay, *horizons))
    rates = [Schedule(run).lr(step) for run in (now, before)]
    if rates[0] != rates[1]:
        parts.append("the learning rate of step {} is {:.4g} (was {:.4g})".format(step + 1, *rates))
    return "; ".join(parts)
