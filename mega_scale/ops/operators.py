"""PyTorch operators of our own, for what compilers cannot look into: Triton kernels, C++, and collectives.

An operator is opaque to compilers, tracers and fake tensors, which know of its results what `fake` says: it is one node
of a graph however long rows are. Functions around operators (`autograd.Function`) say what their gradients are, and
`opaque` has compilers take such a function as a whole.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

# Copies of these files, as checkpoints have beside them, define operators of their own.
_PACKAGE = __name__.rpartition(".")[0]
NAMESPACE = "mega_scale" if _PACKAGE == "mega_scale.ops" else _PACKAGE.replace(".", "_")
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes a function on any device the operator `mega_scale::name`, without gradients.

    It changes no argument, and returns new contiguous tensors. Annotations are those that `torch.library.infer_schema`
    reads; `fake` takes the same arguments and returns empty tensors like the results.
    """

    def define(function: Callable[..., Any]) -> Any:
        name = function.__name__.lstrip("_")
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)

        def refuse(*given: Any) -> Any:
            raise RuntimeError(f"{name} has no gradient of its own: call the autograd function around it")

        torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse, lib=_LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return define


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that has compilers take a function as its operators and gradients: it may hold closures and branches.

    Its arguments are tensors, numbers, strings, tuples of these, none, or objects of classes that are registered by
    `torch.utils._pytree.register_constant`; it returns tensors.
    """

    def present(places: tuple[bool, ...], *given: Any) -> Any:
        rest = iter(given)
        return function(*(next(rest) if there else None for there in places))

    @wraps(function)
    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return function(*arguments)
        # A compiler follows this, so it is there; naming it before would import it at every start.
        places = tuple(t is not None for t in arguments)  # PyTorch takes no none here
        return torch._dynamo.nonstrict_trace(present)(places, *(t for t in arguments if t is not None))

    return call
