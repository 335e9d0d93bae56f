"""The `step` and `mfu` commands: a whole training step beside models of transformers, by length.

`step`: between the contenders' turns, matrix products of the model's sizes are timed, as the machine's ceiling of that
moment. transformers' Mega gets our initial weights. `mfu`: on a GPU, the trainer's own step of a recipe's model beside
a Llama of its size; MFU is the model's operations over the vendor's peak, and recomputation does not count.
"""

import argparse
import contextlib
import importlib.util
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mega_scale import MegaConfig, MegaForCausalLM, MegalodonForCausalLM
from mega_scale.config import load_config, model_config
from mega_scale.model import causal_lm_class
from mega_scale.model.basic_layers import use_own_linear
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.ops.linear import linear_cross_entropy
from mega_scale.parallel import EngineConfig, ParallelConfig, World
from mega_scale.parallel.activation_checkpoint import checkpoint_activations
from mega_scale.parallel.compiled_blocks import compile_blocks
from mega_scale.parallel.mesh import check_segments
from mega_scale.parallel.shard import RowSlice
from mega_scale.training.metrics import peak_flops, training_flops_per_token

from . import harness
from .harness import Option, common
from .memory import build_engine, train_step
from .ours import count_parameters, megalodon_config
from .peers import PEERS, TrainingStep, mega_arguments

TOLERANCE = 1e-3
MEGALODON = "ours, Megalodon"
PEER_LONGEST = 8192  # tokens; peers are given no longer sequence
_PRODUCT_TOKENS, _PRODUCT_RUNS = 2048, 8
_MATRIX = 8192
_PICTURES = (".png", ".svg")
STEP = common(lengths=[2048, 8192], hidden=512, layers=4, shared=128, states=16, chunk=512, vocabulary=2048) | {
    "values": Option(1024, "width E of values and of the feed-forward network"),
    "bf16": Option(False, "also time ours with bf16 matrix products (autocast)"),
    "compile": Option(False, "also time ours with train.compile"),
    "megalodon": Option(False, "also time our Megalodon of as many parameters, in the same ways"),
    "peers": Option(["llama"], "models of about our size to compare with; none leaves them out", ["llama", "mamba2"]),
    **common(peer_python=None, repeats=3, warmup=1),
    "malloc": Option("kept", "processes keep freed memory, in huge pages, or as the system does", ["kept", "default"]),
    "segment": Option(0, "parallel.activation_checkpoint_segment of ours, tokens; 0 keeps all activations", least=0),
    "plot": Option(None, "PNG or SVG file for a picture of the time per token against the length (extra `plot`)"),
}
MFU = common(config=str(harness.ROOT / "configs/mega-1.3b.yaml"), lengths=[4096, 32768, 131072]) | {
    **common(repeats=5, warmup=3),
    "tokens": Option(32768, "of a step; one sequence where it is longer"),
    "recompute": Option([2, 2, 1], "for each length, every n-th block; 0 for none", least=0),
    "segment": Option([0, 0, 0], "for each length, parallel.activation_checkpoint_segment, tokens", least=0),
    "peers": Option(["llama"], "transformers' models", ["llama"]),
    "compile": Option(False, "train.compile; peers' layers are compiled whole"),
    "profile": Option(False, "say on standard error which kernels take the time"),
}


def our_training(kind: str, sizes: dict[str, Any], length: int, weights: str) -> TrainingStep:
    """A training step of our model without an engine; `ours` writes its initial weights, the other Megas read them."""
    torch.manual_seed(0)
    model: Any
    if kind.startswith(MEGALODON):
        model = MegalodonForCausalLM(megalodon_config(sizes))
    else:
        model = MegaForCausalLM(MegaConfig(**mega_arguments(sizes), max_positions=length))
    if kind == "ours":
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, weights)
    elif not kind.startswith(MEGALODON):
        model.load_state_dict(load_file(weights))
    use_own_linear(model)  # as engines do
    if sizes["segment"]:
        how = ParallelConfig(activation_checkpoint=1, activation_checkpoint_segment=sizes["segment"])
        checkpoint_activations(model, how, RowSlice())
    if kind.endswith(" compiled"):
        compile_blocks(model)  # as train.compile does

    def loss(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind.endswith(" bf16")):
            return model(input_ids=tokens, labels=tokens, skip_logits=True).loss

    return TrainingStep(model, loss)


