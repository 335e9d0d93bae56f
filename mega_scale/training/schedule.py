"""The learning rate as a pure function of the step, so that nothing about it needs saving."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass
class ScheduleConfig:
    """How the learning rate rises to optimizer.lr and falls from there."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the fall from optimizer.lr to min_lr; constant stays at optimizer.lr (no unit)."""

    warmup_steps: int | float = 0
    """Length of the linear rise from warmup_init_lr to optimizer.lr, below 1 as a share of train.steps; 0 starts at
    optimizer.lr (steps)."""

    min_lr: float = 0.0
    """Learning rate at which a cosine or linear fall ends (absolute, not a share of optimizer.lr)."""

    warmup_init_lr: float = 0.0
    """Learning rate from which the rise starts (absolute)."""

    def warmup(self, total_steps: int) -> int:
        """Updates of the rise.

        Args:
            total_steps: updates of the whole run (steps).
        """
        return int(self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * total_steps)


def learning_rate(step: int, config: ScheduleConfig, base_lr: float, total_steps: int) -> float:
    """Give the learning rate of one update.

    The first update already lies one step up the rise, so that no update is spent at a rate of zero.

    Args:
        step: updates done before this one (steps, from 0).
        config: shape of rise and fall.
        base_lr: learning rate at the top of the rise (absolute).
        total_steps: updates of the whole run; from there on the rate is `config.min_lr` (steps).

    Returns:
        The learning rate (absolute).

    Raises:
        ValueError: `step` is negative, or `config.decay` is unknown.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative: pass the number of updates done so far")
    warmup_steps = config.warmup(total_steps)
    if step < warmup_steps:
        return config.warmup_init_lr + (base_lr - config.warmup_init_lr) * (step + 1) / warmup_steps
    if config.decay == "constant":
        return base_lr
    fall_steps = max(total_steps - warmup_steps, 1)
    done = min((step - warmup_steps) / fall_steps, 1.0)
    if config.decay == "linear":
        left = 1.0 - done
    elif config.decay == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        raise ValueError(f"schedule.decay {config.decay!r} is unknown: use cosine, linear or constant")
    return config.min_lr + (base_lr - config.min_lr) * left
