"""The `roofline` command: what a training step takes on a GPU that need not be there, kernel by kernel.

The run's own engine, optimizer and model are laid out as one rank on fake tensors, which choose their forms as on the
GPU, and a meter lists every operator of a step. Two depths give what a block adds, and so any depth. Where a run was
profiled, its times stand beside.
"""

import argparse
import dataclasses
import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mega_scale.config import RunConfig, model_config
from mega_scale.model import causal_lm_class
from mega_scale.ops import as_if
from mega_scale.parallel import World, parallelize
from mega_scale.parallel.compiled_blocks import inductor_graphs
from mega_scale.parallel.devices import Device
from mega_scale.parallel.meter import Event, Meter, Sent
from mega_scale.parallel.roofline import (
    PARTS,
    Row,
    extrapolated,
    fused,
    in_fp8,
    mfu,
    part,
    table,
    total,
)
from mega_scale.settings import resolve, split_arguments
from mega_scale.training.config import build_optimizer
from mega_scale.training.metrics import training_flops_per_token

from . import harness
from .harness import Option

ROOFLINE = {
    "config": Option(str(harness.ROOT / "configs/megalodon-1.3b.yaml"), "run whose step is predicted"),
    "gpu": Option("h100", f"one of {', '.join(Device.known())}"),
    "ranks": Option(1, "GPUs of the run"),
    "gpus-per-host": Option(8, "GPUs that share a host"),
    "measured": Option(None, "trace of a profiled run (JSON, may be gzipped), whose times stand beside"),
    "overrides": Option(
        [], "of the run, as model.num_hidden_layers=12, or of the GPU, as gpu.memory_share=0.9", positional=True
    ),
}  # fmt: skip
CHANGED = {
    "products": "the segments of gated attention that read the average are one product each way",
    "average": "one pass over tokens each way, on matrix units, by one operator; it was read twice, in 88 launches",
    "attention": "scores stay in a kernel: weights and their gradients are written where products are computed",
    "norms": "the timestep norm, and gradients of a layer norm with a bias's: others are part of the kernels of their "
    "gaps",
    "gates": "a kernel a gap between products: attention takes heads side by side, queries and keys are one kernel "
    "each way, biases' gradients are summed where gates' are written, nothing is written twice or in fp32; dropout is "
    "one kernel a site and pass",
    "loss": "logits are read once, and their gradient is written over them",
    "optimizer": "nothing",
    "copies": "a single rank divides no gradients; attention's outputs are no longer copied",
}
"""By part, what is otherwise since commit d1596f7."""


class Prediction(NamedTuple):
    """A step of one rank.

    Args:
        micro, step: rows by part, of one micro-batch and of what follows the last one.
        kept: bytes that a micro-batch's forward pass leaves for its backward pass.
        peak: bytes at most at one time, the model's and the optimizer's state included.
        sent: collectives of one micro-batch, bytes by operation.
        links: seconds of these on the slowest link.
    """

    micro: dict[str, Row]
    step: dict[str, Row]
    kept: int
    peak: int
    sent: dict[str, int]
    links: float


def predict(run: RunConfig, gpu: Device, ranks: int = 1, local: int = 8) -> Prediction:
    """A step of the run's first rank of so many, from steps of two depths. Raises ValueError where it cannot run."""
    every = max(run.parallel.activation_checkpoint, 1)
    wanted = model_config(run.model).num_hidden_layers
    depths = (2 * every, 3 * every)
    fewer, more = (_traced(run, gpu, ranks, local, layers) for layers in depths)
    steps = (wanted - depths[0]) / (depths[1] - depths[0])
    kept, peak, links = (
        round(low + (high - low) * steps) if isinstance(low, int) else low + (high - low) * steps
        for low, high in ((fewer.kept, more.kept), (fewer.peak, more.peak), (fewer.links, more.links))
    )
    sent = {name: round(fewer.sent[name] + (size - fewer.sent[name]) * steps) for name, size in more.sent.items()}
    return Prediction(
        extrapolated(fewer.micro, more.micro, depths, wanted), extrapolated(fewer.step, more.step, depths, wanted),
        kept, peak, sent, links,
    )  # fmt: skip


