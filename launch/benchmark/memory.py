"""The `memory` and `long` commands: what one long sequence takes to train, shared by ranks, or in segments by one.

Ranks are new processes on this machine's CPUs, which take one optimizer step through the calls of a run.
"""

import argparse
import contextlib
import gc
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port

from mega_scale import MegaConfig
from mega_scale.config import load_config, model_config
from mega_scale.data import load_tokenizer
from mega_scale.model import causal_lm_class
from mega_scale.model.configuration_mega import BaseConfig
from mega_scale.parallel import Engine, EngineConfig, ParallelConfig, World, parallelize, seeded_values
from mega_scale.parallel.mesh import check_segments
from mega_scale.parallel.meter import Meter
from mega_scale.process import PEER_LOST
from mega_scale.training.config import OptimizerConfig, build_optimizer

from . import harness
from .harness import Option, common
from .peers import mega_arguments

TOLERANCE = 1e-5
MEMORY = common(hidden=64, layers=2, shared=32, values=128, states=16, chunk=1024, vocabulary=259, seed=0) | {
    "lengths": Option([65536, 131072, 262144], "of the sequence, tokens"),
    "sp": Option([1, 2, 4], "ranks that share the sequence; 1, which others are compared with, is always measured"),
    "engine": Option("fsdp", "what shards and steps", ["fsdp", "deepspeed"]),
    "activation-checkpoint": Option(0, "recompute the activations of every n-th block, 0 of none", least=0),
}
LONG = common(config=str(harness.ROOT / "configs/enwik8-39m.yaml"), length=131072) | {
    "segment": Option(8192, "parallel.activation_checkpoint_segment, tokens", least=0),
    "dtype": Option("fp32", "of forward and backward", ["fp32", "bf16"]),
    "limit-gb": Option(8.0, "memory of the process that is allowed, 1e9 bytes"),
}


def build_engine(config: BaseConfig, how: EngineConfig, world: World, seed: int = 0) -> Engine:
    """The trainer's engine of a model with values from a seed, and AdamW with its defaults, ready to train."""
    with torch.device("meta"):
        model = causal_lm_class(config)(config)
    values = seeded_values(config, seed)
    engine = parallelize(model, values, how, world, lambda sharded: build_optimizer(sharded, OptimizerConfig()))
    engine.module.train()
    return engine


def needs(
    config: dict[str, Any], parallel: dict[str, Any], dtype: str, length: int, seed: int, warm_up: bool
) -> dict[str, float]:
    """One rank, in a worker, takes a step on random tokens; the launcher's variables say which.

    Returns loss (nats a token) and norm of the step, its seconds, and bytes: `saved` by forward for backward, of the
    process `before`, and its `growth` to the peak; after a short step, or of the first, whose `saved` is 0.
    """
    model, how = MegaConfig.from_dict(config), EngineConfig(ParallelConfig(**parallel, device="cpu"), dtype=dtype)
    text = torch.randint(model.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(seed))
    with World.start(how.parallel) as world, contextlib.closing(build_engine(model, how, world, seed)) as engine:
        if warm_up:
            # Without a learning rate it makes the optimizer's state and changes no weight.
            train_step(engine, world, text[:, : how.parallel.sp * model.chunk_size + 1], 0.0, count_saved=True)
        gc.collect()
        world.barrier()
        before, peak, began = harness.resident("VmRSS"), harness.watch_peak(), time.perf_counter()
        found = train_step(engine, world, text, 1e-3, count_saved=warm_up)
        return {**found, "before": before, "growth": peak(), "seconds": time.perf_counter() - began}


def train_step(engine: Engine, world: World, text: Tensor, lr: float, *, count_saved: bool = False) -> dict[str, float]:
    """Train on the next tokens of texts (B, L + 1)."""
    inputs, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    meter = Meter(events=False) if count_saved else None
    with meter or contextlib.nullcontext():
        loss = engine.forward(inputs, labels, labels.numel())
    saved = sum(meter.kept().values()) if meter else 0
    engine.backward(loss, last=True)
    norm = engine.step(lr)
    return {"loss": float(world.sum(loss.detach())), "norm": norm, "saved": saved}


