"""The `ema`, `bandwidth` and `kernels` commands: the damped moving average beside transformers 4.37.2's, and on GPUs.

`bandwidth` counts the fewest bytes there can be: forward reads x and writes y, backward reads x and dy and writes dx.
Legend: B batch, L tokens, D channels, N averages a channel.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mega_scale.ops.ema import EmaCoefficients, complex_ema_coefficients, damped_ema, ema_coefficients

from . import harness
from .harness import Option, common
from .peers import EMA_PARAMETERS, EmaStep

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
FORMS = ("native", "blocked", "fft")
COMPLEX_FORMS = ("native", "blocked")
_COMPLEX = ", complex"  # ends the names of forms of Megalodon's complex average
COMPLEX_PARAMETERS = ("alpha", "delta", "theta", "gamma")
_GPU_FORMS = ["triton", "blocked"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_COPY_BYTES = 2**31
_CHECKED_CHANNELS = 16
EMA = common(batch=2, length=2048, hidden=512, states=16, seed=0, peer_python=None, repeats=20, warmup=3)
BANDWIDTH = common(batch=1, length=32768, hidden=4096, states=16, repeats=30, warmup=5) | {
    "dtypes": Option(list(_DTYPES), "of tokens", list(_DTYPES)),
    "impls": Option(_GPU_FORMS, "forms of the moving average", _GPU_FORMS),
}
KERNELS = common(states=[16]) | {
    "architectures": Option([80, 90], "compute capabilities: 80 A100, 90 H100"),
    "dtypes": Option(["bf16", "fp32"], "of tokens", ["bf16", "fp16", "fp32", "fp64"]),
    "numbers": Option(["real"], "of moving averages", ["real", "complex"]),
    "kernels": Option([""], "those with any of these texts in their names, as gradients_kernel"),
}


def our_ema(impl: str, problem: Mapping[str, Tensor]) -> EmaStep:
    """An implementation of `damped_ema` on a problem, see `ema_problem`."""
    # A kernel truncated at the full length is the same kernel, without the state that a plain convolution lacks.
    truncation = problem["x"].shape[1] if impl == "fft" else None
    turns = "alpha" in problem
    names = COMPLEX_PARAMETERS if turns else EMA_PARAMETERS
    leaves = {name: problem[name].clone().requires_grad_() for name in ("x", *names)}

    def average() -> Tensor:
        parameters = [leaves[name] for name in names]
        coefficients = complex_ema_coefficients(*parameters) if turns else ema_coefficients(*parameters)
        return damped_ema(leaves["x"], coefficients, impl=impl, truncation=truncation)[0]

    return EmaStep(average, leaves, problem["dy"])


def peak_memory(file: str, impl: str) -> float:
    """By how much a forward and backward pass of a problem in a file grows the process, in sizes of x.

    It is one whose memory goes back to the system when it is freed.
    """
    # Copied, as the pages of a mapped file would count when they are first read.
    problem = {name: tensor.clone() for name, tensor in load_file(file).items()}
    sequences = {name: problem[name][:, :64].contiguous() for name in ("x", "dy")}
    our_ema(impl, problem | sequences).run()  # loads what is loaded at a first call
    ema = our_ema(impl, problem)
    peak = harness.watch_peak()
    ema.run()
    return peak() / problem["x"].nbytes


def ema_problem(batch: int, length: int, hidden: int, states: int, seed: int, device: str = "cpu") -> dict[str, Tensor]:
    """Fresh fp32 tensors: x and dy (B, L, D); damping, decay and expansion (D, N, 1); projection (D, N)."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device)
    signs = 1.0 - 2.0 * (torch.arange(states, device=device) % 2)
    return {
        "x": normal(batch, length, hidden),
        "dy": normal(batch, length, hidden),
        "damping": 0.2 * normal(hidden, states, 1),
        "decay": 0.2 * normal(hidden, states, 1),
        "expansion": signs[:, None] + 0.02 * normal(hidden, states, 1),
        "projection": normal(hidden, states),
    }