def run_step(args: argparse.Namespace) -> None:
    """Check, time and print. Raises ValueError where Mega computes something else, or a contender fails."""
    if args.plot:
        check_plot(args.plot)
    config = MegaConfig(**mega_arguments(harness.integers(args)))
    check_segments(config, args.segment, 1, 1)
    parameters, flops = count_parameters(config), training_flops_per_token(config, max(args.lengths))
    rows = [row for length in args.lengths for row in _rows(args, length, flops, parameters)]
    rates: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        rates.setdefault(row["name"], {})[row["length"]] = row
    times = {name: {length: length / row["median"] for length, row in own.items()} for name, own in rates.items()}
    powers = {name: exponent(found) for name, found in times.items() if len(found) > 1}
    if args.plot:
        title = f"Training step of one sequence, {args.threads} CPU thread(s)\n{harness.hardware()}"
        plot_costs(args.plot, rates, title)
    columns = {
        "tokens": "{length:,}", "": "{name} ({parameters:,})", "tokens/s": "{median:,.0f}", "least": "{least:,.0f}",
        "greatest": "{greatest:,.0f}", "of torch.mm": "{shares[torch.mm]:.2f}", "of oneDNN": "{shares[oneDNN]:.2f}",
        "peak MB": "{megabytes:,.0f}", "speed of ours": "{ratio:.2f}",
    }  # fmt: skip
    notes = [
        f"{flops / 1e6:.1f} MFLOP a token by the FLOP model. Of torch.mm, of oneDNN: share of what matrix products of "
        "the model's sizes in fp32 reach by them in the same turns.",
        *(f"Time of {name} grows as length to the power of {power:.2f}." for name, power in powers.items()),
    ]
    harness.report(args, columns, rows, *notes, flops_per_token=flops, exponents=powers)


def _rows(args: argparse.Namespace, length: int, flops: float, parameters: int) -> list[dict[str, Any]]:
    """Figures of all contenders at one length."""
    ways = ["", *([" bf16"] if args.bf16 else []), *([" compiled"] if args.compile else [])]
    kinds = [family + way for family in ("ours", *([MEGALODON] if args.megalodon else [])) for way in ways]
    if length <= PEER_LONGEST:
        kinds += [*(["mega"] if args.peer_python else []), *args.peers]
    first: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sizes = harness.integers(args) | {"parameters": parameters}
        arguments = {"sizes": sizes, "length": length, "weights": f"{folder}/weights.safetensors"}

        def start(kind: str, environment: Mapping[str, str]) -> contextlib.AbstractContextManager[Callable[..., Any]]:
            target = "step:our_training" if kind.startswith("ours") else "peers:peer_training"
            how: dict[str, Any] = {"name": kind, "environment": environment}
            if kind == "mega":
                how |= {"name": f"--peer-python {args.peer_python}", "python": args.peer_python}
            return harness.worker(target, {"kind": kind, **arguments}, **how)

        for kind in kinds:
            with start(kind, harness.GIVES_BACK) as call:
                first[kind] = call("check", length)
        for kind in {"mega", "ours compiled"} & set(kinds):
            harness.compare(kind, first[kind], {name: first["ours"][name] for name in ("loss", "norm")}, TOLERANCE)
        environment = harness.KEEPS_MEMORY if args.malloc == "kept" else {}
        workers = {kind: stack.enter_context(start(kind, environment)) for kind in kinds}
        known = {kind: call("describe") for kind, call in workers.items()}

        def timed(call: Callable[..., Any]) -> tuple[dict[str, float], float]:
            products = product_rates(_PRODUCT_TOKENS, args.hidden, 2 * args.values)
            return products, 1e3 * length / call("time", length)

        contenders = {kind: partial(timed, call) for kind, call in workers.items()}
        found = harness.in_turns(contenders, args.repeats, args.warmup)
    products = [rates for turns in found.values() for rates, _ in turns]
    ceilings = {name: statistics.median(rates[name] for rates in products) for name in products[0]}
    rows = harness.timed_rows({kind: [rate for _, rate in turns] for kind, turns in found.items()})
    for row in rows:
        kind = row["name"]
        row |= {"kind": kind, "length": length, "ceilings": ceilings, **first[kind], **known[kind]}
        if kind in PEERS:
            row["name"] = f"transformers {row['transformers']} {PEERS[kind][0]}"
        if kind not in args.peers:  # the FLOP model is of our families
            own = training_flops_per_token(megalodon_config(sizes), length) if kind.startswith(MEGALODON) else flops
            row["shares"] = {by: row["median"] * own / most for by, most in ceilings.items()}
    return rows


