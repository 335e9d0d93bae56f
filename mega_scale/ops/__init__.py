"""What functions of tensors share: which device's forms they take, chunks, threads, and PyTorch's modes (compilers,
autocast), which they respect; operators of our own, for what compilers cannot look into: Triton kernels, C++, and
collectives; and C++ for CPUs, compiled at its first use and kept where PyTorch keeps its extensions.

An operator is opaque to compilers, tracers and fake tensors, which know of its results what `fake` says: it is one node
of a graph however long rows are. Functions around operators (`autograd.Function`) say what their gradients are, and
`opaque` has compilers take such a function as a whole.

Legend: B batch, L length, M chunks, c tokens of a chunk, W width.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

# Copies of this file, as checkpoints have beside them, define operators of their own.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_ORDINARY = (Tensor, torch.nn.Parameter)
# Numbers of a tensor that are worth a thread.
_OF_A_THREAD = 2**16
_HEADER = Path(__file__).with_name("native.h")
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast", "-fno-math-errno"]
# Floats of a vector register, and what lets a compiler use it, by what PyTorch finds the processor to have.
_WIDTHS: dict[str, tuple[int, list[str]]] = {
    "AVX512": (16, ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]),
    "AVX2": (8, ["-mavx2", "-mfma"]),
}
_OTHER: tuple[int, list[str]] = (4, [])
_COMPILE_SECONDS = 300
KERNELS: dict[str, Callable[..., int]] = {}
"""Launches of a custom operator by its name, as `mega_scale::score_products`, from its positional arguments; one unless
it is listed."""
ANY_LENGTH = ("export", "trace")
"""Ways of `tracing` that make one program for every length, so that no branch may depend on this one."""


class _Pretended(NamedTuple):
    """The device that fake tensors are taken to lie on."""

    kind: str
    capability: tuple[int, int]
    multiprocessors: int


_pretended: ContextVar[_Pretended | None] = ContextVar("pretended", default=None)


def constant_to_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that has compilers run a function as they trace, and take what it returns as a constant.

    It sets the mark of `torch.compiler.assume_constant_result`, which imports the compiler: 0.8 s of every start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_to_compilers  # which do not follow context variables
def _pretended_device() -> _Pretended | None:
    return _pretended.get()


@contextmanager
def as_if(kind: str, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132) -> Iterator[None]:
    """Choose forms for fake and meta tensors as on a device of this kind (cpu, cuda), by default an H100.

    Such tensors lie on a CPU and have no memory, so kernels are not launched for them: a model's operators can be
    followed as a GPU would run them, without one. Real tensors keep the forms of their own device.
    """
    token = _pretended.set(_Pretended(kind, capability, multiprocessors))
    try:
        yield
    finally:
        _pretended.reset(token)


def device_kind(x: Tensor | torch.device) -> str:
    """The type of device whose forms are chosen, as `torch.device.type`: that of x, or inside `as_if` the one named
    there, unless x is a real tensor. What a compiler traces counts as fake."""
    pretended = _pretended_device()
    if pretended is not None and (isinstance(x, torch.device) or _without_memory(x)):
        return pretended.kind
    return x.type if isinstance(x, torch.device) else x.device.type


def device_capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the GPU whose forms are chosen for x, which `device_kind` says is on one."""
    pretended = _pretended_device()
    if pretended is not None and _without_memory(x):
        return pretended.capability
    return torch.cuda.get_device_capability(x.device)


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of the GPU whose forms are chosen for x; one on a CPU, where kernels are interpreted."""
    if device_kind(x) != "cuda":
        return 1
    pretended = _pretended_device()
    if pretended is not None and _without_memory(x):
        return pretended.multiprocessors
    return _multiprocessors(x.device.index)


@constant_to_compilers  # which do not follow questions to the driver
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
    """Launch a Triton kernel on the device of its first tensor; do nothing for fake and meta tensors."""
    tensors = [t for t in given if isinstance(t, Tensor)]
    if not any(_without_memory(t) for t in tensors):
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*given, **constants)


def _without_memory(x: Tensor) -> bool:
    return x.is_meta or type(x) not in _ORDINARY or torch.compiler.is_compiling()


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
    return tracing() is None and all(not _without_memory(t) and not t.is_neg() for t in tensors)


def runs_native(*tensors: Tensor) -> bool:
    """Whether C++ for CPUs is chosen: for what lies in a CPU's memory, and fake tensors taken `as_if` on a CPU."""
    pretended = _pretended_device()
    if pretended is None or pretended.kind != "cpu":
        return in_memory(*tensors)
    return tracing() is None and not any(t.is_meta or t.is_neg() for t in tensors)


