"""The `bandwidth`, `kernels` and `mfu` commands: what only GPUs do, or what kernels for them are compiled to.

`bandwidth`: the moving average as a share of a copy's bandwidth. Bytes are the fewest there can be: forward reads x and
writes y, backward reads x and dy and writes dx; what kernels move beyond that counts against them. `kernels` needs no
GPU. `mfu`: training steps of a recipe's model against a Llama of its size. Ours is the trainer's own step: its engine
on one process, bf16 with fp32 masters, sliced loss, clipping, AdamW. MFU is the model's operations over the vendor's
peak of matrix products; recomputed activations do not count.
"""

import argparse
import gc
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mega_scale import MegaConfig
from mega_scale.config import load_config
from mega_scale.config import model_config as run_model_config
from mega_scale.model.flops import training_flops_per_token
from mega_scale.ops.cross_entropy import linear_cross_entropy
from mega_scale.ops.ema import EmaCoefficients, damped_ema
from mega_scale.parallel import EngineConfig, ParallelConfig, World, seeded_values
from mega_scale.parallel.shard import Values
from mega_scale.training.metrics import peak_flops

from .harness import (
    ROOT,
    Command,
    Option,
    Worker,
    WorkerError,
    check_errors,
    relative_error,
    report,
    table,
)
from .ours import build_engine
from .peers import llama, parameter_count

_MATRIX = 8192
_COPY_BYTES = 2**31
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHECKED_CHANNELS = 16
_FIGURES = {"forward_ms": 3, "forward_share": 2, "backward_ms": 3, "backward_share": 2}  # digits
_FORMS = ["triton", "blocked"]
BANDWIDTH = {
    "batch": Option(1, "sequences"),
    "length": Option(32768, "tokens a sequence"),
    "hidden": Option(4096, "channels"),
    "states": Option(16, "moving averages per channel"),
    "dtypes": Option(list(_DTYPES), "of tokens", list(_DTYPES)),
    "impls": Option(_FORMS, "forms of the moving average", _FORMS),
}
KERNELS = {
    "architectures": Option([80, 90], "compute capabilities: 80 A100, 90 H100"),
    "dtypes": Option(["bf16", "fp32"], "of tokens", ["bf16", "fp16", "fp32"]),
    "states": Option([16], "moving averages per channel"),
    "keys": Option([4096], "of a chunk of attention"),
}
MFU = {
    "config": Option(str(ROOT / "configs/mega-1.3b.yaml"), "run whose model is trained"),
    "lengths": Option([4096, 32768, 131072], "tokens a sequence"),
    "tokens": Option(32768, "of a step; one sequence where it is longer"),
    "recompute": Option([2, 2, 1], "for each length, every n-th block; 0 for none", least=0),
    "segment": Option([0, 0, 0], "for each length, parallel.activation_checkpoint_segment, tokens", least=0),
    "peers": Option(["llama"], "transformers' models", ["llama"]),
    "llama-expanded": Option(6144, "width of Llama's feed-forward network"),
    "compile": Option(False, "train.compile; peers' layers are compiled whole"),
    "profile": Option(False, "say on standard error which kernels take the time"),
}
_PATTERN = 2**20  # numbers of a large tensor that are drawn; the rest repeats them, as only sizes matter


