"""The `memory` and `long` commands: what one long sequence takes to train, shared by ranks, or in segments by one.

Ranks are new processes on this machine's CPUs, which take one optimizer step through the calls of a run.
"""

import argparse
import contextlib
import gc
import json
import socket
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mega_scale import MegaConfig, MegaForCausalLM
from mega_scale.config import load_config, model_config
from mega_scale.data import load_tokenizer
from mega_scale.parallel import Engine, EngineConfig, ParallelConfig, World, parallelize, seeded_values
from mega_scale.parallel.mesh import check_segments
from mega_scale.process import PEER_LOST
from mega_scale.training.config import OptimizerConfig, build_optimizer

from . import harness
from .harness import Command, Option, common
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


def build_engine(config: MegaConfig, how: EngineConfig, world: World, seed: int = 0) -> Engine:
    """The trainer's engine of a model with values from a seed, and AdamW with its defaults, ready to train."""
    with torch.device("meta"):
        model = MegaForCausalLM(config)
    optimizer = OptimizerConfig()
    values = seeded_values(config, seed)
    engine = parallelize(model, values, how, world, lambda sharded: build_optimizer(sharded, optimizer))
    engine.module.train()
    return engine


class SavedBytes(TorchDispatchMode):
    """Counts what the forward pass in its `with` statement leaves in memory, but for what `model`'s parameters hold.

    Every storage that an operation makes is followed: hooks on what autograd saves would not see what hooks within
    them save.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._made: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._made.append(weakref.ref(leaf.untyped_storage()))
        return result

    def total(self) -> int:
        """Bytes that are held now, each storage once."""
        gc.collect()
        held = {storage._cdata: storage.nbytes() for storage in (made() for made in self._made) if storage is not None}
        for parameter in self._model.parameters():
            held.pop(parameter.untyped_storage()._cdata, None)
        return sum(held.values())


class Rank:
    """One rank, in a worker, of a run on random tokens, as only sizes matter; the launcher's variables say which."""

    def __init__(self, config: dict[str, Any], parallel: dict[str, Any], dtype: str, length: int, seed: int) -> None:
        self._config, self._seed = MegaConfig.from_dict(config), seed
        self._how = EngineConfig(ParallelConfig(**parallel, device="cpu"), dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        self._text = torch.randint(self._config.vocab_size, (1, length + 1), generator=generator)

    def needs(self, warm_up: bool) -> dict[str, float]:
        """Loss (nats a token) and norm of a step, its seconds, and bytes: `saved` by forward for backward, of the
        process `before`, and its `growth` to the peak; after a short step, or of the first, whose `saved` is 0.
        """
        with World.start(self._how.parallel) as world:
            engine = build_engine(self._config, self._how, world, self._seed)
            try:
                if warm_up:
                    # Without a learning rate it makes the optimizer's state and changes no weight.
                    short = self._how.parallel.sp * self._config.chunk_size + 1
                    _step(engine, world, self._text[:, :short], 0.0, count_saved=True)
                gc.collect()
                world.barrier()
                before, peak, began = harness.resident("VmRSS"), harness.PeakMemory(), time.perf_counter()
                found = _step(engine, world, self._text, 1e-3, count_saved=warm_up)
                return {**found, "before": before, "growth": peak.growth(), "seconds": time.perf_counter() - began}
            finally:
                engine.close()


def _step(engine: Engine, world: World, text: Tensor, lr: float, count_saved: bool) -> dict[str, float]:
    """Train on the next tokens of a text (1, L + 1)."""
    inputs, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    saved_bytes = SavedBytes(engine.module) if count_saved else None
    with saved_bytes or contextlib.nullcontext():
        loss = engine.forward(inputs, labels, labels.numel())
    saved = saved_bytes.total() if saved_bytes else 0
    engine.backward(loss, last=True)
    return {"loss": float(world.sum(loss.detach())), "norm": engine.step(lr), "saved": saved}


def tokens_per_rank(length: int, sp: int, chunk: int) -> int:
    """The fewest whole chunks with which all ranks hold the sequence; one rank alone needs no padding."""
    return -(-length // (sp * chunk)) * chunk if sp > 1 else length


def measure(args: argparse.Namespace, length: int, sp: int) -> list[dict[str, float]]:
    """What each rank needs to train one sequence: new processes, which find each other as under any launcher."""
    # So wide that the gradient depends on what came before.
    sizes = harness.integers(args) | {"feed_forward": 2 * args.hidden, "normalization": "layernorm"}
    config = MegaConfig(**mega_arguments(sizes), initializer_range=0.1)
    parallel = {"engine": args.engine, "sp": sp, "activation_checkpoint": args.activation_checkpoint}
    run = {"config": json.loads(config.to_json_string()), "parallel": parallel, "dtype": "fp32"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": str(sp), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        workers = []
        for rank in range(sp):
            how: dict[str, Any] = {"name": f"rank {rank} of --sp {sp} at --lengths {length}", "threads": args.threads}
            how["environment"] = {**harness.GIVES_BACK, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            worker = harness.Worker("memory:Rank", {**run, "length": length, "seed": args.seed}, **how)
            workers.append(stack.enter_context(worker))
        return answers(workers)


def answers(workers: Sequence[harness.Worker]) -> list[dict[str, float]]:
    """What each rank needs; raises the WorkerError of the one that failed: the others end as they lost it."""
    found: list[dict[str, float]] = []
    errors: list[harness.WorkerError] = []
    for worker in workers:
        worker.ask("needs", True)
    for worker in workers:
        try:
            found.append(worker.answer())
        except harness.WorkerError as error:
            errors.append(error)
    if errors:
        raise min(errors, key=lambda error: error.status == PEER_LOST)
    return found


def run_memory(args: argparse.Namespace) -> None:
    """Measure, check, print. Raises ValueError where a layout computes something else than one process."""
    harness.PeakMemory()  # which not every system counts
    layouts = [(length, sp) for length in sorted(set(args.lengths)) for sp in sorted({1, *args.sp})]
    for length, sp in layouts:
        share = tokens_per_rank(length, sp, args.chunk)
        if (sp - 1) * share >= length:
            raise ValueError(
                f"--sp {sp} is too much for --lengths {length} with --chunk {args.chunk}: the last rank's whole "
                f"chunks would hold only padding; use --sp {-(-length // share)}, or --lengths {sp * share}"
            )
    rows: list[dict[str, Any]] = []
    alone: dict[str, Any] = {}
    for length, sp in layouts:
        began = time.monotonic()
        ranks = measure(args, length, sp)
        print(f"{length} tokens on {sp} ranks: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        # Of the rank that needs most.
        most = {what: max(rank[what] for rank in ranks) for what in ("saved", "growth")}
        row: dict[str, Any] = {**ranks[0], **most}
        row |= {"length": length, "sp": sp, "tokens": tokens_per_rank(length, sp, args.chunk), "ranks": ranks}
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
    run = {"config": json.loads(config.to_json_string()), "parallel": parallel, "dtype": args.dtype}
    how = {"name": "the process that takes the step", "threads": args.threads, "environment": harness.GIVES_BACK}
    with harness.Worker("memory:Rank", {**run, "length": args.length, "seed": 0}, **how) as worker:
        needs = worker.call("needs", False)
    peak = (needs["before"] + needs["growth"]) / 1e9
    row = {**needs, "peak_gb": peak, "before_gb": needs["before"] / 1e9, "rate": args.length / needs["seconds"]}
    columns = {
        "peak memory of the process, GB": "{peak_gb:.2f}", "before the step": "{before_gb:.2f}",
        "seconds": "{seconds:.1f}", "tokens/s": "{rate:,.0f}", "loss": "{loss:.4f}", "gradient norm": "{norm:.4f}",
    }  # fmt: skip
    harness.report(args, columns, [row])
    if peak > args.limit_gb:
        raise ValueError(f"the step needed {peak:.2f} GB, --limit-gb {args.limit_gb:g} allows no more")


COMMANDS = {"memory": Command(MEMORY, run_memory), "long": Command(LONG, run_long)}