def complex_problem(problem: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The x and dy of another problem, and fp32 alpha and delta (D, N, 1), theta (D, 1, 1), gamma (D, N, 2)."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    (hidden, states), own = problem["projection"].shape, {name: problem[name] for name in ("x", "dy")}
    shapes = (hidden, states, 1), (hidden, states, 1), (hidden, 1, 1), (hidden, states, 2)
    scales = 0.2, 0.2, 1.0, 1.0
    made = (scale * normal(shape) for scale, shape in zip(scales, shapes, strict=True))
    return own | dict(zip(COMPLEX_PARAMETERS, made, strict=True))


def run_ema(args: argparse.Namespace) -> None:
    """Check, time and print. Raises ValueError where an implementation is wrong, or the peer cannot be run."""
    problem = ema_problem(args.batch, args.length, args.hidden, args.states, args.seed)
    turning = complex_problem(problem, args.seed)
    steps = {impl: our_ema(impl, problem) for impl in FORMS}
    steps |= {impl + _COMPLEX: our_ema(impl, turning) for impl in COMPLEX_FORMS}
    found = {impl: step.run() for impl, step in steps.items()}
    timed = {impl: step.time for impl, step in steps.items()}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file, results = f"{folder}/problem.safetensors", f"{folder}/results.safetensors"
        turning_file = f"{folder}/complex.safetensors"
        save_file(problem, file)
        save_file(turning, turning_file)
        if args.peer_python:
            how: Any = {"name": f"--peer-python {args.peer_python}", "python": args.peer_python}
            peer = stack.enter_context(harness.worker("peers:PeerEma", {"problem": file}, **how))
            theirs = peer("describe")
            versions = {f"peer's {package}": version for package, version in theirs.items()}
            peer("write_results", results)
            name = f"transformers {theirs['transformers']}"
            found[name], timed[name] = load_file(results), partial(peer, "time")
        wide = ({name: tensor.double() for name, tensor in own.items()} for own in (problem, turning))
        truths = [our_ema("recurrent", own).run() for own in wide]
        errors = {
            name: harness.compare(name, each, truths[name.endswith(_COMPLEX)], TOLERANCE["fp32"])
            for name, each in found.items()
        }
        rows = harness.timed_rows(harness.in_turns(timed, args.repeats, args.warmup))
        with harness.worker("ema", name="the process that measures memory", environment=harness.GIVES_BACK) as memory:
            for row in rows:
                row["error"] = errors[row["name"]]
                impl, turns = row["name"].removesuffix(_COMPLEX), row["name"].endswith(_COMPLEX)
                own = turning_file if turns else file
                row["extra_memory"] = memory("peak_memory", own, impl) if row["name"] in steps else None
    columns = {
        "": "{name}", "median ms": "{median:.3f}", "min": "{least:.3f}", "max": "{greatest:.3f}",
        "times native": "{ratio:.2f}", "largest error": "{error:.1e}", "extra memory, in inputs": "{extra_memory:.2f}",
    }  # fmt: skip
    note = (
        "Timed in all: coefficients from parameters, the average, gradients of x and of the parameters; not the "
        "residual, nor silu. fft and transformers compute no end state. Errors of outputs and gradients are against "
        "the recurrence in fp64, relative to a tensor's largest value."
    )
    harness.report(args, columns, rows, note, versions=versions)


def run_bandwidth(args: argparse.Namespace) -> None:
    """Time forward and backward, and print a table. Raises ValueError where an implementation is wrong."""
    gpu = harness.gpu_name("bandwidth")
    source = torch.empty(_COPY_BYTES, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    copies = harness.gpu_milliseconds(lambda: target.copy_(source), 10, 3)
    ceiling = 2 * _COPY_BYTES / (statistics.median(copies) / 1e3)  # bytes/s, read and written
    rows = [_bandwidth(impl, dtype, args, ceiling) for dtype in args.dtypes for impl in args.impls]
    columns = {
        "": "{impl}", "tokens": "{dtype}", "forward ms": "{forward_ms:.3f}", "forward share": "{forward_share:.2f}",
        "backward ms": "{backward_ms:.3f}", "backward share": "{backward_share:.2f}", "largest error": "{error:.1e}",
    }  # fmt: skip
    note = f"{gpu}. A copy moves {ceiling / 1e12:.2f} TB/s; shares are of that, for the fewest bytes there can be."
    harness.report(args, columns, rows, note, gpu=gpu, copy_bytes_per_s=ceiling)


def _bandwidth(impl: str, dtype: str, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    problem = ema_problem(args.batch, args.length, args.hidden, args.states, 0, "cuda")
    dy = problem["dy"].to(_DTYPES[dtype])
    coefficients = ema_coefficients(*(problem[name] for name in EMA_PARAMETERS))
    leaves = {"x": problem["x"].to(_DTYPES[dtype]), **coefficients._asdict()}
    channels = torch.linspace(0, args.hidden - 1, _CHECKED_CHANNELS, device="cuda").long()

    def some(tensor: Tensor) -> Tensor:
        return tensor[..., channels] if tensor.dim() == 3 else tensor[channels]

    def step(form: str, tensors: dict[str, Tensor], dy: Tensor) -> EmaStep:
        x, *rest = (tensor.requires_grad_() for tensor in tensors.values())
        return EmaStep(lambda: damped_ema(x, EmaCoefficients(*rest), impl=form)[0], tensors, dy)

    # The truth is the blocked form in fp64, which tests hold to the recurrence, as that would take a kernel a token.
    truth = step("blocked", {name: some(tensor).double() for name, tensor in leaves.items()}, some(dy).double()).run()
    own = step(impl, leaves, dy)
    found = {name: some(tensor) for name, tensor in own.run().items()}
    error = harness.compare(f"{impl} in {dtype}", found, truth, TOLERANCE[dtype])
    y = own.average()
    backward = partial(torch.autograd.grad, y, list(leaves.values()), dy, retain_graph=True)
    forward_ms, backward_ms = (
        statistics.median(harness.gpu_milliseconds(each, args.repeats, args.warmup)) for each in (own.average, backward)
    )
    once = dy.nbytes / ceiling * 1e3
    return {
        "impl": impl, "dtype": dtype, "forward_ms": forward_ms, "forward_share": 2 * once / forward_ms,
        "backward_ms": backward_ms, "backward_share": 3 * once / backward_ms, "error": error,
    }  # fmt: skip


def run_kernels(args: argparse.Namespace) -> None:
    """Compile Triton kernels, and print what they take. Raises ValueError where triton is missing or interprets."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("kernels are compiled by triton, which is not installed: pip install 'mega_scale[triton]'")
    from mega_scale.ops.triton_report import DOCUMENT, compile_kernels

    found = compile_kernels(args.architectures, args.dtypes, args.states, args.numbers, args.kernels)
    rows = [row | {"shared_kib": row["shared_bytes"] / 1024} for row in found]
    columns = {
        "kernel": "{kernel}", "GPU": "{architecture}", "tokens": "{dtype}", "size": "{size}", "warps": "{warps}",
        "registers a thread": "{registers}", "shared memory a program, KiB": "{shared_kib:.1f}",
        "spills a thread, bytes": "{spill_bytes}", "products of matrix units": "{products}",
        "instructions an element": "{instructions}", f"a document begins every {DOCUMENT} tokens": "{with_borders}",
        "predicted share of a copy, H100": "{h100_share}",
    }  # fmt: skip
    note = "Compiled here by triton and its ptxas, and not run."
    harness.report(args, columns, rows, note, versions={"triton": importlib.metadata.version("triton")})