def require_gpu(command: str) -> None:
    """Raises ValueError where PyTorch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError(f"{command} measures a GPU, and PyTorch sees none: run it where there is one")


def gpu_name() -> str:
    """The GPU and its driver's CUDA."""
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def gpu_milliseconds(function: Callable[[], object], repeats: int, warmup: int) -> list[float]:
    """Time on the GPU of every call, by events."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def matmul_flops() -> float:
    """Operations per second of large bf16 matrix products of random numbers, the median of ten."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * _MATRIX**3 / (statistics.median(gpu_milliseconds(lambda: a @ b, 10, 3)) / 1e3)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy on the device, the median of ten."""
    source = torch.empty(_COPY_BYTES, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / (statistics.median(gpu_milliseconds(lambda: target.copy_(source), 10, 3)) / 1e3)


def run_bandwidth(args: argparse.Namespace) -> None:
    """Time forward and backward, and print a table. Raises ValueError where an implementation is wrong."""
    require_gpu("bandwidth")
    ceiling = copy_bandwidth()
    found = [_bandwidth(impl, dtype, args, ceiling) for dtype in args.dtypes for impl in args.impls]
    rows = []
    for row in found:
        cells = [f"{row[name]:.{digits}f}" for name, digits in _FIGURES.items()]
        rows.append([row["impl"], row["dtype"], *cells, f"{row['error']:.1e}"])
    text = (
        f"Damped EMA on {gpu_name()}: {args.batch} x {args.length:,} tokens, {args.hidden:,} channels, N = "
        f"{args.states}; {args.repeats} repeats after {args.warmup} for warm-up. A copy moves {ceiling / 1e12:.2f} "
        "TB/s; shares are of that, for the fewest bytes there can be."
    )
    head = ["", "tokens", "forward ms", "share", "backward ms", "share", "largest error"]
    report(args, [text, table(head, rows)], {"gpu": gpu_name(), "copy_bytes_per_s": ceiling, "rows": found})


def _bandwidth(impl: str, dtype: str, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    x = normal(args.batch, args.length, args.hidden).to(_DTYPES[dtype]).requires_grad_()
    dy = normal(args.batch, args.length, args.hidden).to(_DTYPES[dtype])
    pairs = (args.hidden, args.states)
    parameters = [0.2 * normal(*pairs, 1), 0.2 * normal(*pairs, 1), normal(*pairs, 1), normal(*pairs)]
    leaves = [t.detach().requires_grad_() for t in EmaCoefficients.from_parameters(*parameters)]
    coefficients = EmaCoefficients(*leaves)

    def forward() -> Tensor:
        return damped_ema(x, coefficients, impl=impl)[0]

    y = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, *leaves], dy, retain_graph=True)

    errors = {"outputs and gradients": _ema_error(x, dy, coefficients, [y.detach(), *backward()])}
    error = check_errors(f"{impl} in {dtype}", errors, _TOLERANCE[dtype])
    forward_ms = statistics.median(gpu_milliseconds(forward, args.repeats, args.warmup))
    backward_ms = statistics.median(gpu_milliseconds(backward, args.repeats, args.warmup))
    once = x.numel() * x.element_size() / ceiling * 1e3
    return {
        "impl": impl, "dtype": dtype, "forward_ms": forward_ms, "forward_share": 2 * once / forward_ms,
        "backward_ms": backward_ms, "backward_share": 3 * once / backward_ms, "error": error,
    }  # fmt: skip


def _ema_error(x: Tensor, dy: Tensor, coefficients: EmaCoefficients, results: list[Tensor]) -> float:
    """Largest error of outputs and gradients on some channels.

    The truth is the blocked form in fp64, which tests hold to the recurrence, as that would take a kernel a token.
    """
    channels = torch.linspace(0, x.shape[2] - 1, _CHECKED_CHANNELS, device=x.device).long()
    wide = x.detach()[..., channels].double().requires_grad_()
    few = [t.detach()[channels].double().requires_grad_() for t in coefficients]
    y, _ = damped_ema(wide, EmaCoefficients(*few), impl="blocked")
    truth = [y.detach(), *torch.autograd.grad(y, [wide, *few], dy[..., channels].double())]
    own = [t[..., channels] if t.dim() == 3 else t[channels] for t in results]
    return max(relative_error(mine, right) for mine, right in zip(own, truth, strict=True))


def run_kernels(args: argparse.Namespace) -> None:
    """Compile Triton kernels, and print what they take. Raises ValueError where triton is missing or interprets."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("kernels are compiled by triton, which is not installed: pip install 'mega_scale[triton]'")
    from mega_scale.ops.triton_report import compile_kernels, compiler_version

    found = compile_kernels(args.architectures, args.dtypes, args.states, args.keys)
    rows = []
    for row in found:
        sizes = [row.size, row.warps, row.registers, f"{row.shared_bytes / 1024:.1f}", row.spill_bytes]
        rows.append([row.kernel, row.architecture, row.dtype, *sizes, row.products])
    text = (
        "Kernels of the damped EMA and of attention, compiled here by triton and its ptxas, and not run. Registers and "
        "spills (stored and loaded) are a thread's, shared memory is a program's; products are instructions for matrix "
        "units."
    )
    head = ["kernel", "GPU", "tokens", "size", "warps", "registers", "shared memory, KiB", "spills, bytes", "products"]
    triton = {"triton": compiler_version()}
    report(args, [text, table(head, rows)], {"rows": [row._asdict() for row in found], "versions": triton})


class OurSteps:
    """This project's trainer: its engine on one process, sliced loss, fused AdamW, bf16 with fp32 masters."""

    def __init__(self, config: MegaConfig, world: World, recompute: int, segment: int, compiled: bool) -> None:
        parallel = ParallelConfig(
            engine="fsdp", activation_checkpoint=recompute, activation_checkpoint_segment=segment, device="cuda"
        )
        how = EngineConfig(parallel, dtype="bf16", compile=compiled)
        self._config, self._engine = config, build_engine(config, how, world, repeated_values(config))
        self.parameters = parameter_count(self._engine.module)

    def step(self, tokens: Tensor) -> float:
        """Forward, loss, backward, clipping, AdamW; returns the loss."""
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = self._engine.forward(inputs, labels, labels.numel())
        self._engine.backward(loss, last=True)
        loss = loss.detach()
        self._engine.step(1e-4)
        return float(loss)

    def flops_per_token(self, length: int) -> float:
        """Of a training step, recomputation not counted."""
        return training_flops_per_token(self._config, length)