def _traced(run: RunConfig, gpu: Device, ranks: int, local: int, layers: int) -> Prediction:
    """The same of a model of few layers, followed on fake tensors."""
    meter, kept = follow(run, gpu.capability, ranks, layers, local)
    events = list(in_fp8(meter.events)) if run.train.fp8 else meter.events
    events = fused(events) if _compiles(run) else events
    forward = [event for event in events if event.phase != "optimizer"]
    rows = table(forward, gpu), table([event for event in events if event.phase == "optimizer"], gpu)
    sent: Counter[str] = Counter()
    for call in meter.sent:
        if call.phase != "optimizer":
            sent[call.operation] += call.bytes
    return Prediction(*rows, sum(kept.values()), meter.peak, dict(sent), _on_links(meter.sent, gpu, ranks, local))


def follow(
    run: RunConfig, capability: tuple[int, int], ranks: int, layers: int, local: int = 8
) -> tuple[Meter, Counter[str]]:
    """One step, of one micro-batch, of the first rank, with `layers` blocks, on fake tensors and the forms of a GPU.

    Returns its meter, and bytes that were kept for the backward pass by module.
    """
    config = model_config(run.model)
    config.num_hidden_layers = layers
    how = dataclasses.replace(run.engine_config(ranks), compile=_compiles(run), fp8=False)
    parallel = dataclasses.replace(how.parallel, device="cpu", self_test=False)
    how = dataclasses.replace(how, parallel=parallel)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        World.pretend(0, ranks, parallel, min(local, ranks), memory=lambda: mode) as world,
        as_if("cuda", capability),
        inductor_graphs(),
    ):
        with torch.device("meta"):
            model = causal_lm_class(config)(config)
        engine = parallelize(
            model, _no_values, how, world, lambda m: build_optimizer(m, run.optimizer, run.train.dtype)
        )
        engine.module.train()
        if run.train.fp8:  # to a compiler such layers are more than products: they add their own biases
            blocks: Any = engine.module.base_model
            for layer in [each for each in blocks.layers.modules() if isinstance(each, torch.nn.Linear)]:
                layer.register_forward_pre_hook(lambda *_: None)
        with mode, Meter(engine.module) as meter:
            meter.label(_state(engine), "state")
            tokens = torch.zeros(run.train.micro_batch_size, run.data.sequence_length, dtype=torch.int64)
            for _ in range(2):  # the first one makes the optimizer's state
                meter.restart()
                loss = engine.forward(tokens, tokens, tokens.numel())
                kept = meter.kept()
                engine.backward(loss, last=True)
                del loss
                with meter.during("optimizer"):
                    engine.step(1e-3)
        engine.close()
    return meter, kept


def _compiles(run: RunConfig) -> bool:
    """Whether blocks are compiled on a GPU, as they are where nothing is said."""
    return run.train.compile is not False


def _no_values(name: str, owner: torch.nn.Module, local: str) -> torch.Tensor:
    return torch.zeros(getattr(owner, local).shape)


def _state(engine: Any) -> list[torch.Tensor]:
    return [tensor for local in engine.state().tensors.values() for tensor in local.tensors.values()]


def _on_links(sent: Sequence[Sent], gpu: Device, ranks: int, local: int) -> float:
    """Seconds that collectives take, one after the other, on the link that the farthest rank of a group needs."""
    within = ranks <= local
    rate = gpu.link * gpu.link_share if within else gpu.network * gpu.network_share
    moved = 0.0
    for call in sent:
        factor = {"_allgather_base_": ranks - 1, "allgather_": ranks - 1, "allreduce_": 2 * (ranks - 1) / ranks}
        moved += call.bytes * factor.get(call.operation, (ranks - 1) / ranks)
    return moved / rate


