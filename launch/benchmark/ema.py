"""The `ema` command: forward and backward of the damped moving average, in our forms and transformers 4.37.2's.

Legend: B batch, L tokens, D channels, N averages a channel.
"""

import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mega_scale.ops.ema import EmaCoefficients, damped_ema

from .harness import (
    GIVES_BACK,
    Command,
    Option,
    PeakMemory,
    Worker,
    compare,
    in_turns,
    milliseconds,
    report,
    spread,
    table,
)

TOLERANCE = 1e-4
FORMS = ("native", "blocked", "fft")
_PARAMETERS = ("damping", "decay", "expansion", "projection")
OPTIONS = {
    "batch": Option(2, "sequences"),
    "length": Option(2048, "tokens a sequence"),
    "hidden": Option(512, "channels"),
    "states": Option(16, "moving averages per channel"),
    "seed": Option(0, "of inputs and parameters", least=0),
    "peer-python": Option(None, "interpreter with transformers 4.37.2, to compare with"),
}


class OurEma:
    """An implementation of `damped_ema` on a problem, see `ema_problem`; coefficients from parameters included."""

    def __init__(self, impl: str, problem: dict[str, Tensor]) -> None:
        self._impl = impl
        # A kernel truncated at the full length is the same kernel, without the state that a plain convolution lacks.
        self._truncation = problem["x"].shape[1] if impl == "fft" else None
        self._leaves = {name: problem[name].clone().requires_grad_() for name in ("x", *_PARAMETERS)}
        self._dy = problem["dy"]

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y (B, L, D), and the gradients of x and of the parameters."""
        coefficients = EmaCoefficients.from_parameters(*(self._leaves[name] for name in _PARAMETERS))
        y, _ = damped_ema(self._leaves["x"], coefficients, impl=self._impl, truncation=self._truncation)
        return y, torch.autograd.grad(y, list(self._leaves.values()), self._dy)

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients: y, dx, ddamping, ddecay, dexpansion, dprojection."""
        y, gradients = self.run()
        return {"y": y.detach(), **{f"d{name}": each for name, each in zip(self._leaves, gradients, strict=True)}}

    def time(self) -> float:
        """Milliseconds of a forward and backward pass."""
        return milliseconds(self.run)


class TheirEma:
    """`PeerEma` in a worker, as `OurEma`; tensors come through a file."""

    def __init__(self, worker: Worker, file: Path) -> None:
        self._worker, self._file = worker, file

    def results(self) -> dict[str, Tensor]:
        self._worker.call("write_results", str(self._file))
        return load_file(self._file)

    def time(self) -> float:
        return float(self._worker.call("time"))


class EmaMemory:
    """Measures how much memory ours needs for a problem in a file; in a worker that gives freed memory back."""

    def __init__(self, problem: str) -> None:
        # Copied, as the pages of a mapped file would count when they are first read.
        self._problem = {name: tensor.clone() for name, tensor in load_file(problem).items()}

    def peak(self, impl: str) -> float:
        """By how much a forward and backward pass grows the process, in sizes of x."""
        sequences = {name: self._problem[name][:, :64].contiguous() for name in ("x", "dy")}
        OurEma(impl, self._problem | sequences).run()  # loads what is loaded at a first call
        ema = OurEma(impl, self._problem)
        peak = PeakMemory()
        ema.run()
        return peak.growth() / self._problem["x"].nbytes


def ema_problem(batch: int, length: int, hidden: int, states: int, seed: int) -> dict[str, Tensor]:
    """Input, output gradient and freshly initialised parameters of one layer, drawn from a seed.

    Returns:
        x and dy (B, L, D); damping, decay, expansion (D, N, 1); projection (D, N); all fp32.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    signs = 1.0 - 2.0 * (torch.arange(states) % 2)
    return {
        "x": normal(batch, length, hidden),
        "dy": normal(batch, length, hidden),
        "damping": 0.2 * normal(hidden, states, 1),
        "decay": 0.2 * normal(hidden, states, 1),
        "expansion": signs[:, None] + 0.02 * normal(hidden, states, 1),
        "projection": normal(hidden, states),
    }


def run(args: argparse.Namespace) -> None:
    """Check, time and print. Raises ValueError where an implementation is wrong, or the peer cannot be run."""
    problem = ema_problem(args.batch, args.length, args.hidden, args.states, args.seed)
    contenders: dict[str, OurEma | TheirEma] = {impl: OurEma(impl, problem) for impl in FORMS}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        file = str(folder / "problem.safetensors")
        save_file(problem, file)

        def worker(target: str, label: str, **options: Any) -> Worker:
            arguments = {"problem": file}
            return stack.enter_context(Worker(target, arguments, name=label, threads=args.threads, **options))

        if args.peer_python:
            peer = worker("peers:PeerEma", f"--peer-python {args.peer_python}", python=args.peer_python)
            theirs = peer.call("describe")
            versions = {f"peer's {package}": version for package, version in theirs.items()}
            contenders[f"transformers {theirs['transformers']}"] = TheirEma(peer, folder / "results.safetensors")
        truth = OurEma("recurrent", {name: tensor.double() for name, tensor in problem.items()}).results()
        errors = {name: compare(name, each.results(), truth, TOLERANCE) for name, each in contenders.items()}
        times = in_turns({name: each.time for name, each in contenders.items()}, args.repeats, args.warmup)
        memory = worker("ema:EmaMemory", "the process that measures memory", environment=GIVES_BACK)
        peaks = {impl: memory.call("peak", impl) for impl in FORMS}
    medians = {name: statistics.median(each) for name, each in times.items()}
    others = list(medians)[1:]
    head = ["", "median ms", "min", "max", *(f"times faster than {name}" for name in others), "largest error"]
    head.append("extra memory, in inputs")
    rows = []
    for name, each in times.items():
        ratios = [f"{medians[other] / medians[name]:.2f}" for other in others]
        peak = f"{peaks[name]:.2f}" if name in peaks else ""
        rows.append([name, *spread(each, 3), *ratios, f"{errors[name]:.1e}", peak])
    text = (
        f"Damped EMA, forward and backward, fp32, {args.batch} x {args.length} tokens, {args.hidden} channels, "
        f"{args.states} averages, {args.threads} CPU thread(s), {args.repeats} repeats after {args.warmup} for "
        "warm-up, in turns. Timed in all of them: coefficients from parameters, the moving average, and the gradients "
        "of x and of the parameters; not the residual, nor silu. fft and transformers compute no end state. Errors are "
        "those of outputs and gradients against the recurrence in fp64, relative to a tensor's largest value."
    )
    figures = {"milliseconds": times, "median_ms": medians, "largest_error": errors, "peak_inputs": peaks}
    report(args, [text, table(head, rows)], {**figures, "versions": versions})


COMMANDS = {"ema": Command(OPTIONS, run, repeats=20, warmup=3)}
