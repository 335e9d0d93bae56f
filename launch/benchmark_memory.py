"""The `memory` sub-command of benchmark.py: what a rank needs to train one long sequence that it shares with others.

For every length and every number of ranks, new processes on this machine's CPUs take one optimizer step, through the
same calls as a run. Each measures itself; a layout whose loss or gradient is not that of one process is not reported.

Legend: L tokens of the sequence, P ranks that share it, C chunk.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.machine import PeakMemory, hardware
from mega_scale import MegaConfig, MegaForCausalLM
from mega_scale.parallel import Engine, EngineConfig, ParallelConfig, World, parallelize, seeded_values
from mega_scale.parallel.monitor import PEER_LOST
from mega_scale.training.optimizer import OptimizerConfig, build_optimizer

TOLERANCE = 1e-5
MIB = 2**20
_TIMEOUT_S = 3600
_LET_OTHERS_END_S = 10
# The C library would keep what was freed, more of it for tensors below 32 MiB than for longer ones. With a fixed
# threshold all larger blocks go back to the system at once, so that resident memory is what is in use.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class Needs(NamedTuple):
    """What one optimizer step needed on one rank.

    Args:
        loss: of the whole sequence, nats per token.
        gradient_norm: L2 norm of the whole gradient.
        saved: bytes that the forward pass left for the backward pass; each storage once, parameters not counted.
        growth: bytes by which the process's resident memory at its peak, somewhere in the step, exceeded that before.
    """

    loss: float
    gradient_norm: float
    saved: int
    growth: int


class Row(NamedTuple):
    """One length on so many ranks.

    Args:
        length: L, tokens.
        sp: P.
        tokens: of one rank, padding included.
        ranks: what each of them needed.
        seconds: from the start of the processes to their end.
    """

    length: int
    sp: int
    tokens: int
    ranks: list[Needs]
    seconds: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.ranks[0].loss

    @property
    def gradient_norm(self) -> float:
        """L2 norm."""
        return self.ranks[0].gradient_norm

    @property
    def saved(self) -> int:
        """Bytes kept for the backward pass by the rank that keeps most."""
        return max(needs.saved for needs in self.ranks)

    @property
    def growth(self) -> int:
        """Bytes of peak growth of the rank that grows most."""
        return max(needs.growth for needs in self.ranks)


class KeptBytes(TorchDispatchMode):
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


def add_memory_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Declare the options of the sub-command, but for those that all sub-commands share.

    Args:
        command: the parser of the sub-command.
        positive: reads an integer of at least 1.
    """
    lists = {
        "lengths": ([65536, 131072, 262144], "of the sequence, tokens"),
        "sp": ([1, 2, 4], "ranks that share the sequence; 1, which others are compared with, is always measured"),
    }
    for name, (several, text) in lists.items():
        command.add_argument(f"--{name}", type=positive, nargs="+", default=several, help=text)
    sizes = {
        "chunk": (1024, "attention chunk, tokens"),
        "hidden": (64, "channels D"),
        "layers": (2, "blocks"),
        "shared": (32, "width Z of queries and keys"),
        "values": (128, "width E of values"),
        "states": (16, "moving averages per channel N"),
        "vocabulary": (259, "number of token ids"),
    }
    for name, (default, text) in sizes.items():
        command.add_argument(f"--{name}", type=positive, default=default, help=text)
    command.add_argument("--engine", default="fsdp", choices=["fsdp", "deepspeed"], help="what shards and steps")
    text = "recompute the activations of every n-th block, 0 of none"
    command.add_argument("--activation-checkpoint", type=int, default=0, metavar="N", help=text)
    command.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    command.add_argument("--port", type=int, default=0, help="where the ranks meet on this machine; 0 takes a free one")