def measure(args: argparse.Namespace, length: int, sp: int) -> list[dict[str, float]]:
    """What each rank needs to train one sequence: new processes, which find each other as under any launcher.

    Raises the ValueError of the one that failed: the others end as they lost it.
    """
    # So wide that the gradient depends on what came before.
    sizes = harness.integers(args) | {"feed_forward": 2 * args.hidden, "normalization": "layernorm"}
    config = MegaConfig(**mega_arguments(sizes), initializer_range=0.1)
    parallel = {"engine": args.engine, "sp": sp, "activation_checkpoint": args.activation_checkpoint}
    meeting = {"WORLD_SIZE": str(sp), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(sp):
            name = f"rank {rank} of --sp {sp} at --lengths {length}"
            environment = {**harness.GIVES_BACK, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(stack.enter_context(harness.worker("memory", name=name, environment=environment)))
        pool = stack.enter_context(ThreadPoolExecutor(sp))
        what = (json.loads(config.to_json_string()), parallel, "fp32", length, args.seed, True)
        found = [pool.submit(call, "needs", *what) for call in ranks]
        errors = [error for each in found if (error := each.exception())]
        if errors:
            raise min(errors, key=lambda error: getattr(error.__cause__, "returncode", None) == PEER_LOST)
        return [each.result() for each in found]


def run_memory(args: argparse.Namespace) -> None:
    """Measure, check, print. Raises ValueError where a layout computes something else than one process."""
    harness.watch_peak()  # which not every system counts
    layouts: dict[tuple[int, int], int] = {}  # tokens a rank
    for length, sp in itertools.product(sorted(set(args.lengths)), sorted({1, *args.sp})):
        # The fewest whole chunks with which all ranks hold the sequence; one rank alone needs no padding.
        share = layouts[length, sp] = -(-length // (sp * args.chunk)) * args.chunk if sp > 1 else length
        if (sp - 1) * share >= length:
            raise ValueError(
                f"--sp {sp} is too much for --lengths {length} with --chunk {args.chunk}: the last rank's whole "
                f"chunks would hold only padding; use --sp {-(-length // share)}, or --lengths {sp * share}"
            )
    rows: list[dict[str, Any]] = []
    alone: dict[str, Any] = {}
    for (length, sp), tokens in layouts.items():
        began = time.monotonic()
        ranks = measure(args, length, sp)
        print(f"{length} tokens on {sp} ranks: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        # Of the rank that needs most.
        most = {what: max(rank[what] for rank in ranks) for what in ("saved", "growth")}
        row: dict[str, Any] = {**ranks[0], **most, "length": length, "sp": sp, "tokens": tokens, "ranks": ranks}
        alone = row if sp == 1 else alone
        # The loss of a fresh model hardly feels what came before a chunk; its gradient does.
        truth, found = ({"loss": each["loss"], "gradient norm": each["norm"]} for each in (alone, row))
        row["error"] = harness.compare(f"{length} tokens on {sp} ranks", found, truth, TOLERANCE)
        for what in ("saved", "growth"):
            row |= {f"{what}_mib": row[what] / 2**20, f"{what}_share": row[what] / max(alone[what], 1)}
        rows.append(row)
    columns = {
        "L": "{length:,}", "P": "{sp}", "tokens per rank": "{tokens:,}",
        "saved activations, MiB per rank": "{saved_mib:.1f}", "saved, of P=1": "{saved_share:.3f}",
        "peak memory growth, MiB per rank": "{growth_mib:.1f}", "growth, of P=1": "{growth_share:.3f}",
        "loss": "{loss:.6f}", "loss and gradient norm off those of P=1 by": "{error:.1e}",
    }  # fmt: skip
    note = (
        "Saved activations are what the forward pass leaves for the backward pass, every storage once, parameters not "
        "counted. Growth is the process's resident memory at its highest in the step, less that before the step, when "
        "weights, optimizer state, libraries and tokens are there already. Both are those of the rank that needs most."
    )
    harness.report(args, columns, rows, note)


def run_long(args: argparse.Namespace) -> None:
    """Take one step in a process of its own, and print what it needed; ValueError where that is more than allowed."""
    recipe = load_config(args.config)
    config = model_config(recipe.model, load_tokenizer(recipe.data.tokenizer))
    check_segments(config, args.segment, 1, 1)
    parallel = {"engine": "fsdp", "activation_checkpoint": 1, "activation_checkpoint_segment": args.segment}
    with harness.worker("memory", name="the process that takes the step", environment=harness.GIVES_BACK) as call:
        row = call("needs", json.loads(config.to_json_string()), parallel, args.dtype, args.length, 0, False)
    peak = (row["before"] + row["growth"]) / 1e9
    row |= {"peak_gb": peak, "before_gb": row["before"] / 1e9, "rate": args.length / row["seconds"]}
    columns = {
        "peak memory of the process, GB": "{peak_gb:.2f}", "before the step": "{before_gb:.2f}",
        "seconds": "{seconds:.1f}", "tokens/s": "{rate:,.0f}", "loss": "{loss:.4f}", "gradient norm": "{norm:.4f}",
    }  # fmt: skip
    harness.report(args, columns, [row])
    if peak > args.limit_gb:
        raise ValueError(f"the step needed {peak:.2f} GB, --limit-gb {args.limit_gb:g} allows no more")
