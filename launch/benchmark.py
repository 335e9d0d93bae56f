"""Measures what we build against its peers, in one run, after checking that all of them compute the same.

    python launch/benchmark.py ema --peer-python /path/to/python-with-transformers-4.37.2
    python launch/benchmark.py step --lengths 2048 8192 --peer-python /path/to/python-with-transformers-4.37.2
    python launch/benchmark.py step --lengths 2048 8192 32768 --segment 2048 --peers llama mamba2 --plot step.png
    python launch/benchmark.py decode --tokens 16384 --chunk 128
    python launch/benchmark.py decode --contexts 1024 2048 131072 --hidden 512 --layers 4 --shared 128 --values 1024 \
        --chunk 512 --peer-python /path/to/python-with-transformers-4.37.2
    python launch/benchmark.py memory --lengths 65536 262144 --sp 1 2 4
    python launch/benchmark.py long --length 131072 --segment 8192
    python launch/benchmark.py loader --megabytes 10 5000
    python launch/benchmark.py prepare --megabytes 200
    python launch/benchmark.py checkpoint --megabytes 200
    python launch/benchmark.py reset --document 100 500 2000
    python launch/benchmark.py kernels --architectures 80 90
    python launch/benchmark.py bandwidth --hidden 4096 --length 32768
    python launch/benchmark.py mfu --lengths 4096 32768 131072 --recompute 2 2 1

Timed contenders take turns (A B C A B C ...), so that a change in the machine's load meets all of them; the table gives
median, least and greatest time. What is not correct is not reported.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mega_scale.ops.ema import EmaCoefficients, damped_ema
from mega_scale.process import run_command
from mega_scale.settings import local_paths

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python puts launch/ itself there, not what holds it.
from launch.benchmark_bandwidth import add_bandwidth_arguments, run_bandwidth
from launch.benchmark_checkpoint import add_checkpoint_arguments, run_checkpoint
from launch.benchmark_data import add_loader_arguments, add_prepare_arguments, run_loader, run_prepare
from launch.benchmark_decode import add_decode_arguments, run_decode
from launch.benchmark_documents import add_reset_arguments, run_reset
from launch.benchmark_kernels import add_kernels_arguments, run_kernels
from launch.benchmark_long import add_long_arguments, run_long
from launch.benchmark_memory import add_memory_arguments, run_memory
from launch.benchmark_mfu import add_mfu_arguments, run_mfu
from launch.benchmark_step import add_step_arguments, run_step
from launch.machine import hardware
from launch.worker_process import WorkerProcess

TOLERANCE = 1e-4
PARAMETERS = ("damping", "decay", "expansion", "projection")
WORKER = Path(__file__).with_name("benchmark_peer.py")
_EMA_FORMS = ("native", "blocked", "fft")
MEMORY = Path(__file__).with_name("ema_memory.py")


class Contender(Protocol):
    """One implementation of what a sub-command times."""

    name: str

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients by name, for the check against the reference."""

    def time(self) -> float:
        """Run once.

        Returns:
            Duration in milliseconds.
        """


class OurEma:
    """`damped_ema` of this project.

    Args:
        impl: its implementation.
        problem: x and dy (B, L, D); damping, decay, expansion (D, N, 1); projection (D, N).
    """

    def __init__(self, impl: str, problem: dict[str, Tensor]) -> None:
        self.name = impl
        self.impl = impl
        # A kernel truncated at the full length is the same kernel, without the state that a plain convolution lacks.
        self.truncation = problem["x"].shape[1] if impl == "fft" else None
        self.leaves = {name: problem[name].clone().requires_grad_() for name in ("x", *PARAMETERS)}
        self.dy = problem["dy"]

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One forward and backward.

        Returns:
            y (B, L, D), and the gradients of x and of the parameters.
        """
        coefficients = EmaCoefficients.from_parameters(*(self.leaves[name] for name in PARAMETERS))
        y, _ = damped_ema(self.leaves["x"], coefficients, impl=self.impl, truncation=self.truncation)
        return y, torch.autograd.grad(y, list(self.leaves.values()), self.dy)

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients: y, dx, ddamping, ddecay, dexpansion, dprojection."""
        y, grads = self.run()
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}}

    def time(self) -> float:
        """Run once.

        Returns:
            Duration in milliseconds.
        """
        start = time.perf_counter()
        self.run()
        return 1e3 * (time.perf_counter() - start)


