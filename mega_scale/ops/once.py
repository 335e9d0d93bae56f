"""Backward passes written by hand, of which there is no second derivative."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to be part of a gradient's graph.

    PyTorch's decorator of that name refuses only when the graph is walked to its end: `torch.autograd.grad` of chosen
    inputs passes the refusal by, and gives second derivatives without this function's share.

    Raises:
        RuntimeError: (the backward pass) called with `create_graph=True`.
    """

    @wraps(backward)
    def once(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True: Mega's backward passes are written by hand and have no second derivatives; take "
                "them by torch.func (grad, jvp, hessian of torch.func.functional_call), for which all is PyTorch's own"
            )
        return backward(ctx, *gradients)

    return once
