"""What the benchmarks share: workers, turns, comparison with the truth, tables, peak memory, what the machine can do.

Workers run under a peer's Python too, so this module imports nothing of mega_scale.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
KEEPS_MEMORY: Mapping[str, str] = MappingProxyType({
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
})  # fmt: skip
"""Environment of a process that is timed: glibc would give freed memory back, and the system clear its pages anew in
every step, at a cost that differs from step to step. Matrix products of tensors that are in no cache are 5 to 10
percent slower without huge pages."""
GIVES_BACK: Mapping[str, str] = MappingProxyType({"MALLOC_MMAP_THRESHOLD_": "65536"})
"""Environment of a process whose memory is measured: large blocks go back to the system when they are freed, so that
resident memory is what is in use, not what a heap was left with."""
_STATUS, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PRODUCT_RUNS = 8


class Option(NamedTuple):
    """An option of a command; its type is that of its default."""

    default: Any  # a number, a text, none for a text that may be left out, a list for several, or False for a flag
    help: str
    choices: Sequence[str] | None = None
    least: int = 1  # number that is allowed


class Command(NamedTuple):
    """A command: its own options by name, and the function that measures and prints."""

    options: Mapping[str, Option]
    run: Callable[[argparse.Namespace], None]
    repeats: int = 0  # default of --repeats; 0 for a command without --repeats and --warmup
    warmup: int = 0
    replaced: Mapping[str, str] = MappingProxyType({})  # what to use instead of options that it had once


def add_options(parser: argparse.ArgumentParser, command: Command) -> None:
    """Declare a command's options, and those that all commands have."""
    options = {**command.options, "threads": Option(1, "CPU threads of every process")}
    options["json"] = Option(None, "file for all figures")
    if command.repeats:
        options["repeats"] = Option(command.repeats, "timed runs of every contender")
        options["warmup"] = Option(command.warmup, "runs of every contender before them", least=0)
    for name, option in options.items():
        several = isinstance(option.default, list)
        sample = option.default[0] if several else option.default
        details: dict[str, Any] = {"action": "store_true"}
        if not isinstance(sample, bool):
            kind = {int: _at_least(option.least), float: float}.get(type(sample), str)
            details = {"type": kind, "default": option.default, "choices": option.choices}
            details["nargs"] = ("*" if option.choices else "+") if several else None
        parser.add_argument(f"--{name}", help=option.help, **details)


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return int(text)

    return integer


class WorkerError(ValueError):
    """A worker ended without an answer, with an exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Worker:
    """An object in a process of its own, whose methods are called over pipes, a line of JSON each way.

    Args:
        target: `MODULE:CLASS` of this folder.
        arguments: of the class.
        name: what error messages call it.
        threads: CPU threads that it may use.
        python: its interpreter.
        environment: more variables for it.
        show_errors: leave its standard error to the terminal, rather than quote its last line where it fails.

    Raises:
        ValueError: it cannot be started.
    """

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        name: str,
        threads: int,
        python: str = sys.executable,
        environment: Mapping[str, str] = MappingProxyType({}),
        show_errors: bool = False,
    ) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  `close` does
        command = [python, str(Path(__file__).parent), "worker", target, json.dumps(dict(arguments)), str(threads)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if show_errors else self._errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
            )
        except OSError as error:
            self._errors.close()
            raise ValueError(f"{name} cannot be started: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the object returns. Raises WorkerError when the process ends instead."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended; the missing answer says so.
            self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        last_line = (self._errors.read().strip() or "no message").splitlines()[-1]
        if status == -signal.SIGKILL:
            last_line = "killed, as a system does that is short of memory"
        raise WorkerError(f"{self._name} ended with exit status {status}: {last_line}", status)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """End it, and give it ten seconds for that."""
        with contextlib.suppress(BrokenPipeError):
            try:
                self._process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
        self._errors.close()


def serve(target: str, arguments: str, threads: str) -> None:
    """Be a worker: answer the requests on standard input until it ends."""
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    module, name = target.split(":")
    served = getattr(importlib.import_module(f"{__package__}.{module}"), name)(**json.loads(arguments))
    for line in sys.stdin:
        method, *values = json.loads(line)
        answers.write(json.dumps(getattr(served, method)(*values)) + "\n")


def in_turns(contenders: Mapping[str, Callable[[], T]], repeats: int, warmup: int) -> dict[str, list[T]]:
    """Run contenders in turns (A B C A B C ...), so that a change in the machine's load meets all of them.

    Returns:
        By name, what the runs after the warm-up returned, such as their milliseconds.
    """
    found: dict[str, list[T]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            value = run()
            if turn >= warmup:
                found[name].append(value)
    return found


def milliseconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long a call takes."""
    began = clock()
    run()
    return 1e3 * (clock() - began)


