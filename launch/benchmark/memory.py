"""The `memory` and `long` commands: what one long sequence takes to train, shared by ranks, or in segments by one.

`memory`: for every length and every number of ranks, new processes on this machine's CPUs take one optimizer step,
through the same calls as a run. Each measures itself; a layout whose loss or gradient is not that of one process is not
reported. `long`: one process takes the trainer's step with a recipe's model, recomputed a segment at a time.

Legend: L tokens of the sequence, P ranks that share it, C chunk.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import socket
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mega_scale import MegaConfig
from mega_scale.config import load_config
from mega_scale.config import model_config as run_model_config
from mega_scale.data import load_tokenizer
from mega_scale.parallel import Engine, EngineConfig, ParallelConfig, World, seeded_values
from mega_scale.parallel.mesh import check_segments
from mega_scale.parallel.monitor import PEER_LOST
from mega_scale.training.config import OptimizerConfig

from .harness import (
    GIVES_BACK,
    ROOT,
    Command,
    Option,
    PeakMemory,
    Worker,
    WorkerError,
    compare,
    report,
    resident,
    table,
)
from .ours import build_engine, model_config

TOLERANCE = 1e-5
LET_OTHERS_END_S = 10  # after a rank failed
_MIB = 2**20
_TIMEOUT_S = 3600
MEMORY = {
    "lengths": Option([65536, 131072, 262144], "of the sequence, tokens"),
    "sp": Option([1, 2, 4], "ranks that share the sequence; 1, which others are compared with, is always measured"),
    "chunk": Option(1024, "attention chunk, tokens"),
    "hidden": Option(64, "channels D"),
    "layers": Option(2, "blocks"),
    "shared": Option(32, "width Z of queries and keys"),
    "values": Option(128, "width E of values"),
    "states": Option(16, "moving averages per channel N"),
    "vocabulary": Option(259, "number of token ids"),
    "engine": Option("fsdp", "what shards and steps", ["fsdp", "deepspeed"]),
    "activation-checkpoint": Option(0, "recompute the activations of every n-th block, 0 of none", least=0),
    "seed": Option(0, "of weights and tokens", least=0),
    "port": Option(0, "where the ranks meet on this machine; 0 takes a free one", least=0),
}
LONG = {
    "config": Option(str(ROOT / "configs/enwik8-39m.yaml"), "run whose model is trained"),
    "length": Option(131072, "tokens of the sequence"),
    "segment": Option(8192, "parallel.activation_checkpoint_segment, tokens", least=0),
    "dtype": Option("fp32", "of forward and backward", ["fp32", "bf16"]),
    "limit-gb": Option(8.0, "memory of the process that is allowed, 1e9 bytes"),
}


class Needs(NamedTuple):
    """What one optimizer step needed on one rank."""

    loss: float  # of the whole sequence, nats per token
    gradient_norm: float  # L2 norm of the whole gradient
    saved: int  # bytes that forward left for backward; each storage once, parameters not counted
    before: int  # bytes of the process in memory before the step
    growth: int  # bytes by which it was larger at its peak, somewhere in the step
    seconds: float


class Row(NamedTuple):
    """One length on so many ranks."""

    length: int  # L, tokens
    sp: int  # P
    tokens: int  # of one rank, padding included
    ranks: list[Needs]

    def most(self, what: str) -> int:
        """`saved` or `growth` of the rank that needs most, bytes."""
        return max(getattr(needs, what) for needs in self.ranks)


class SavedBytes(TorchDispatchMode):
    """Counts what a forward pass leaves in memory for its backward pass, in a `with` statement around the forward pass.

    Every tensor that an operation makes is followed until the count, whoever holds it: hooks on what autograd saves
    would not see what hooks within them save. A view counts with its whole storage. What a parameter holds at that
    moment, sharded or gathered, does not count.

    Args:
        model: whose parameters are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._made: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and follow what it makes, without holding it."""
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

    def __init__(
        self,
        config: dict[str, Any],
        parallel: dict[str, Any],
        optimizer: dict[str, Any],
        dtype: str,
        length: int,
        seed: int,
    ) -> None:
        self._config = MegaConfig.from_dict(config)
        self._parallel, self._optimizer = ParallelConfig(**parallel), OptimizerConfig(**optimizer)
        self._dtype, self._seed = dtype, seed
        generator = torch.Generator().manual_seed(seed)
        self._text = torch.randint(self._config.vocab_size, (1, length + 1), generator=generator)

    def needs(self) -> dict[str, float]:
        """`Needs` of a step, after a short one that makes what every process makes but once."""
        return self._measure(warm_up=True)

    def needs_in_all(self) -> dict[str, float]:
        """`Needs` of the first step, where what a process makes but once counts; saved bytes are not counted."""
        return self._measure(warm_up=False)

    def _measure(self, warm_up: bool) -> dict[str, float]:
        how = EngineConfig(self._parallel, dtype=self._dtype, max_grad_norm=self._optimizer.max_grad_norm)
        values = seeded_values(self._config, self._seed)
        with World.start(self._parallel) as world:
            engine = build_engine(self._config, how, world, values, self._optimizer)
            try:
                if warm_up:
                    # Without a learning rate it makes the optimizer's state and changes no weight.
                    short = self._parallel.sp * self._config.chunk_size + 1
                    _step(engine, world, self._text[:, :short], 0.0, count_saved=True)
                gc.collect()
                world.barrier()
                before, peak, began = resident("VmRSS"), PeakMemory(), time.perf_counter()
                measured = _step(engine, world, self._text, self._optimizer.lr, count_saved=warm_up)
                return Needs(*measured, before, peak.growth(), time.perf_counter() - began)._asdict()
            finally:
                engine.close()


def _step(engine: Engine, world: World, text: Tensor, lr: float, count_saved: bool) -> tuple[float, float, int]:
    """Loss, gradient norm, and bytes saved in between, of the next tokens of a text (1, L + 1)."""
    inputs, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    saved_bytes = SavedBytes(engine.module) if count_saved else None
    with saved_bytes or contextlib.nullcontext():
        loss = engine.forward(inputs, labels, labels.numel())
    saved = saved_bytes.total() if saved_bytes else 0
    engine.backward(loss, last=True)
    return float(world.sum(loss.detach())), engine.step(lr), saved


def tokens_per_rank(length: int, sp: int, chunk: int) -> int:
    """The fewest whole chunks with which all ranks hold the sequence; one rank alone needs no padding."""
    return -(-length // (sp * chunk)) * chunk if sp > 1 else length


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before any process starts: ValueError names option, value and what works."""
    PeakMemory()  # which not every system counts
    if args.port >= 2**16:
        raise ValueError(f"--port {args.port} is no port: choose one of 1 to 65535, or 0 for a free one")
    for length in args.lengths:
        for sp in args.sp:
            share = tokens_per_rank(length, sp, args.chunk)
            if (sp - 1) * share >= length:
                raise ValueError(
                    f"--sp {sp} is too much for --lengths {length} with --chunk {args.chunk}: the last rank's whole "
                    f"chunks would hold only padding; use --sp {-(-length // share)}, or --lengths {sp * share}"
                )


