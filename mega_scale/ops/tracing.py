"""What reads along while functions of tensors run: it must see all that they do, in PyTorch's own operators."""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_ORDINARY = (Tensor, torch.nn.Parameter)


def traced() -> bool:
    """Whether a tracer (torch.jit, make_fx) or a transform of torch.func reads along, for neither of which backward
    passes written by hand are; compilers and exporters know them."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing() or get_proxy_mode() is not None


def written_out() -> bool:
    """Whether a compiler or an exporter reads along, or what `traced` says."""
    return torch.compiler.is_compiling() or traced()


def any_length() -> bool:
    """Whether one program is made that will meet other lengths: no branch may depend on this one."""
    return torch.compiler.is_exporting() or traced()


def parts(length: int, size: int) -> int:
    """How many parts of a size hold a length; one more where an exporter leaves the length open, as it would keep
    whether there is but one."""
    count = (length + size - 1) // size
    return count + 1 if isinstance(length, torch.SymInt) else count


def divided(x: Tensor, size: int) -> Tensor:
    """(B, M c, ...) as parts of size c, (B, M, c, ...).

    Exporters are given places, as of a view they would keep conditions on the length.
    """
    if not torch.compiler.is_exporting():
        return x.unflatten(1, (-1, size))
    return x[:, torch.arange(x.shape[1] // size, device=x.device)[:, None] * size + torch.arange(size, device=x.device)]


def joined(x: Tensor, begin: int, end: int) -> Tensor:
    """Tokens `begin` to before `end` of parts (B, M, c, W): (B, end - begin, W)."""
    if not torch.compiler.is_exporting():
        return x.flatten(1, 2)[:, begin:end]
    place = torch.arange(begin, end, device=x.device)
    return x[:, place // x.shape[2], place % x.shape[2]]


def in_memory(*tensors: Tensor) -> bool:
    """Whether numbers lie in the tensors' memory as they are, for code that is not PyTorch's to read, and nothing that
    had to know of it reads along."""
    return not written_out() and all(type(t) in _ORDINARY and not t.is_meta and not t.is_neg() for t in tensors)