def repeated_values(config: MegaConfig) -> Values:
    """Initial values of the right size and spread, without the time that drawing a billion numbers takes."""
    drawn = seeded_values(config, 0)

    def value(name: str, owner: nn.Module, local_name: str) -> Tensor:
        parameter = owner._parameters.get(local_name)
        if parameter is None or parameter.numel() <= _PATTERN:
            return drawn(name, owner, local_name)
        pattern = torch.empty(_PATTERN).normal_(0.0, config.initializer_range)
        return pattern.repeat(-(-parameter.numel() // _PATTERN))[: parameter.numel()].view(parameter.shape)

    return value


class LlamaSteps:
    """transformers' Llama with flash attention (sdpa) under autocast, our sliced loss, fused AdamW."""

    def __init__(self, config: MegaConfig, expanded: int, positions: int, recompute: int, compiled: bool) -> None:
        self._vocabulary, self._expanded = config.vocab_size, expanded
        self._hidden, self._layers = config.hidden_size, config.num_hidden_layers
        sizes = {"vocabulary": config.vocab_size, "hidden": self._hidden, "layers": self._layers}
        with torch.device("cuda"):
            self._model = cast(Any, llama(sizes, expanded, positions, head=128, use_cache=False).train())
        for number, layer in enumerate(self._model.model.layers, start=1):
            if compiled:
                layer.forward = torch.compile(layer.forward)
            if recompute and number % recompute == 0:
                layer.forward = _checkpointed(layer.forward)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        self.parameters = parameter_count(self._model)

    def step(self, tokens: Tensor) -> float:
        """Forward, loss, backward, clipping, AdamW; returns the loss."""
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = self._model.model(input_ids=inputs).last_hidden_state
            loss = linear_cross_entropy(hidden, self._model.lm_head.weight, None, labels) / labels.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def flops_per_token(self, length: int) -> float:
        """Of a training step: six a weight, and causal attention, whose queries see half of the keys on average."""
        d, layers = self._hidden, self._layers
        weights = layers * d * (4 * d + 3 * self._expanded) + d * self._vocabulary
        return 3 * (2 * weights + layers * 4 * d * (length + 1) / 2)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


class GpuTraining:
    """One contender of `mfu`, ours or llama, in a worker: training steps at several lengths."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self._kind, self._options = kind, options
        self._config = run_model_config(load_config(options["config"]).model)
        self._world = World.start(ParallelConfig(engine="fsdp", device="cuda")).__enter__()
        self._steps: OurSteps | LlamaSteps | None = None
        self._built: tuple[int, int] | None = None

    def measure(self, length: int, recompute: int, segment: int) -> dict[str, Any]:
        """Milliseconds of a training step and the GPU's peak memory; nothing of that where it is too small."""
        try:
            if self._steps is None or self._built != (recompute, segment):
                self._steps = None
                _release()
                self._steps, self._built = self._build(recompute, segment), (recompute, segment)
            return self._measure(self._steps, length)
        except torch.OutOfMemoryError:
            self._steps = None
            return {}
        finally:
            _release()

    def close(self) -> None:
        """End the process group."""
        self._world.__exit__(None, None, None)

    def _build(self, recompute: int, segment: int) -> OurSteps | LlamaSteps:
        if self._kind == "ours":
            return OurSteps(self._config, self._world, recompute, segment, self._options["compile"])
        expanded, positions = self._options["llama_expanded"], max(self._options["lengths"])
        return LlamaSteps(self._config, expanded, positions, recompute, self._options["compile"])

    def _measure(self, steps: OurSteps | LlamaSteps, length: int) -> dict[str, Any]:
        batch = max(self._options["tokens"] // length, 1)
        generator = torch.Generator("cuda").manual_seed(0)
        size = (batch, length + 1)
        tokens = torch.randint(3, self._config.vocab_size, size, device="cuda", generator=generator)
        loss = math.nan
        for _ in range(self._options["warmup"]):
            loss = steps.step(tokens)
        torch.cuda.reset_peak_memory_stats()
        times = gpu_milliseconds(lambda: steps.step(tokens), self._options["repeats"], 0)
        if self._options["profile"]:
            _profile(steps, tokens)
        return {
            "batch": batch, "milliseconds": times, "median_ms": statistics.median(times), "loss": loss,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "flops_per_token": steps.flops_per_token(length),
            "parameters": steps.parameters,
        }  # fmt: skip


def _profile(steps: OurSteps | LlamaSteps, tokens: Tensor) -> None:
    """Where a step's time goes, on standard error."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        steps.step(tokens)
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    print(f"{total / 1e3:.1f} ms in {sum(event.count for event in kernels)} kernels", file=sys.stderr)
    for event in kernels[:30]:
        print(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} {event.key[:110]}", file=sys.stderr)


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def run_mfu(args: argparse.Namespace) -> None:
    """Train some steps, and print a table. Raises ValueError where options do not fit, or a contender fails."""
    require_gpu("mfu")
    for name in ("recompute", "segment"):
        if len(getattr(args, name)) != len(args.lengths):
            raise ValueError(f"--{name} has {len(getattr(args, name))} values for {len(args.lengths)} --lengths")
    ceiling, peak = matmul_flops(), peak_flops(torch.device("cuda"), "bf16")
    found = [row for kind in ("ours", *args.peers) for row in _training_rows(kind, args)]
    for row in found:
        if "median_ms" in row:
            row["tokens_per_s"] = 1e3 * row["batch"] * row["length"] / row["median_ms"]
            row["mfu"] = None if peak is None else row["tokens_per_s"] * row["flops_per_token"] / peak
            row["of_ceiling"] = row["tokens_per_s"] * row["flops_per_token"] / ceiling
    text = (
        f"Training step (forward, loss, backward, clipping, AdamW) in bf16 of {args.config} on {gpu_name()}, "
        f"{args.repeats} repeats after {args.warmup} for warm-up{', compiled' if args.compile else ''}. Matrix "
        f"products of {_MATRIX} reach {ceiling / 1e12:.0f} TFLOP/s"
        f"{'' if peak is None else f', the data sheet says {peak / 1e12:.0f}'}."
    )
    report(args, [text, mfu_table(found)], {"gpu": gpu_name(), "ceiling": ceiling, "peak": peak, "rows": found})


def _training_rows(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    names = ("config", "lengths", "tokens", "llama_expanded", "compile", "profile", "repeats", "warmup")
    arguments = {"kind": kind, "options": {name: getattr(args, name) for name in names}}
    rows: list[dict[str, Any]] = []
    with Worker("gpu:GpuTraining", arguments, name=kind, threads=args.threads, show_errors=True) as worker:
        for length, recompute, segment in zip(args.lengths, args.recompute, args.segment, strict=True):
            try:
                figures = worker.call("measure", length, recompute, segment)
            except WorkerError as error:
                raise ValueError(f"{error}, after {len(rows)} lengths") from error
            rows.append({"kind": kind, "length": length, "recompute": recompute, **figures})
            # Told at once: whoever has a GPU for some minutes may not see the table.
            print(rows[-1], file=sys.stderr, flush=True)
        worker.call("close")
    return rows


def mfu_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row; one without a time did not fit in memory."""
    head = ["tokens", "sequences", "", "ms a step", "tokens/s", "MFU", "of the ceiling", "peak GB", "recomputed"]
    lines: list[list[object]] = []
    for row in rows:
        recomputed = {0: "no block", 1: "every block"}.get(row["recompute"], f"every {row['recompute']}nd block")
        if "median_ms" not in row:
            lines.append([f"{row['length']:,}", "", row["kind"], "out of memory", "", "", "", "", recomputed])
            continue
        name = f"{row['kind']} ({row['parameters'] / 1e9:.2f}B)"
        speed = [f"{row['median_ms']:,.1f}", f"{row['tokens_per_s']:,.0f}"]
        shares = ["" if row["mfu"] is None else f"{row['mfu']:.3f}", f"{row['of_ceiling']:.3f}"]
        lines.append([f"{row['length']:,}", row["batch"], name, *speed, *shares, f"{row['peak_gb']:.1f}", recomputed])
    return table(head, lines)


COMMANDS = {
    "bandwidth": Command(BANDWIDTH, run_bandwidth, repeats=30, warmup=5),
    "kernels": Command(KERNELS, run_kernels),
    "mfu": Command(MFU, run_mfu, repeats=5, warmup=3),
}
