"""The `accept` command: what one GPU has to show before a long run is paid for, in ten minutes.

Every stage is a process of its own with a limit, so that one which hangs or dies costs its limit and no more; what
settles most comes first. Each prints JSON lines as it finds facts, and the last line of all is the summary. With
`--device cpu` every stage runs at a tiny size, to see that it would run.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import harness, pairs
from .harness import Option

ACCEPT = {
    "device": Option("cuda", "cuda, or cpu for a rehearsal at a tiny size", ["cuda", "cpu"]),
    "gpus": Option(1, "2 runs what one cannot settle: layouts of two ranks, and a rank that is lost"),
    "stages": Option([""], "which; all unless named"),
    "config": Option("", "run whose step is timed; the Megalodon of 1.3B on a GPU"),
    "minutes": Option(10.0, "in all: what would begin later is left out"),
    "gpu": Option("h100", "figures of the roofline beside the times"),
    "lines": Option(None, "file for the JSON lines, which are printed too"),
    "list": Option(False, "print the stages with their limits, and run none"),
    "stage": Option(None, "run this one in this process, as each is run"),
}
# Sizes of a model that takes a CPU a moment.
_TINY = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.intermediate_size=32", "model.nffn_hidden_size=32",
    "model.shared_representation_size=16", "model.chunk_size=16", "model.timestep_norm_groups=4", "model.vocab_size=64",
    "data.sequence_length=64",
]  # fmt: skip
_RUN = [
    "train.log_every=2", "train.sample_tokens=8", "schedule.warmup_steps=2", "schedule.decay=constant",
    "parallel.self_test=true", "train.global_batch_size=8", "train.micro_batch_size=4", "data.sequence_length=256",
]  # fmt: skip


def say(**facts: Any) -> None:
    """Print one line of JSON at once."""
    print(json.dumps(facts), flush=True)


class Bench:
    """The device of a stage, and how calls are timed on it."""

    def __init__(self, device: str, config: str, gpu: str) -> None:
        self.device, self.config, self.gpu = torch.device(device), config, gpu
        self.cuda = device == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32

    def times(self, call: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
        """Median milliseconds of a call."""
        if self.cuda:
            return statistics.median(harness.gpu_milliseconds(call, repeats, warmup))
        return statistics.median(harness.milliseconds(call) for _ in range(3))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def facts(bench: Bench) -> None:
    """Versions, a copy's bandwidth, products of a block's sizes, what a launch takes the host."""
    versions = {name: _version(name) for name in ("triton", "transformers", "deepspeed", "torchao")}
    name = torch.cuda.get_device_name() if bench.cuda else harness.hardware()
    say(device=name, torch=torch.__version__, cuda=torch.version.cuda, processors=os.cpu_count(), **versions)
    source = torch.zeros(2**31 if bench.cuda else 2**24, device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    say(copy_TB_s=2 * len(source) / bench.times(lambda: target.copy_(source)) / 1e9)
    size = 8192 if bench.cuda else 256
    a, b = bench.normal(size, size), bench.normal(size, size)
    say(product=size, TFLOP_s=2 * size**3 / bench.times(lambda: a @ b) / 1e9)
    tokens, inner = (32768, 2048) if bench.cuda else (64, 32)
    x = bench.normal(tokens, inner)
    for width in (512, 2048, 4096, 4864) if bench.cuda else (16, 32):
        weight, gradient = bench.normal(width, inner), bench.normal(tokens, width)
        work = 2 * tokens * inner * width / 1e9
        calls = {
            "forward": partial(torch.matmul, x, weight.t()),
            "by_input": partial(torch.matmul, gradient, weight),
            "by_weight": partial(torch.matmul, gradient.t(), x),
        }
        rates = {f"{of}_TFLOP_s": work / bench.times(call) for of, call in calls.items()}
        say(product=f"{tokens} x {inner} x {width}", **rates)
    small = torch.zeros(8, device=bench.device)
    bench.wait()
    began = time.perf_counter()
    for _ in range(1000):
        small.add_(1)
    say(launch_us=(time.perf_counter() - began) * 1e3)
    bench.wait()


def kernels(bench: Bench) -> None:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no message"]
    say(tests=lines[-1], exit=done.returncode)
    if done.returncode not in ((0,) if bench.cuda else (0, 5)):
        raise ValueError("\n".join(lines[-20:]))


def average(bench: Bench) -> None:
    """Times of the moving average beside the fewest bytes that it can move, at five shapes."""
    from mega_scale.ops.ema import EmaCoefficients, damped_ema, ema_coefficients

    from .ema import EMA_PARAMETERS, ema_problem

    source = torch.zeros(2**31 if bench.cuda else 2**22, device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * len(source) / bench.times(lambda: target.copy_(source))  # bytes a millisecond
    shapes = [(1, 32768, 4096), (1, 32768, 2048), (8, 4096, 2048), (1, 4096, 2048)] if bench.cuda else [(1, 128, 16)]
    for (batch, length, hidden), dtype in [*((s, bench.dtype) for s in shapes), (shapes[0], torch.float32)]:
        problem = ema_problem(batch, length, hidden, 16, 0, bench.device.type)
        given = [
            t.detach().requires_grad_()
            for t in ema_coefficients(*(problem[n] for n in EMA_PARAMETERS))
            if t is not None
        ]
        x, dy = problem["x"].to(dtype).requires_grad_(), problem["dy"].to(dtype)

        def forward(x: Any = x, given: Any = given) -> torch.Tensor:
            return damped_ema(x, EmaCoefficients(*given))[0]

        y = forward()
        back = bench.times(partial(torch.autograd.grad, y, [x, *given], dy, retain_graph=True))
        ahead, once = bench.times(forward), x.nbytes / copy
        say(
            average=[batch, length, hidden], tokens=str(dtype).removeprefix("torch."), forward_ms=ahead,
            backward_ms=back, of_copy_forward=2 * once / ahead, of_copy_backward=3 * once / back,
        )  # fmt: skip


def _run_of(bench: Bench, *keys: str) -> Any:
    from mega_scale.config import RunConfig
    from mega_scale.settings import resolve

    config = bench.config or str(harness.ROOT / "configs/megalodon-1.3b.yaml")
    words = [*([] if bench.cuda else _TINY), "parallel.engine=fsdp", "train.global_batch_size=1", *keys]
    return resolve(RunConfig, [config], [tuple(word.split("=", 1)) for word in words])[0]  # type: ignore[misc]


def step(bench: Bench, *keys: str) -> None:
    """A training step of the run's model by its own engine: ms, MFU, peak memory."""
    import dataclasses

    from mega_scale.config import model_config
    from mega_scale.parallel import World
    from mega_scale.training.metrics import peak_flops, training_flops_per_token

    from .memory import build_engine, train_step

    run = _run_of(bench, "train.dtype=bf16", *keys)
    config, length = model_config(run.model), run.data.sequence_length
    how = run.engine_config(1)
    how = dataclasses.replace(
        how, parallel=dataclasses.replace(how.parallel, device=bench.device.type, self_test=False)
    )
    tokens = torch.randint(3, config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    with World.start(how.parallel) as world, contextlib.closing(build_engine(config, how, world)) as engine:
        text, losses = tokens.to(bench.device), []
        began = time.perf_counter()
        losses.append(train_step(engine, world, text, 1e-4)["loss"])
        first = time.perf_counter() - began
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        took = bench.times(lambda: losses.append(train_step(engine, world, text, 1e-4)["loss"]), 4, 1)
        found: dict[str, Any] = {"step": list(keys), "ms": took, "first_s": first, "loss": losses[-1]}
        if bench.cuda:
            peak = peak_flops(bench.device, "bf16")
            flops = length * training_flops_per_token(config, length)
            found |= {"peak_GB": torch.cuda.max_memory_allocated() / 1e9, "mfu": peak and flops / peak / took * 1e3}
        say(**found)


def fp8(bench: Bench) -> None:
    """Products in fp8 beside bf16 at the sizes of a block."""
    tokens, inner = (32768, 2048) if bench.cuda else (64, 32)
    one, x = torch.ones((), device=bench.device), bench.normal(tokens, inner).to(torch.float8_e4m3fn)
    for width in (4096, 4864) if bench.cuda else (32,):
        weight = bench.normal(width, inner).to(torch.float8_e4m3fn)
        took = bench.times(partial(torch._scaled_mm, x, weight.t(), one, one, out_dtype=torch.bfloat16))
        say(fp8=f"{tokens} x {inner} x {width}", TFLOP_s=2 * tokens * inner * width / took / 1e9)


def staging(bench: Bench) -> None:
    """Copies of a checkpoint's state to the host, alone and beside products."""
    from mega_scale.checkpoint.saver import Staging

    state = {str(i): torch.zeros(2**26 if bench.cuda else 2**16, device=bench.device) for i in range(8)}
    stage, size = Staging(bench.device), 2048 if not bench.cuda else 8192
    a = bench.normal(size, size) if bench.cuda else bench.normal(64, 64)
    alone = bench.times(lambda: a @ a)
    for what in ("first", "second"):
        stage.mark()
        worker = threading.Thread(target=stage.copy, args=(state,))
        began = time.perf_counter()
        worker.start()
        beside = bench.times(lambda: a @ a)
        worker.join()
        say(staging=what, seconds=time.perf_counter() - began, product_ms=alone, product_beside_ms=beside)


def launched(bench: Bench, engine: str) -> None:
    """What users start: self-test, training, saves, evaluation, sample; stopped and resumed, with the same losses."""
    launcher = {
        "fsdp": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"],
        "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "1"],
    }[engine]  # fmt: skip
    steps = (40, 20) if bench.cuda else (4, 2)
    keys = [
        f"parallel.engine={engine}", *_RUN, "train.dtype=bf16", f"train.eval_every={steps[1]}",
        f"train.sample_every={steps[1]}", f"checkpoint.every={steps[1]}", f"parallel.device={bench.device.type}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for what, last, where, more in (
            ("whole", steps[0], "a", []), ("half", steps[1], "b", []), ("rest", steps[0], "b", ["--resume"]),
        ):  # fmt: skip
            command = [*launcher, str(harness.ROOT / "launch/pretrain.py"), *keys, f"train.steps={last}"]
            began = time.perf_counter()
            done = subprocess.run(
                [*command, f"run_dir={folder}/{where}", *more], capture_output=True, text=True, cwd=folder, check=False
            )
            say(run=engine, part=what, exit=done.returncode, seconds=time.perf_counter() - began)
            if done.returncode:
                raise ValueError((done.stderr or done.stdout)[-1500:])
        losses = []
        for where in "ab":
            lines = [json.loads(line) for line in (Path(folder) / where / "metrics.jsonl").read_text().splitlines()]
            losses.append([line["loss"] for line in lines if line.get("part") == "train"])
        equal = bool(losses[0]) and losses[0][-1] == losses[1][-1]
        say(run=engine, resumed_equal=equal, loss=losses[0][-1:])
        if not equal:
            raise ValueError(f"losses after a resume differ: {losses}")


def roofline(bench: Bench) -> None:
    """What the steps should take, by the roofline."""
    from mega_scale.parallel.devices import Device
    from mega_scale.parallel.roofline import mfu, total
    from mega_scale.training.metrics import training_flops_per_token

    from .roofline import model_config, predict

    gpu = Device.named(bench.gpu)
    for keys in STEPS.values():
        run = _run_of(bench, "train.dtype=bf16", *keys)
        found = predict(run, gpu)
        took = total(found.micro).seconds + total(found.step).seconds
        flops = run.data.sequence_length * training_flops_per_token(model_config(run.model), run.data.sequence_length)
        say(
            predicted=list(keys),
            ms=1e3 * took,
            mfu=mfu(flops, took, gpu),
            kept_GB=found.kept / 1e9,
            peak_GB=found.peak / 1e9,
        )


def lengths(bench: Bench) -> None:
    """Steps of 4K to 128K tokens, and a Llama of the same size."""
    if bench.cuda:
        config = bench.config or str(harness.ROOT / "configs/megalodon-1.3b.yaml")
        words = [
            "mfu",
            "--config",
            config,
            "--compile",
            "--repeats",
            "3",
            "--warmup",
            "2",
            "--recompute",
            "1",
            "1",
            "1",
        ]
        words += ["--lengths", "4096", "32768", "131072"]
    else:
        words = ["step", "--lengths", "32", "64", "--hidden", "32", "--layers", "1", "--shared", "16", "--values", "32"]
        words += ["--chunk", "16", "--vocabulary", "64", "--repeats", "1", "--warmup", "0", "--megalodon"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, str(Path(__file__).parent), *words, "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(done.stderr[-1500:])
        for row in json.loads(file.read_text())["rows"]:
            wanted = ("kind", "name", "length", "median_ms", "median", "rate", "mfu", "peak_gb")
            say(**{key: row[key] for key in wanted if row.get(key) is not None})


STEPS = {
    "eager": ("train.compile=false", "parallel.activation_checkpoint=1"),
    "compiled": ("train.compile=true", "parallel.activation_checkpoint=1"),
    "kept": ("train.compile=true", "parallel.activation_checkpoint=0"),
}
_STEP, _RUN_WORDS = step.__doc__ or "", launched.__doc__ or ""
WORDS = dict.fromkeys(("step_eager", "step_compiled", "step_kept"), _STEP)
WORDS |= dict.fromkeys(("run_fsdp", "run_deepspeed"), _RUN_WORDS)
# Seconds at most, and what runs.
STAGES: dict[str, tuple[int, Callable[[Bench], None]]] = {
    "facts": (40, facts),
    "kernels": (120, kernels),
    "average": (50, average),
    "roofline": (60, roofline),
    "step_eager": (60, lambda bench: step(bench, *STEPS["eager"])),
    "step_compiled": (90, lambda bench: step(bench, *STEPS["compiled"])),
    "step_kept": (90, lambda bench: step(bench, *STEPS["kept"])),
    "run_fsdp": (90, lambda bench: launched(bench, "fsdp")),
    "run_deepspeed": (100, lambda bench: launched(bench, "deepspeed")),
    "lengths": (120, lengths),
    "staging": (20, staging),
    "fp8": (20, fp8),
}
# The same of two GPUs.
PAIRS: dict[str, tuple[int, Callable[[Bench], None]]] = {
    "lost": (240, lambda bench: pairs.lost(bench.device, say)),
    "layouts": (480, lambda bench: pairs.layouts(bench.device, say)),
}
WORDS |= {"lost": pairs.lost.__doc__ or "", "layouts": pairs.layouts.__doc__ or ""}


def run_accept(args: argparse.Namespace) -> None:
    """Run the stages and print their lines. Raises ValueError where a name is unknown, or a stage failed."""
    if args.gpus not in (1, 2):
        raise ValueError(f"--gpus {args.gpus}: there are stages for 1 and for 2")
    known = STAGES if args.gpus == 1 else PAIRS
    stages = [name for name in args.stages if name] or list(known)
    for name in [*stages, *([args.stage] if args.stage else [])]:
        if name not in known:
            raise ValueError(f"--stages {name} is unknown: choose of {', '.join(known)}")
    if args.list:
        for name, (limit, what) in known.items():
            print(f"{name:14} {limit:4} s  {(what.__doc__ or WORDS[name]).strip()}")
        return
    if args.device == "cuda":
        harness.gpu_name("accept")
        if torch.cuda.device_count() < args.gpus:
            raise ValueError(f"--gpus {args.gpus}: PyTorch sees {torch.cuda.device_count()}")
    if args.stage:
        known[args.stage][1](Bench(args.device, args.config, args.gpu))
        return
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(args.lines, "w", encoding="utf-8")) if args.lines else None
        summary = {}
        end = time.monotonic() + 60 * args.minutes

        def tell(**facts: Any) -> None:
            line = json.dumps(facts)
            print(line, flush=True)
            if file:
                print(line, file=file, flush=True)

        for name in stages:
            limit = min(known[name][0], end - time.monotonic())
            began, outcome = time.monotonic(), "no time left"
            if limit > 0:
                outcome = "unknown"
                for line in _stage(args, name, limit):
                    outcome = line.get("outcome", outcome)
                    tell(stage=name, **line)
            summary[name] = {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
        tell(summary=summary)
    failed = [name for name, found in summary.items() if found["outcome"] != "passed"]
    if failed:
        raise ValueError(f"stages did not pass: {', '.join(failed)}; their lines above say why")


def _stage(args: argparse.Namespace, name: str, limit: float) -> Iterator[dict[str, Any]]:
    """The lines of one stage in a process of its own, the last one with its outcome."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent), "accept", "--stage", name]
    command += [
        "--gpus",
        str(args.gpus),
        "--device",
        args.device,
        "--config",
        args.config,
        "--gpu",
        args.gpu,
        "--threads",
        str(args.threads),
    ]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        # A group of its own, as a stage may start launchers and ranks.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        late = threading.Event()

        def stop() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue  # what a library prints
                if isinstance(found, dict):
                    yield found
            status = process.wait()
        finally:
            timer.cancel()
            stop_late = late.is_set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind
        errors.seek(0)
        said = errors.read().strip()[-1500:]
        if stop_late:
            yield {"outcome": f"took more than {limit:.0f} s", "error": said}
        elif status:
            yield {"outcome": f"failed with exit status {status}", "error": said}
        else:
            yield {"outcome": "passed"}


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
