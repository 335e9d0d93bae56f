"""What the benchmarks share: options, workers, turns, comparison with the truth, peak memory, and the report.

Workers run under a peer's Python too, so this module imports nothing of mega_scale.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
# Environment of a process that is timed: glibc would give freed memory back, and the system clear its pages anew in
# every step, at a cost that differs from step to step. Matrix products of tensors that are in no cache are 5 to 10
# percent slower without huge pages.
KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}  # fmt: skip
# Environment of a process whose memory is measured: large blocks go back to the system when they are freed, so that
# resident memory is what is in use, not what a heap was left with.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
_STATUS, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Option(NamedTuple):
    """An option of a command; its type is that of its default."""

    default: Any  # a number, a text, none for a text that may be left out, a list for several, or False for a flag
    help: str
    choices: Sequence[str] | None = None
    least: int = 1  # smallest integer that is allowed
    positional: bool = False  # words without a name, any number of them


_COMMON = {
    "batch": Option(1, "sequences"),
    "length": Option(2048, "tokens a sequence"),
    "lengths": Option([2048], "tokens a sequence"),
    "hidden": Option(512, "channels D"),
    "layers": Option(2, "blocks"),
    "shared": Option(128, "width Z of queries and keys"),
    "values": Option(1024, "width E of values"),
    "states": Option(16, "moving averages per channel N"),
    "chunk": Option(512, "tokens of a chunk of attention"),
    "vocabulary": Option(256, "token ids"),
    "activation": Option("softmax", "of attention", ["softmax", "laplace", "relu2"]),
    "config": Option("", "run whose model is trained"),
    "seed": Option(0, "of random numbers", least=0),
    "peer-python": Option(None, "interpreter with transformers 4.37.2, whose Mega is then compared too"),
    "threads": Option(1, "CPU threads of every process"),
    "json": Option(None, "file for all figures"),
    "repeats": Option(1, "timed runs of every contender"),
    "warmup": Option(0, "runs of every contender before them", least=0),
}


def common(**defaults: Any) -> dict[str, Option]:
    """Options that several commands have, with these defaults."""
    names = {name.replace("_", "-"): default for name, default in defaults.items()}
    return {name: _COMMON[name]._replace(default=default) for name, default in names.items()}


def add_options(parser: argparse.ArgumentParser, options: Mapping[str, Option]) -> None:
    """Declare a command's options, and those that all commands have."""

    def integer(text: str, least: int) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return int(text)

    for name, option in {**options, **common(threads=1, json=None)}.items():
        if option.positional:
            parser.add_argument(name, nargs="*", default=option.default, help=option.help, metavar="key=value")
            continue
        several = isinstance(option.default, list)
        sample = option.default[0] if several else option.default
        details: dict[str, Any] = {"action": "store_true"}
        if not isinstance(sample, bool):
            kind = {int: partial(integer, least=option.least), float: float}.get(type(sample), str)
            details = {"type": kind, "default": option.default, "choices": option.choices}
            details["nargs"] = ("*" if option.choices else "+") if several else None
        parser.add_argument(f"--{name}", help=option.help, **details)


def integers(args: argparse.Namespace) -> dict[str, Any]:
    """The options that are one integer, a model's sizes among them."""
    return {name: value for name, value in vars(args).items() if isinstance(value, int)}