@constant_to_compilers  # which do not follow the search for a package, nor the driver's answer
def _runs_triton(index: int | None) -> bool:
    there = importlib.util.find_spec("triton") is not None and torch.version.cuda is not None
    return there and torch.cuda.get_device_capability(index) >= (8, 0)


def runs_triton(x: Tensor, *, compiled: bool = False) -> bool:
    """Whether x lies on an NVIDIA GPU of compute capability 8 or newer (or is taken `as_if`), and triton is there.

    Under a compiler only if `compiled`: for kernels that are operators.
    """
    mode = tracing()
    if device_kind(x) != "cuda" or (mode is not None and not (compiled and mode == "compile")):
        return False
    if _pretended_device() is not None and _without_memory(x):
        return importlib.util.find_spec("triton") is not None and device_capability(x) >= (8, 0)
    return (mode == "compile" or in_memory(x)) and _runs_triton(x.device.index)


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


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes a function on any device the operator `mega_scale::name`, without gradients.

    It gets contiguous tensors, changes none, and returns new contiguous ones. Annotations are those that
    `torch.library.infer_schema` reads; `fake` takes the same arguments and returns empty tensors like the results.
    """

    def define(function: Callable[..., Any]) -> Any:
        name = function.__name__.lstrip("_")

        def run(*given: Any) -> Any:
            return function(*(t.contiguous() if isinstance(t, Tensor) else t for t in given))

        # A compiler that had to keep the strides it traced would copy what two operators read for each of them.
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.flexible_layout)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
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


def load_or_warn(source: Path, what: str) -> ctypes.CDLL | None:
    """The library of a C++ file; none, with a warning that `what` is slower, where it cannot be compiled or kept."""
    try:
        return load(source)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{what} on this CPU takes its blocked form, which is several times slower: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def load(source: Path, folder: Path | None = None) -> ctypes.CDLL:
    """Compile a C++ file unless that was done before, and open the library.

    It is kept in `folder`, by default PyTorch's for extensions, named by a hash of its source, the header of all,
    and the compiler's command.

    Raises:
        ValueError: it cannot be compiled.
        OSError: the library cannot be kept or opened.
    """
    # Slow to import, and only needed here.
    from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root  # noqa: PLC0415

    width, of_processor = _WIDTHS.get(torch.backends.cpu.get_cpu_capability(), _OTHER)
    command = [get_cxx_compiler(), *_FLAGS, *of_processor, f"-DWIDTH={width}", f"-I{_HEADER.parent}"]
    text = source.read_bytes() + _HEADER.read_bytes() + " ".join([platform.machine(), *command]).encode()
    folder = Path(get_default_build_root()) / "mega_scale" if folder is None else folder
    file = folder / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if file.exists():
        return ctypes.CDLL(str(file))
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may do so at once: each makes its own, and the last one stays.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / file.name
        command += [str(source), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        except FileNotFoundError as error:
            raise ValueError(f"there is no C++ compiler {command[0]!r}: install one, or name it in CXX") from error
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"{command[0]} was not done in {_COMPILE_SECONDS} s") from error
        if done.returncode:
            raise ValueError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
        os.replace(made, file)
    return ctypes.CDLL(str(file))
