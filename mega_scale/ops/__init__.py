"""What functions of tensors share: chunks, threads, and PyTorch's modes (compilers, autocast), which they respect.

Legend: B batch, L length, M chunks, c tokens of a chunk, W width.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_ORDINARY = (Tensor, torch.nn.Parameter)
# Numbers of a tensor that are worth a thread.
_OF_A_THREAD = 2**16
ANY_LENGTH = ("export", "trace")
"""Ways of `tracing` that make one program for every length, so that no branch may depend on this one."""


def tracing() -> Literal["compile", "export", "trace"] | None:
    """What records every operator now; none where the program simply runs.

    trace is a tracer (torch.jit, make_fx) or a transform of torch.func, which take no hand-written backward pass;
    compilers and exporters do.
    """
    if torch.compiler.is_compiling():
        return "export" if torch.compiler.is_exporting() else "compile"
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing() or get_proxy_mode() is not None:
        return "trace"
    return None


def in_memory(*tensors: Tensor) -> bool:
    """Whether code outside PyTorch may read the tensors' storage: fake, functional and meta tensors have none."""
    return tracing() is None and all(type(t) in _ORDINARY and not t.is_meta and not t.is_neg() for t in tensors)


def runs_triton(x: Tensor) -> bool:
    """Whether x lies on an NVIDIA GPU of compute capability 8 or newer, and triton is installed."""
    return (
        x.is_cuda
        and in_memory(x)
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


def threads_for(x: Tensor) -> int:
    """Threads that the work of C++ on a tensor is worth, of those that PyTorch takes."""
    return max(1, min(torch.get_num_threads(), x.numel() // _OF_A_THREAD))


def chunk_count(length: int, size: int) -> int:
    """Chunks that hold `length` tokens; one more for an exporter's symbolic length, else the exported program would
    keep whether there is only one."""
    count = (length + size - 1) // size
    return count + 1 if isinstance(length, torch.SymInt) else count


def split_chunks(x: Tensor, size: int) -> Tensor:
    """(B, M c, ...) to (B, M, c, ...). Exporters index, as a view would put conditions on the length."""
    if not torch.compiler.is_exporting():
        return x.unflatten(1, (-1, size))
    return x[:, torch.arange(x.shape[1] // size, device=x.device)[:, None] * size + torch.arange(size, device=x.device)]


def join_chunks(x: Tensor, begin: int, end: int) -> Tensor:
    """Tokens `begin` to before `end` of chunks (B, M, c, W): (B, end - begin, W)."""
    if not torch.compiler.is_exporting():
        return x.flatten(1, 2)[:, begin:end]
    token = torch.arange(begin, end, device=x.device)
    return x[:, token // x.shape[2], token % x.shape[2]]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives matrix products now; none where it is off, or a device (meta, say) has none."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off in this context."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a hand-written backward pass: raise RuntimeError on double backward (`create_graph=True`).

    PyTorch's decorator of that name raises only when the whole graph is differentiated again: `torch.autograd.grad` of
    chosen inputs silently leaves this function's share out.
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