@contextlib.contextmanager
def worker(
    target: str,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    *,
    name: str,
    python: str | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    show_errors: bool = False,
) -> Iterator[Callable[..., Any]]:
    """Yields what calls, by name, a function in a process with as many threads, over pipes, a line of JSON each way.

    `target` is `MODULE` of this folder, or `MODULE:NAME` of what makes, of `arguments`, an object with methods to call.
    Messages call it `name`. Without `show_errors` the last line of standard error is quoted where it fails. One that
    cannot be started is a ValueError, as is a call where the process ends instead, from a CalledProcessError.
    """
    threads = str(torch.get_num_threads())
    command = [python or sys.executable, str(Path(__file__).parent), "worker", target, json.dumps(dict(arguments))]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        try:
            process = subprocess.Popen(
                [*command, threads],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if show_errors else errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": threads, **environment},
            )
        except OSError as error:
            raise ValueError(f"{name} cannot be started: {error.strerror}") from error

        def call(method: str, *arguments: Any) -> Any:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # It has ended; the missing answer says so.
                print(json.dumps([method, *arguments]), file=process.stdin, flush=True)
            if line := process.stdout.readline():
                return json.loads(line)
            status = process.wait()
            errors.seek(0)
            last_line = (errors.read().strip() or "no message").splitlines()[-1]
            if status == -signal.SIGKILL:
                last_line = "killed, as a system does that is short of memory"
            ended = subprocess.CalledProcessError(status, name)
            raise ValueError(f"{name} ended with exit status {status}: {last_line}") from ended

        try:
            yield call
        finally:
            with contextlib.suppress(BrokenPipeError):
                try:
                    process.communicate(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()


def serve(target: str, arguments: str, threads: str) -> None:
    """Be a worker: answer the requests on standard input until it ends."""
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    module, _, name = target.partition(":")
    served = importlib.import_module(f"{__package__}.{module}")
    if name:
        served = getattr(served, name)(**json.loads(arguments))
    for line in sys.stdin:
        method, *values = json.loads(line)
        answers.write(json.dumps(getattr(served, method)(*values)) + "\n")


def in_turns(contenders: Mapping[str, Callable[[], T]], repeats: int, warmup: int) -> dict[str, list[T]]:
    """What contenders return, after the warm-up, in turns (A B C A B C ...), so that the machine's load meets all."""
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


def gpu_milliseconds(run: Callable[[], object], repeats: int, warmup: int) -> list[float]:
    """How long calls take on the GPU, by events."""

    def timed() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return in_turns({"": timed}, repeats, warmup)[""]


def gpu_name(command: str) -> str:
    """The GPU and its driver's CUDA. Raises ValueError where PyTorch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError(f"{command} measures a GPU, and PyTorch sees none: run it where there is one")
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


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


def timed_rows(times: Mapping[str, Sequence[float]], beside: str | None = None) -> list[dict[str, Any]]:
    """A row a contender; `ratio` is the median of its times over those of `beside`, or the first, in the same turns."""
    reference = times[beside or next(iter(times))]
    return [
        {
            "name": name, "times": each, "median": statistics.median(each), "least": min(each), "greatest": max(each),
            "ratio": statistics.median(own / other for own, other in zip(each, reference, strict=True)),
        }
        for name, each in times.items()
    ]  # fmt: skip


def report(
    args: argparse.Namespace,
    columns: Mapping[str, str],
    rows: Iterable[Mapping[str, Any]],
    *notes: str,
    versions: Mapping[str, str] = MappingProxyType({}),
    **figures: Any,
) -> None:
    """Print on what and with which options was measured, a table and notes; `--json` names a file for all `figures`.

    `columns` maps a head to a format of a row's figures; a cell is empty where they are missing or none.
    """

    def cell(template: str, row: Mapping[str, Any]) -> str:
        try:
            return template.format(**row)
        except (KeyError, TypeError):
            return ""

    found = {"torch": torch.__version__, "python": platform.python_version(), **versions}
    options = {name: value for name, value in vars(args).items() if name not in ("command", "run", "json")}
    lines = [list(columns), ["---"] * len(columns), *([cell(each, row) for each in columns.values()] for row in rows)]
    print(
        f"{hardware()}; {', '.join(f'{name} {version}' for name, version in found.items())}",
        f"{args.command}: {', '.join(f'{name} {value}' for name, value in options.items() if value)}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        *notes,
        sep="\n\n",
    )
    if args.json:
        content = {"benchmark": args.command, "options": options, "hardware": hardware(), "versions": found}
        content |= {"rows": rows, **figures}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hardware() -> str:
    """One line on the machine: processor, logical cores, operating system."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Not Linux: the platform's own name has to do.
        found = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        processor = found[1] if found else processor
    return f"{processor}, {os.cpu_count()} logical cores, {platform.system()} {platform.machine()}"


def watch_peak() -> Callable[[], int]:
    """What says, in bytes, how far this process's resident memory has grown since now; Linux only, else a ValueError.

    `ru_maxrss` would not do: a process inherits it from the one that started it, and it cannot be set back.
    """
    if not (_STATUS.exists() and _RESET_PEAK.exists()):
        raise ValueError(f"peak memory is read from {_STATUS} and reset in {_RESET_PEAK}, which exist on Linux only")
    _RESET_PEAK.write_text("5", encoding="ascii")  # the peak is now what is resident
    before = resident("VmRSS")
    return lambda: max(resident("VmHWM") - before, 0)


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at its peak."""
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