def relative_error(found: Tensor | float, truth: Tensor | float) -> float:
    """Largest difference of a result from the truth, relative to the truth's largest value."""
    wanted, given = (torch.as_tensor(value, dtype=torch.float64) for value in (truth, found))
    return float((given - wanted).abs().max() / wanted.abs().max())


def check_errors(name: str, errors: Mapping[str, float], tolerance: float) -> float:
    """The largest of some relative errors. Raises ValueError where one is larger than allowed, or NaN."""
    wrong = [f"{what} by {error:.1e}" for what, error in errors.items() if not error <= tolerance]
    if wrong:
        raise ValueError(f"{name} is not reported: it is wrong in {', '.join(wrong)}; {tolerance:.0e} is allowed")
    return max(errors.values())


def compare(
    name: str, found: Mapping[str, Tensor | float], truth: Mapping[str, Tensor | float], tolerance: float
) -> float:
    """The largest relative error of results, those of `truth`; see `check_errors`."""
    return check_errors(name, {what: relative_error(found[what], truth[what]) for what in truth}, tolerance)


def spread(times: Sequence[float], digits: int) -> list[str]:
    """Median, least and greatest, for a table."""
    return [f"{value:,.{digits}f}" for value in (statistics.median(times), min(times), max(times))]


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def report(args: argparse.Namespace, text: Sequence[str], figures: Mapping[str, Any]) -> None:
    """Print what was found, and what it was found on; write the figures to the file that `--json` names."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), **figures.get("versions", {})}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"Machine: {hardware()}. Versions: {said}.", *text, sep="\n\n")
    if args.json:
        options = {name: value for name, value in vars(args).items() if name not in ("command", "run", "json")}
        head = {"benchmark": args.command, "options": options, "hardware": hardware()}
        content = {**head, **figures, "versions": versions}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hardware() -> str:
    """One line on the machine: processor, logical cores, operating system."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Not Linux: the platform's own name has to do.
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return f"{processor}, {os.cpu_count()} logical cores, {platform.system()} {platform.machine()}"


class PeakMemory:
    """Watches how far this process grows from here on: its resident memory at its highest, less that of now.

    `ru_maxrss` would not do: a process inherits it from the one that started it, and it cannot be set back.

    Raises:
        ValueError: the system keeps no such figure; only Linux does.
    """

    def __init__(self) -> None:
        if not (_STATUS.exists() and _RESET_PEAK.exists()):
            raise ValueError(
                f"peak memory is read from {_STATUS} and reset in {_RESET_PEAK}, which exist on Linux only"
            )
        _RESET_PEAK.write_text("5", encoding="ascii")  # the peak is now what is resident
        self._before = resident("VmRSS")

    def growth(self) -> int:
        """Bytes so far."""
        return max(resident("VmHWM") - self._before, 0)


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at its peak."""
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def product_rates(tokens: int, wide: int, narrow: int) -> dict[str, float]:
    """What matrix products (tokens, wide) x (wide, narrow) in fp32 reach now, by the library that computes them.

    Returns:
        Operations per second, the best of some runs.
    """
    x, weight = torch.ones(tokens, wide), torch.ones(wide, narrow)
    products: dict[str, Callable[[], Tensor]] = {"torch.mm": lambda: torch.mm(x, weight)}
    if torch.backends.mkldnn.is_available():
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight.t(), None, "none", [], "")
    times = in_turns({name: partial(milliseconds, product) for name, product in products.items()}, _PRODUCT_RUNS, 0)
    return {name: 2 * tokens * wide * narrow / (min(each) / 1e3) for name, each in times.items()}
