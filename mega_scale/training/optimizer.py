"""AdamW with weight decay on matrices only."""

from dataclasses import dataclass

import torch
from torch import nn


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


def decays(owner: nn.Module, name: str) -> bool:
    """Say whether weight decay applies to a parameter.

    Only the weights of linear and embedding layers are matrices that decay keeps in bounds. All else has a scale with a
    meaning of its own: norms, biases, the EMA's damping, decay, expansion, projection and residual, the affine map of
    queries and keys, the relative position bias.

    Args:
        owner: module that holds the parameter directly.
        name: the parameter's name in `owner`.

    Returns:
        True for the weight of a linear or embedding layer.
    """
    return name == "weight" and isinstance(owner, nn.Linear | nn.Embedding)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW over every trainable parameter of a model.

    The rule looks at module types and names, never at shapes, so that sharded parameters are grouped as whole ones are.

    Args:
        model: module whose parameters are trained; a parameter tied to several modules is taken once.
        config: AdamW's settings.

    Returns:
        AdamW with two parameter groups, the decaying one first; a group without parameters is left out.

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
