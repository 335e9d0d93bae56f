"""What DeepSpeed is spared on a rank that has no others, or whose tensors hold no numbers: see `World.pretend`.

DeepSpeed has no setting for either. Here are all of its functions that such a rank must not reach, by the release that
was looked through.
"""

import importlib
from contextlib import ExitStack
from typing import Any
from unittest import mock

import deepspeed
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mega_scale.ops import in_memory

RELEASE = "0.19."
# Where DeepSpeed compares lists of integers with those of the first rank, whose broadcast brings nothing.
_COMPARISON = "assert_ints_same_as_other_ranks"
_COMPARING = ("partition_parameters", "partitioned_param_coordinator", "stage3", "utils")


class Zeros(TorchDispatchMode):
    """Whoever reads a number that a tensor lacks is told 0: no gradient overflows, no norm is invalid."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not in_memory(args[0]):
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


def spare(model: nn.Module) -> ExitStack:
    """Have DeepSpeed work on a model without other ranks, until what is returned is closed.

    Raises ValueError for another release of DeepSpeed.
    """
    if not deepspeed.__version__.startswith(RELEASE):
        raise ValueError(
            f"parallel.engine=deepspeed is planned with DeepSpeed {RELEASE}x, and {deepspeed.__version__} is here: "
            "install that, or plan parallel.engine=fsdp"
        )
    with ExitStack() as stack:
        for name in _COMPARING:
            module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
            stack.enter_context(mock.patch.object(module, _COMPARISON, lambda ints: None))
        # A module is moved by swapping its parameters, which fake ones cannot be; they are where they should be.
        stack.enter_context(mock.patch.object(model, "to", lambda *where, **how: model, create=True))
        return stack.pop_all()