def run_roofline(args: argparse.Namespace) -> None:
    """Predict and print. Raises ValueError for an unknown GPU or key, or a run that could not start."""
    of_gpu = dict(_pair(word) for word in args.overrides if word.startswith("gpu."))
    gpu = Device.named(args.gpu, {key.removeprefix("gpu."): _number(key, value) for key, value in of_gpu.items()})
    keys = [word for word in args.overrides if not word.startswith("gpu.")]
    _, overrides, _ = split_arguments(keys, (each.name for each in dataclasses.fields(RunConfig)))
    run = resolve(RunConfig, [args.config], overrides)[0]
    if run.model.vocab_size is None:
        raise ValueError("model.vocab_size is not set, and no tokenizer is read here: give model.vocab_size=...")
    if run.train.fp8 and not gpu.products_fp8:
        raise ValueError(
            f"train.fp8=true is not possible on {gpu.name}, which has no fp8 products: choose another --gpu"
        )
    measured = measured_milliseconds(args.measured) if args.measured else {}
    found = predict(run, gpu, args.ranks, args.gpus_per_host)
    how = run.engine_config(args.ranks)
    times = max(how.accumulation, 1)
    rows = {name: found.micro[name].times(times) + found.step[name] for name in PARTS}
    rows["all"] = total(rows)
    tokens = times * run.train.micro_batch_size * run.data.sequence_length
    flops = tokens * training_flops_per_token(model_config(run.model), run.data.sequence_length)
    shared = how.parallel.sp * how.parallel.tp
    host, links = rows["all"].kernels * gpu.launch, times * found.links
    step = max(rows["all"].seconds, host, links)
    printed = [
        {
            "part": name, **dataclasses.asdict(row), "ms": 1e3 * row.seconds, "gigabytes": row.bytes / 1e9,
            "teraflop": row.flops / 1e12, "share": row.seconds / rows["all"].seconds, "measured": measured.get(name),
            "changed": CHANGED.get(name, ""),
        }
        for name, row in rows.items()
    ]  # fmt: skip
    columns = {
        "part": "{part}", "ms": "{ms:,.1f}", "of all": "{share:.2f}", "launches": "{kernels:,.0f}",
        "GB": "{gigabytes:,.1f}", "TFLOP": "{teraflop:,.1f}",
    }  # fmt: skip
    if measured:
        columns["measured, ms"] = "{measured:,.1f}"
    columns["since d1596f7"] = "{changed}"
    share = mfu(flops / shared, step, gpu)
    bound = "kernels" if step == rows["all"].seconds else "the host's launches" if step == host else "links"
    way = "compiled: a kernel a gap between products" if _compiles(run) else "eager"
    if run.train.fp8:
        way += ", products in fp8"
    notes = [
        f"A step of one of {args.ranks} {gpu.name} ({times} x {run.train.micro_batch_size} x "
        f"{run.data.sequence_length:,} tokens, {way}) is bound by {bound}: {1e3 * step:,.1f} ms, MFU {share:.3f}, "
        f"{tokens / shared / step:,.0f} tokens/s a GPU. Launches take the host {1e3 * host:,.0f} ms, collectives "
        f"{1e3 * links:,.0f} ms of a link, behind kernels.",
        f"Memory: {found.kept / 1e9:.1f} GB kept for the backward pass, {found.peak / 1e9:.1f} GB at most, of "
        f"{gpu.capacity / 1e9:.0f}.",
        f"Figures: {', '.join(f'{name} {value}' for name, value in gpu.figures().items())}.",
    ]
    figures = {"mfu": share, "milliseconds": 1e3 * step, "kept": found.kept, "peak": found.peak, "gpu": gpu.figures()}
    harness.report(args, columns, printed, *notes, **figures, bound=bound, tokens=tokens)


def _pair(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key, value


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{key}={value!r} is no number") from None


def measured_milliseconds(file: str) -> dict[str, float]:
    """Milliseconds of a profiled step's kernels by part, from a trace of `profile.steps` (Chrome's JSON).

    Raises ValueError where the file holds no kernels of a GPU.
    """
    path = Path(file)
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        events = json.loads(text)["traceEvents"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--measured {file} is no trace of torch.profiler: {error}") from error
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        raise ValueError(f"--measured {file} has no kernels of a GPU: profile a run on one, with profile.steps")
    steps = max(len({e["name"] for e in events if str(e.get("name", "")).startswith("ProfilerStep#")}), 1)
    found: dict[str, float] = dict.fromkeys((*PARTS, "all"), 0.0)
    for kernel in kernels:
        milliseconds = kernel.get("dur", 0) / 1e3 / steps
        found[_part_of_kernel(str(kernel["name"]).lower())] += milliseconds
        found["all"] += milliseconds
    return found


# Words in a kernel's name, in this order, and the part that it belongs to.
_KERNELS: Mapping[str, Sequence[str]] = {
    "average": ("outputs_kernel", "gradients_kernel", "ema"),
    "attention": ("weights_kernel", "scores_gradient", "softmax", "attention", "flash"),
    "optimizer": ("adam", "multi_tensor", "lpnorm"),
    "products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas"),
    "norms": ("norm", "moments", "normalise", "slopes_kernel", "totals_kernel", "before_kernel", "behind_kernel"),
    "copies": ("memcpy", "memset", "copy", "cat"),
}


def _part_of_kernel(name: str) -> str:
    return next((own for own, words in _KERNELS.items() if any(word in name for word in words)), "gates")


__all__ = ["CHANGED", "Event", "Prediction", "follow", "part", "predict", "run_roofline"]