def product_rates(tokens: int, wide: int, narrow: int) -> dict[str, float]:
    """Operations per second, the best of some runs, of products (tokens, wide) x (wide, narrow) in fp32, by library."""
    x, weight = torch.ones(tokens, wide), torch.ones(wide, narrow)
    products: dict[str, Callable[[], Tensor]] = {"torch.mm": lambda: torch.mm(x, weight)}
    if torch.backends.mkldnn.is_available():
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight.t(), None, "none", [], "")
    timed = {name: partial(harness.milliseconds, product) for name, product in products.items()}
    times = harness.in_turns(timed, _PRODUCT_RUNS, 0)
    return {name: 2 * tokens * wide * narrow / (min(each) / 1e3) for name, each in times.items()}


def exponent(times: Mapping[int, float]) -> float:
    """The power of the length that times by length grow as: slope of log time over log length, by least squares."""
    return statistics.linear_regression([*map(math.log, times)], [*map(math.log, times.values())]).slope


def check_plot(file: str) -> None:
    """Refuse a picture that could not be drawn, before anything is timed for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--plot {file} needs matplotlib, which is not installed: install mega_scale[plot]")
    if Path(file).suffix not in _PICTURES:
        raise ValueError(f"--plot {file}: choose a name that ends in {' or '.join(_PICTURES)}")
    if not Path(file).absolute().parent.is_dir():
        raise ValueError(f"--plot {file}: there is no such folder")


def plot_costs(file: str, rates: Mapping[str, Mapping[int, Mapping[str, Any]]], title: str) -> None:
    """Draw microseconds a token of median, least and greatest tokens/s, by contender and length, against the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, found in rates.items():
        cost = {which: [1e6 / row[which] for row in found.values()] for which in ("median", "least", "greatest")}
        [line] = axes.plot(list(found), cost["median"], marker="o", label=name)
        axes.vlines(list(found), cost["greatest"], cost["least"], color=line.get_color())
    every = sorted({length for found in rates.values() for length in found})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(every, labels=[f"{length:,}" for length in every])
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel("microseconds a token")
    axes.set_title(title, fontsize="medium")
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=150)


def train_on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a contender's training step and the GPU's peak memory; nothing of that where it is too small."""
    args = argparse.Namespace(**options)
    config = model_config(load_config(args.config).model)
    batch = max(args.tokens // args.length, 1)
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(3, config.vocab_size, (batch, args.length + 1), device="cuda", generator=generator)
    with World.start(ParallelConfig(engine="fsdp", device="cuda")) as world:
        try:
            train, known = _ours(args, config, world) if args.kind == "ours" else _llama(args, config)
            losses = [float(train(tokens)) for _ in range(args.warmup)]
            torch.cuda.reset_peak_memory_stats()
            times = harness.gpu_milliseconds(lambda: losses.append(float(train(tokens))), args.repeats, 0)
            peak = torch.cuda.max_memory_allocated() / 1e9
            if args.profile:
                activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
                with torch.profiler.profile(activities=activities) as profile:
                    train(tokens)
                    torch.cuda.synchronize()
                print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=30), file=sys.stderr)
        except torch.OutOfMemoryError:
            return {}
    found = {"milliseconds": times, "median_ms": statistics.median(times), "loss": losses[-1], "peak_gb": peak}
    return {"batch": batch, **found, **known}


_Built = tuple[Callable[[Tensor], Tensor | float], dict[str, float]]  # a training step; parameters and operations


def _ours(args: argparse.Namespace, config: BaseConfig, world: World) -> _Built:
    """This project's trainer: its engine on one process, sliced loss, fused AdamW, bf16 with fp32 masters."""
    recomputed = {"activation_checkpoint": args.recompute, "activation_checkpoint_segment": args.segment}
    parallel = ParallelConfig(engine="fsdp", device="cuda", **recomputed)
    engine = build_engine(config, EngineConfig(parallel, dtype="bf16", compile=args.compile), world)
    flops = training_flops_per_token(config, args.length)
    known: dict[str, float] = {"parameters": engine.module.num_parameters(), "flops_per_token": flops}
    return lambda tokens: train_step(engine, world, tokens, 1e-4)["loss"], known