class Peer:
    """An implementation that runs in another interpreter, timed there.

    Args:
        what: the sub-command.
        python: the interpreter.
        problem: the same tensors that our implementations get.
        threads: CPU threads of the other process.
        folder: where tensors are exchanged.

    Raises:
        ValueError: the interpreter cannot be started, or does not answer; with the end of what it said.
    """

    def __init__(self, what: str, python: str, problem: dict[str, Tensor], threads: int, folder: Path) -> None:
        self.folder = folder
        save_file(problem, folder / "problem.safetensors")
        command = [python, str(WORKER), what, str(folder / "problem.safetensors"), str(threads)]
        try:
            self.process = WorkerProcess(command, threads, (folder / "errors.txt").open("w+", encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--peer-python {python} cannot be started: {error.strerror}") from error
        self.versions: dict[str, str] = self.process.ready
        self.name = f"transformers {self.versions['transformers']}"

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients, through a file."""
        return load_file(self.process.ask(f"check {self.folder / 'results.safetensors'}")["file"])

    def time(self) -> float:
        """Run once.

        Returns:
            Duration in milliseconds, measured by the other process.
        """
        return float(self.process.ask("time")["ms"])

    def close(self) -> None:
        """End the other process."""
        self.process.close()


def ema_problem(batch: int, length: int, hidden: int, states: int, seed: int) -> dict[str, Tensor]:
    """Input, output gradient and freshly initialised parameters of one EMA layer, drawn from a seed.

    Args:
        batch: sequences.
        length: tokens.
        hidden: channels D.
        states: moving averages per channel N.
        seed: of the generator.

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


def largest_errors(contenders: Sequence[Contender], reference: dict[str, Tensor]) -> dict[str, float]:
    """Check every contender against the reference.

    Args:
        contenders: what is to be timed.
        reference: outputs and gradients by name.

    Returns:
        For each contender's name the largest error of all tensors, relative to the tensor's largest value.

    Raises:
        ValueError: a contender differs by more than TOLERANCE; names contender, tensor and error.
    """
    largest = {}
    for contender in contenders:
        results = contender.results()
        errors = {
            name: ((results[name].double() - truth.double()).abs().max() / truth.double().abs().max()).item()
            for name, truth in reference.items()
        }
        # not <=, so that NaN fails
        wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
        if wrong:
            raise ValueError(
                f"{contender.name} is not timed: it differs from the reference in {', '.join(wrong)} "
                f"of the largest value; {TOLERANCE:.0e} is allowed"
            )
        largest[contender.name] = max(errors.values())
    return largest


def interleave(contenders: Sequence[Contender], repeats: int, warmup: int) -> dict[str, list[float]]:
    """Time contenders in turns.

    Args:
        contenders: what to time.
        repeats: timed runs of each.
        warmup: runs of each before them, not counted.

    Returns:
        For each contender's name its durations, milliseconds.
    """
    for _ in range(warmup):
        for contender in contenders:
            contender.time()
    durations: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            durations[contender.name].append(contender.time())
    return durations


def peak_inputs(implementation: str, file: Path, threads: int) -> float:
    """Memory that one of our implementations needs beyond its input and the output's gradient, in sizes of its input.

    Args:
        implementation: see `damped_ema`.
        file: the problem, safetensors.
        threads: CPU threads.

    Raises:
        ValueError: the process that measures it fails; with the end of what it said.
    """
    command = [sys.executable, str(MEMORY), implementation, str(file), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"memory of {implementation} cannot be measured: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout)


def table(durations: dict[str, list[float]], errors: dict[str, float]) -> str:
    """Markdown table of durations, with the ratio of medians to every contender but the first.

    Args:
        durations: milliseconds by contender, our main one first.
        errors: largest relative error by contender.

    Returns:
        The table; "times faster than P" is P's median over the row's.
    """
    medians = {name: statistics.median(times) for name, times in durations.items()}
    peers = list(medians)[1:]
    rows = [
        ["", "median ms", "min", "max", *(f"times faster than {peer}" for peer in peers), "largest error"],
        ["---"] * (5 + len(peers)),
    ]
    for name, times in durations.items():
        cells = [f"{medians[name]:.3f}", f"{min(times):.3f}", f"{max(times):.3f}"]
        cells += [f"{medians[peer] / medians[name]:.2f}" for peer in peers]
        rows.append([name, *cells, f"{errors[name]:.1e}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def run_ema(args: argparse.Namespace) -> None:
    """The `ema` sub-command: forward + backward of the damped EMA."""
    sizes = {name: getattr(args, name) for name in ("batch", "length", "hidden", "states")}
    problem = ema_problem(**sizes, seed=args.seed)
    reference = OurEma("recurrent", {name: tensor.double() for name, tensor in problem.items()}).results()
    contenders: list[Contender] = [OurEma(impl, problem) for impl in _EMA_FORMS]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if args.peer_python:
            peer = Peer("ema", args.peer_python, problem, args.threads, Path(folder))
            versions |= {f"peer's {package}": version for package, version in peer.versions.items()}
            contenders.append(peer)
        try:
            errors = largest_errors(contenders, reference)
            durations = interleave(contenders, args.repeats, args.warmup)
        finally:
            if peer is not None:
                peer.close()
        file = Path(folder) / "ours.safetensors"
        save_file(problem, file)
        peaks = {impl: peak_inputs(impl, file, args.threads) for impl in _EMA_FORMS}
    lines = [
        f"Damped EMA, forward + backward, fp32, {', '.join(f'{name} {size}' for name, size in sizes.items())}, "
        f"{args.threads} CPU thread(s), {args.repeats} repeats after {args.warmup} for warm-up, in turns.",
        "Timed in all of them: coefficients from parameters, the moving average, and the gradients of x and of the "
        "four parameters; not the residual, nor silu. fft and transformers compute no end state.",
        "Largest error: of outputs and gradients against the recurrence in fp64, relative to a tensor's largest value.",
        f"Machine: {hardware()}. Versions: {', '.join(' '.join(version) for version in versions.items())}.",
    ]
    memory = ", ".join(f"{impl} {peak:.2f}" for impl, peak in peaks.items())
    print("\n".join(lines), table(durations, errors), f"Peak of extra memory, in inputs: {memory}.", sep="\n\n")
    if args.json:
        report = {
            "benchmark": "ema",
            "sizes": sizes,
            "threads": args.threads,
            "seed": args.seed,
            "hardware": hardware(),
            "versions": versions,
            "milliseconds": durations,
            "median_ms": {name: statistics.median(times) for name, times in durations.items()},
            "largest_error": errors,
            "peak_inputs": peaks,
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line; each sub-command sets `run` to its function."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    ema = commands.add_parser("ema", help="forward + backward of the damped EMA", formatter_class=formatter)
    ema.add_argument("--batch", type=positive, default=2, help="sequences")
    ema.add_argument("--length", type=positive, default=2048, help="tokens a sequence")
    ema.add_argument("--hidden", type=positive, default=512, help="channels")
    ema.add_argument("--states", type=positive, default=16, help="moving averages per channel")
    ema.add_argument("--seed", type=int, default=0, help="of inputs and parameters")
    ema.add_argument("--peer-python", default=None, help="interpreter with transformers 4.37.2, to compare with")
    _add_timing(ema, run_ema)
    step = commands.add_parser("step", help="a training step against peers, by length", formatter_class=formatter)
    add_step_arguments(step, positive)
    _add_timing(step, run_step, repeats=3, warmup=1)
    words = "time per token and cache bytes as a text grows"
    decode = commands.add_parser("decode", help=words, formatter_class=formatter)
    add_decode_arguments(decode, positive)
    _add_timing(decode, run_decode, repeats=5, warmup=1)
    words = "memory per rank of training one long sequence that ranks share"
    memory = commands.add_parser("memory", help=words, formatter_class=formatter)
    add_memory_arguments(memory, positive)
    _add_common(memory, run_memory)
    words = "memory of a training step of a recipe's model on one long sequence"
    long = commands.add_parser("long", help=words, formatter_class=formatter)
    add_long_arguments(long, positive)
    _add_common(long, run_long)
    loader = commands.add_parser("loader", help="prepared data to batches: tokens/s, memory", formatter_class=formatter)
    add_loader_arguments(loader, positive)
    loader.add_argument("--threads", type=positive, default=1, help="CPU threads")
    loader.add_argument("--json", default=None, help="file for all figures")
    loader.set_defaults(run=run_loader)
    prepare = commands.add_parser(
        "prepare", help="text to prepared data against datasets.map", formatter_class=formatter
    )
    add_prepare_arguments(prepare, positive)
    _add_timing(prepare, run_prepare, repeats=1, warmup=0)
    words = "how long saves stop training, and what verification costs"
    checkpoint = commands.add_parser("checkpoint", help=words, formatter_class=formatter)
    add_checkpoint_arguments(checkpoint, positive)
    _add_timing(checkpoint, run_checkpoint, repeats=7, warmup=1)
    words = "training with documents of a row kept apart, against end to end"
    reset = commands.add_parser("reset", help=words, formatter_class=formatter)
    add_reset_arguments(reset, positive)
    _add_timing(reset, run_reset, repeats=15, warmup=2)
    _add_gpu_commands(commands, formatter)
    return top


def _add_gpu_commands(commands: Any, formatter: Any) -> None:
    words = "Triton kernels compiled for GPUs that need not be here: registers, shared memory, spills"
    kernels = commands.add_parser("kernels", help=words, formatter_class=formatter)
    add_kernels_arguments(kernels, positive)
    _add_common(kernels, run_kernels)
    words = "the moving average on a GPU as a share of a copy's bandwidth"
    bandwidth = commands.add_parser("bandwidth", help=words, formatter_class=formatter)
    add_bandwidth_arguments(bandwidth, positive)
    _add_timing(bandwidth, run_bandwidth, repeats=30, warmup=5)
    words = "training steps of a large model on a GPU, against a Llama of its size"
    mfu = commands.add_parser("mfu", help=words, formatter_class=formatter)
    add_mfu_arguments(mfu, positive)
    _add_timing(mfu, run_mfu, repeats=5, warmup=3)


def _add_common(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    command.add_argument("--threads", type=positive, default=1, help="CPU threads of every process")
    command.add_argument("--json", default=None, help="file for all figures")
    command.set_defaults(run=run)


def _add_timing(
    command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], repeats: int = 20, warmup: int = 3
) -> None:
    _add_common(command, run)
    command.add_argument("--repeats", type=positive, default=repeats, help="timed runs of every contender")
    command.add_argument("--warmup", type=positive, default=warmup, help="runs of every contender before them")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        arguments: the command line, without the program's name; none means this process's.

    Returns:
        Exit status: 2 with one line on standard error when something is wrong.
    """
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    try:
        local_paths(args)
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