def measure(args: argparse.Namespace, length: int, sp: int) -> Row:
    """Train one sequence on new processes, which find each other as under any launcher.

    Raises:
        ValueError: a rank failed; with its exit status and the last line that it printed.
    """
    sizes = {name: getattr(args, name) for name in ("vocabulary", "hidden", "layers", "shared", "chunk")}
    sizes |= {"expanded": args.values, "feed_forward": 2 * args.hidden, "averages": args.states}
    # So wide that the gradient depends on what came before.
    config = model_config(sizes, normalization_type="layernorm", initializer_range=0.1)
    parallel = {"engine": args.engine, "sp": sp, "activation_checkpoint": args.activation_checkpoint}
    arguments = _arguments(config, parallel, OptimizerConfig(lr=1e-3), "fp32", length, args.seed)
    variables = {"WORLD_SIZE": sp, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": args.port or _free_port()}
    with contextlib.ExitStack() as stack:
        workers = []
        for rank in range(sp):
            own = {name: str(value) for name, value in (variables | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            name = f"rank {rank} of --sp {sp} at --lengths {length}"
            options: dict[str, Any] = {"threads": args.threads, "environment": {**GIVES_BACK, **own}}
            workers.append(stack.enter_context(Worker("memory:Rank", arguments, name=name, **options)))
        needs = [Needs(**found) for found in _step_together(workers)]
    return Row(length, sp, tokens_per_rank(length, sp, args.chunk), needs)


def _arguments(
    config: MegaConfig, parallel: dict[str, Any], optimizer: OptimizerConfig, dtype: str, length: int, seed: int
) -> dict[str, Any]:
    """Of `Rank`."""
    return {
        "config": json.loads(config.to_json_string()),
        "parallel": {**parallel, "device": "cpu", "timeout_s": _TIMEOUT_S},
        "optimizer": dataclasses.asdict(optimizer), "dtype": dtype, "length": length, "seed": seed,
    }  # fmt: skip


def _step_together(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """Have all ranks take a step; after a failure, wait only as long as the others need to say that they noticed."""
    with concurrent.futures.ThreadPoolExecutor(len(workers)) as threads:
        steps = [threads.submit(worker.call, "needs") for worker in workers]
        done, _ = concurrent.futures.wait(steps, return_when=concurrent.futures.FIRST_EXCEPTION)
        if any(step.exception() for step in done):
            concurrent.futures.wait(steps, LET_OTHERS_END_S)
            for worker, step in zip(workers, steps, strict=True):
                if not step.done():
                    worker.kill()
    errors = [error for step in steps if isinstance(error := step.exception(), WorkerError)]
    if errors:  # A rank that lost another one, or was waiting, has less to say.
        raise min(errors, key=lambda error: error.status in (PEER_LOST, -9))
    return [step.result() for step in steps]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_memory(args: argparse.Namespace) -> None:
    """Measure, check, print. Raises ValueError where a layout computes something else than one process."""
    args.lengths, args.sp = sorted(set(args.lengths)), sorted({1, *args.sp})
    check(args)
    rows: list[Row] = []
    errors = [0.0]
    for length in args.lengths:
        alone: Row | None = None
        for sp in args.sp:
            began = time.monotonic()
            row = measure(args, length, sp)
            print(f"{length} tokens on {sp} ranks: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            alone = alone or row
            # The loss of a fresh model hardly feels what came before a chunk; its gradient does.
            truth, found = (
                {"loss": each.ranks[0].loss, "gradient norm": each.ranks[0].gradient_norm} for each in (alone, row)
            )
            errors.append(compare(f"{length} tokens on {sp} ranks", found, truth, TOLERANCE))
            rows.append(row)
    text = [
        f"One optimizer step of one sequence of L tokens on P ranks by {args.engine}, CPU, fp32. Saved activations are "
        "what the forward pass leaves for the backward pass, every storage once, parameters not counted. Growth is the "
        "process's resident memory at its highest in the step, less that before the step, when weights, optimizer "
        "state, libraries and tokens are there already. Both are those of the rank that needs most; 1 MiB is 2^20 "
        f"bytes. Loss and gradient norm on P ranks equal those of one, largest relative difference {max(errors):.1e}.",
        memory_table(rows),
    ]
    plain = [{**row._asdict(), "ranks": [needs._asdict() for needs in row.ranks]} for row in rows]
    report(args, text, {"largest_error": max(errors), "rows": plain})


def memory_table(rows: Sequence[Row]) -> str:
    """What the neediest rank of each layout needs, and that over what one rank needs for the same sequence."""
    alone = {row.length: row for row in rows if row.sp == 1}
    head = ["L", "P", "tokens per rank", "saved activations, MiB per rank", "of P=1"]
    head += ["peak memory growth, MiB per rank", "of P=1", "loss"]
    lines = []
    for row in rows:
        cells = [f"{row.length:,}", row.sp, f"{row.tokens:,}"]
        for what in ("saved", "growth"):
            one = alone[row.length].most(what)
            cells += [f"{row.most(what) / _MIB:.1f}", f"{row.most(what) / one:.3f}" if one else "-"]
        lines.append([*cells, f"{row.ranks[0].loss:.6f}"])
    return table(head, lines)


def run_long(args: argparse.Namespace) -> None:
    """Take one step in a process of its own, and print what it needed; ValueError where that is more than allowed."""
    recipe = load_config(args.config)
    config = run_model_config(recipe.model, load_tokenizer(recipe.data.tokenizer))
    check_segments(config, args.segment, 1, 1)
    parallel = {"engine": "fsdp", "activation_checkpoint": 1, "activation_checkpoint_segment": args.segment}
    arguments = _arguments(config, parallel, recipe.optimizer, args.dtype, args.length, 0)
    name = "the process that takes the step"
    with Worker("memory:Rank", arguments, name=name, threads=args.threads, environment=GIVES_BACK) as worker:
        needs = Needs(**worker.call("needs_in_all"))
    peak = (needs.before + needs.growth) / 1e9
    cells = [f"{peak:.2f}", f"{needs.before / 1e9:.2f}", f"{needs.seconds:.1f}", f"{args.length / needs.seconds:,.0f}"]
    head = ["peak memory of the process, GB", "before the step", "seconds", "tokens/s", "loss", "gradient norm"]
    text = (
        f"One training step of {args.config} ({args.dtype}) on a sequence of {args.length:,} tokens, blocks recomputed "
        f"{args.segment:,} tokens at a time, {args.threads} CPU thread(s)."
    )
    lines = table(head, [[*cells, f"{needs.loss:.4f}", f"{needs.gradient_norm:.4f}"]])
    report(args, [text, lines], {"peak_gb": peak, **needs._asdict()})
    if peak > args.limit_gb:
        raise ValueError(f"the step needed {peak:.2f} GB, --limit-gb {args.limit_gb:g} allows no more")


COMMANDS = {"memory": Command(MEMORY, run_memory), "long": Command(LONG, run_long)}