def _llama(args: argparse.Namespace, config: BaseConfig) -> _Built:
    """transformers' Llama with flash attention (sdpa) under autocast, our sliced loss, fused AdamW."""
    with torch.device("meta"):
        parameters = causal_lm_class(config)(config).num_parameters()
    width, layers, words = config.hidden_size, config.num_hidden_layers, config.vocab_size
    sizes = {"vocabulary": words, "hidden": width, "layers": layers, "parameters": parameters, "llama_head": 128}
    with torch.device("cuda"):
        model: Any = PEERS["llama"][1](sizes, args.length)
    for number, layer in enumerate(model.model.layers, start=1):
        if args.compile:
            layer.forward = torch.compile(layer.forward)
        if args.recompute and number % args.recompute == 0:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def loss(tokens: Tensor) -> Tensor:
        labels = tokens[:, 1:].contiguous()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.model(input_ids=tokens[:, :-1].contiguous()).last_hidden_state
            return linear_cross_entropy(hidden, model.lm_head.weight, None, labels) / labels.numel()

    # Six a weight, and causal attention, whose queries see half of the keys on average.
    weights = layers * width * (4 * width + 3 * model.config.intermediate_size) + width * words
    flops = 3 * (2 * weights + layers * 4 * width * (args.length + 1) / 2)
    train = TrainingStep(model, loss, lr=1e-4, clip=1.0).step
    return train, {"parameters": model.num_parameters(), "flops_per_token": flops}


def run_mfu(args: argparse.Namespace) -> None:
    """Train some steps, and print a table. Raises ValueError where options do not fit, or a contender fails."""
    gpu = harness.gpu_name("mfu")
    for name in ("recompute", "segment"):
        if len(getattr(args, name)) != len(args.lengths):
            raise ValueError(f"--{name} has {len(getattr(args, name))} values for {len(args.lengths)} --lengths")
    ceiling, peak = matmul_flops(), peak_flops(torch.device("cuda"), "bf16")
    options = {name: value for name, value in vars(args).items() if name != "run"}
    layouts = list(zip(args.lengths, args.recompute, args.segment, strict=True))
    rows: list[dict[str, Any]] = []
    for kind, layout in itertools.product(("ours", *args.peers), layouts):
        row: dict[str, Any] = {"kind": kind, **dict(zip(("length", "recompute", "segment"), layout, strict=True))}
        with harness.worker("step", name=f"{kind} at {row['length']} tokens", show_errors=True) as call:
            row |= {"step": "out of memory", **call("train_on_gpu", {**options, **row})}
        if "median_ms" in row:
            row |= {"step": f"{row['median_ms']:,.1f}", "rate": 1e3 * row["batch"] * row["length"] / row["median_ms"]}
            row["of_ceiling"] = row["rate"] * row["flops_per_token"] / ceiling
            row["mfu"] = row["rate"] * row["flops_per_token"] / peak if peak else None
        # Told at once: whoever has a GPU for some minutes may not see the table.
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    columns = {
        "tokens": "{length:,}", "sequences": "{batch}", "": "{kind}", "parameters": "{parameters:,}",
        "ms a step": "{step}", "tokens/s": "{rate:,.0f}", "MFU": "{mfu:.3f}", "of the ceiling": "{of_ceiling:.3f}",
        "peak GB": "{peak_gb:.1f}", "recomputed, every n-th block": "{recompute}",
    }  # fmt: skip
    sheet = f", the data sheet says {peak / 1e12:.0f}" if peak else ""
    note = f"{gpu}. Matrix products of {_MATRIX} reach {ceiling / 1e12:.0f} TFLOP/s{sheet}."
    harness.report(args, columns, rows, note, gpu=gpu, ceiling=ceiling, peak=peak)


def matmul_flops() -> float:
    """Operations per second of large bf16 matrix products of random numbers, the median of ten."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * _MATRIX**3 / (statistics.median(harness.gpu_milliseconds(lambda: a @ b, 10, 3)) / 1e3)
