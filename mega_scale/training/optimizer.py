"""AdamW with weight decay on matrices only, and the schedule of its learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mega_scale.settings import require, require_ranges


@dataclass
class OptimizerConfig:
    """AdamW and the clipping of gradients."""

    lr: float = 3e-4
    """Learning rate at the top of the schedule (absolute)."""

    beta1: float = 0.9
    """Share of the old first moment kept at each step (0 to below 1)."""

    beta2: float = 0.95
    """Share of the old second moment kept at each step (0 to below 1)."""

    eps: float = 1e-8
    """Added to the root of the second moment before dividing (absolute)."""

    weight_decay: float = 0.1
    """Decoupled decay of linear and embedding weights, per step and unit of learning rate (no unit)."""

    max_grad_norm: float = 1.0
    """Norm to which the gradient of the whole model is clipped; 0 does not clip (L2 norm)."""

    def validate(self) -> None:
        """Refuse values outside their range. Raises ValueError, which names key, value and range."""
        require_ranges(
            "optimizer",
            self,
            positive=("lr", "eps"),
            not_negative=("weight_decay", "max_grad_norm"),
            shares=("beta1", "beta2"),
        )


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
        """Updates of the rise, of so many updates of the whole run."""
        return int(self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * total_steps)

    def validate(self, lr: float, steps: int) -> None:
        """Refuse what does not fit `optimizer.lr` and `train.steps`. Raises ValueError, which names the keys."""
        require(
            self.decay in ("cosine", "linear", "constant"),
            "schedule.decay",
            self.decay,
            "choose cosine, linear or constant",
        )
        require_ranges("schedule", self, not_negative=("warmup_steps", "min_lr", "warmup_init_lr"))
        require(
            self.warmup_steps < 1 or self.warmup_steps % 1 == 0,
            "schedule.warmup_steps",
            self.warmup_steps,
            "give a whole number of steps, or a share of train.steps that is below 1",
        )
        if self.warmup_steps > steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} is more than train.steps={steps}: "
                f"warm up for at most {steps} steps, or a share of them as in schedule.warmup_steps=0.1, or train "
                "longer"
            )
        for key, value in {"min_lr": self.min_lr, "warmup_init_lr": self.warmup_init_lr}.items():
            if value > lr:
                raise ValueError(
                    f"schedule.{key}={value} is more than optimizer.lr={lr}: set schedule.{key} to at most {lr}, as in "
                    f"schedule.{key}={lr / 10:g}, or raise optimizer.lr"
                )


def learning_rate(step: int, config: ScheduleConfig, base_lr: float, total_steps: int) -> float:
    """Learning rate of one update, a pure function of the step, so that nothing about it needs saving.

    The first update already lies one step up the rise, so that no update is spent at a rate of zero.

    Args:
        step: updates done before this one, from 0.
        config: shape of rise and fall.
        base_lr: learning rate at the top of the rise (absolute).
        total_steps: updates of the whole run; from there on the rate is `config.min_lr`.
    """
    warmup_steps = config.warmup(total_steps)
    if step < warmup_steps:
        return config.warmup_init_lr + (base_lr - config.warmup_init_lr) * (step + 1) / warmup_steps
    if config.decay == "constant":
        return base_lr
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    left = 1.0 - done if config.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.min_lr + (base_lr - config.min_lr) * left


def decays(owner: nn.Module, name: str) -> bool:
    """Whether weight decay applies to a parameter: to the weights of linear and embedding layers only.

    Those are matrices that decay keeps in bounds. All else has a scale with a meaning of its own: norms, biases, the
    EMA's damping, decay, expansion, projection and residual, the affine map of queries and keys, the relative position
    bias.

    Args:
        owner: module that holds the parameter directly.
        name: the parameter's name in `owner`.
    """
    return name == "weight" and isinstance(owner, nn.Linear | nn.Embedding)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over every trainable parameter of a model, in two groups: those that decay first.

    The rule looks at module types and names, never at shapes, so that sharded parameters are grouped as whole ones are.
    A parameter tied to several modules is taken once.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    decaying: dict[nn.Parameter, None] = {}
    others: dict[nn.Parameter, None] = {}
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                (decaying if decays(owner, name) else others)[parameter] = None
    # Tied to a decaying and another place, a parameter decays.
    groups = [
        {"params": list(decaying), "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in others if parameter not in decaying], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameter: leave requires_grad on for at least one")
    # Fused, it reads and writes every number once a step.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