def tokens_per_rank(length: int, sp: int, chunk: int) -> int:
    """The fewest whole chunks with which all ranks hold the sequence; one rank alone needs no padding.

    Args:
        length: L, tokens.
        sp: P.
        chunk: C, tokens.

    Returns:
        Tokens.
    """
    return -(-length // (sp * chunk)) * chunk if sp > 1 else length


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before any process starts.

    Args:
        args: the command line.

    Raises:
        ValueError: names the option, its value and what would work.
    """
    PeakMemory()  # which not every system counts
    if args.activation_checkpoint < 0:
        raise ValueError(
            f"--activation-checkpoint {args.activation_checkpoint} is negative: choose 0 for no block, n for every n-th"
        )
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port {args.port} is no port: choose one of 1 to 65535, or 0 for a free one")
    for length in args.lengths:
        for sp in args.sp:
            share = tokens_per_rank(length, sp, args.chunk)
            if (sp - 1) * share >= length:
                raise ValueError(
                    f"--sp {sp} is too much for --lengths {length} with --chunk {args.chunk}: the last rank's whole "
                    f"chunks would hold only padding; use --sp {-(-length // share)}, or --lengths {sp * share}"
                )


def take_step(args: argparse.Namespace) -> Needs:
    """One optimizer step on this rank, measured; a short one before it makes what every process makes but once.

    Args:
        args: the command line, with one `length` and one `sp`; the launcher's variables say which rank this is.

    Returns:
        What it needed.
    """
    config = MegaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, num_hidden_layers=args.layers,
        intermediate_size=args.values, nffn_hidden_size=2 * args.hidden, ema_projection_size=args.states,
        shared_representation_size=args.shared, is_decoder=True, bidirectional=False, use_chunking=True,
        chunk_size=args.chunk, normalization_type="layernorm", dropout_prob=0.0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, nffn_activation_dropout_prob=0.0,
        initializer_range=0.1,  # so that the gradient depends on what came before
    )  # fmt: skip
    parallel = ParallelConfig(
        engine=args.engine, sp=args.sp, activation_checkpoint=args.activation_checkpoint, device="cpu",
        timeout_s=_TIMEOUT_S,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(args.seed)
    text = torch.randint(args.vocabulary, (1, args.length + 1), generator=generator)
    with torch.device("meta"):
        model = MegaForCausalLM(config)
    with World.start(parallel) as world:
        engine = parallelize(
            model,
            seeded_values(config, args.seed),
            EngineConfig(parallel),
            world,
            lambda sharded: build_optimizer(sharded, OptimizerConfig()),
        )
        try:
            engine.module.train()
            # Without a learning rate it makes the optimizer's state and changes no weight.
            _step(engine, world, text[:, : args.sp * args.chunk + 1], lr=0.0)
            gc.collect()
            world.barrier()
            peak = PeakMemory()
            loss, norm, saved = _step(engine, world, text, lr=1e-3)
            return Needs(loss, norm, saved, peak.growth())
        finally:
            engine.close()


def _step(engine: Engine, world: World, text: Tensor, lr: float) -> tuple[float, float, int]:
    """Loss, gradient norm, and bytes kept in between, of the next tokens of a text (1, L + 1)."""
    inputs, labels = text[:, :-1], text[:, 1:]
    with KeptBytes(engine.module) as bytes_kept:
        loss = engine.forward(inputs, labels, labels.numel())
    kept = bytes_kept.total()
    engine.backward(loss, last=True)
    return float(world.sum(loss)), engine.step(lr), kept


def measure(args: argparse.Namespace, length: int, sp: int) -> Row:
    """Train one sequence on new processes, which find each other as under any launcher.

    Args:
        args: the command line.
        length: L, tokens.
        sp: P.

    Returns:
        What every rank needed.

    Raises:
        ValueError: a rank failed; with its exit status and its last words.
    """
    asked = json.dumps(vars(args) | {"length": length, "sp": sp, "run": None})
    variables = {"WORLD_SIZE": sp, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": args.port or _free_port()}
    variables |= {"OMP_NUM_THREADS": args.threads, **_GIVE_BACK}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, ranks = Path(name), []
        for rank in range(sp):
            own = {key: str(value) for key, value in (variables | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, asked, str(folder / f"{rank}.json")],
                stdin=subprocess.DEVNULL,
                stdout=stack.enter_context((folder / f"{rank}.txt").open("w", encoding="utf-8")),
                stderr=subprocess.STDOUT,
                env={**os.environ, **own},
                cwd=Path(__file__).parents[1],
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append(process)
        _wait(ranks)
        failed = [rank for rank, process in enumerate(ranks) if process.returncode != 0]
        if failed:
            # One that lost another rank, or was waiting, has less to say.
            culprit = min(failed, key=lambda rank: ranks[rank].returncode in (None, PEER_LOST))
            status = ranks[culprit].returncode
            reason = ((folder / f"{culprit}.txt").read_text(encoding="utf-8").strip() or "no message").splitlines()[-1]
            if status == -signal.SIGKILL:
                reason = "killed, as a system does that is short of memory: choose shorter --lengths"
            raise ValueError(f"rank {culprit} of --sp {sp} at --lengths {length} ended with status {status}: {reason}")
        needs = [Needs(**json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))) for rank in range(sp)]
    return Row(length, sp, tokens_per_rank(length, sp, args.chunk), needs, time.monotonic() - start)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended; after a failure only as long as the others need to say that they noticed."""
    deadline = None
    while any(process.poll() is None for process in ranks):
        if deadline is None and any(process.poll() for process in ranks):
            deadline = time.monotonic() + _LET_OTHERS_END_S
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_against(alone: Row, shared: Row) -> float:
    """Compare a layout with one process.

    Args:
        alone: P = 1.
        shared: the same length on more ranks.

    Returns:
        The larger difference of loss and gradient norm, relative.

    Raises:
        ValueError: it exceeds TOLERANCE; names what differs.
    """
    # The loss of a fresh model hardly feels what came before a chunk; its gradient does.
    errors = {
        "loss": abs(shared.loss / alone.loss - 1),
        "gradient norm": abs(shared.gradient_norm / alone.gradient_norm - 1),
    }
    # not <=, so that NaN fails
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        raise ValueError(
            f"nothing is reported: {shared.length} tokens on {shared.sp} ranks differ from one process in "
            f"{', '.join(wrong)}; {TOLERANCE:.0e} is allowed"
        )
    return max(errors.values())


def table(rows: Sequence[Row]) -> str:
    """Markdown table of what the neediest rank of each layout needs.

    Args:
        rows: of any lengths and numbers of ranks, P = 1 of every length among them.

    Returns:
        The table; "of P=1" is the row's figure over that of one rank with the same sequence.
    """
    alone = {row.length: row for row in rows if row.sp == 1}
    heads = ["L", "P", "tokens per rank", "saved activations, MiB per rank", "of P=1"]
    lines = [[*heads, "peak memory growth, MiB per rank", "of P=1", "loss"], ["---:"] * 8]
    for row in rows:
        one = alone[row.length]
        saved = [f"{row.saved / MIB:.1f}", f"{row.saved / one.saved:.3f}"]
        growth = [f"{row.growth / MIB:.1f}", f"{row.growth / one.growth:.3f}" if one.growth else "-"]
        lines.append([f"{row.length:,}", str(row.sp), f"{row.tokens:,}", *saved, *growth, f"{row.loss:.6f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run_memory(args: argparse.Namespace) -> None:
    """The `memory` sub-command: measure, check, print.

    Args:
        args: the command line.
    """
    args.lengths, args.sp = sorted(set(args.lengths)), sorted({1, *args.sp})
    check(args)
    rows: list[Row] = []
    error = 0.0
    for length in args.lengths:
        for sp in args.sp:
            row = measure(args, length, sp)
            print(f"{length} tokens on {sp} ranks: {row.seconds:.0f} s", file=sys.stderr, flush=True)
            if sp == 1:
                alone = row
            error = max(error, check_against(alone, row))
            rows.append(row)
    sizes = {name: value for name, value in vars(args).items() if name not in ("json", "run", "port")}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    lines = [
        "One optimizer step of one sequence of L tokens on P ranks, CPU, fp32: "
        f"{', '.join(f'{name} {value}' for name, value in sizes.items() if name not in ('lengths', 'sp'))}.",
        "Saved activations: what the forward pass leaves for the backward pass, every storage once, parameters not "
        "counted.",
        "Peak memory growth: the process's resident memory at its highest in the step, less that before the step, when "
        "weights, optimizer state, libraries and tokens are there already.",
        "Freed blocks go back to the system at once. Both are those of the rank that needs most; 1 MiB is 2^20 bytes.",
        f"Checked: loss and gradient norm on P ranks equal those of one, largest relative difference {error:.1e}.",
        f"Machine: {hardware()}. Versions: {', '.join(' '.join(version) for version in versions.items())}.",
    ]
    print("\n".join(lines), table(rows), sep="\n\n")
    if args.json:
        head = {"benchmark": "memory", "sizes": sizes, "hardware": hardware(), "versions": versions}
        content = {**head, "largest_error": error, "rows": [_plain(row) for row in rows]}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON, with units in the names."""
    return {
        "length": row.length,
        "sp": row.sp,
        "tokens_per_rank": row.tokens,
        "loss": row.loss,
        "gradient_norm": row.gradient_norm,
        "saved_bytes": [needs.saved for needs in row.ranks],
        "peak_growth_bytes": [needs.growth for needs in row.ranks],
        "seconds": row.seconds,
    }


if __name__ == "__main__":  # one rank, started by `measure`
    arguments = argparse.Namespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(arguments.threads)
    Path(sys.argv[2]).write_text(json.dumps(take_step(arguments)._asdict()), encoding="utf-8")
