"""The `checkpoint` command: for how long a save stops training, and what verification costs.

One process holds model and AdamW state of a given size. Ours, DCP's and DeepSpeed's saves take turns.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from mega_scale import MegaConfig, MegaForCausalLM
from mega_scale.checkpoint.folder import CheckpointConfig, verify
from mega_scale.checkpoint.saver import Saver
from mega_scale.parallel import EngineConfig, ParallelConfig, World
from mega_scale.parallel.deepspeed import DeepSpeedEngine

from . import harness
from .harness import Option, common
from .memory import build_engine
from .peers import mega_arguments

_BYTES_A_PARAMETER = 12  # weight and two moments, fp32
_HIDDEN = 512
_TOKENS = 128
CHECKPOINT = common(repeats=7, warmup=1) | {
    "megabytes": Option(200, "size of model and optimizer, 10^6 bytes"),
    "folder": Option(None, "where to write; a temporary folder if not given"),
}


def run_checkpoint(args: argparse.Namespace) -> None:
    """Time saves, and print a table. Raises ValueError where a checkpoint cannot be written."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name, World.start(ParallelConfig()) as world:
        folder = Path(name)
        config, size = model_of_size(args.megabytes * 10**6)
        engine = build_engine(config, EngineConfig(ParallelConfig(engine="fsdp")), world)
        zero = build_engine(config, EngineConfig(ParallelConfig(engine="deepspeed", zero_stage=3)), world)
        assert isinstance(zero, DeepSpeedEngine)
        synchronous, asynchronous = (
            Saver(folder / f"ours-{which}", engine, world, {}, CheckpointConfig(asynchronous=which, keep=1))
            for which in (False, True)
        )
        alone: list[float] = []  # milliseconds of forward and backward passes that nothing runs beside
        beside: list[float] = []  # and of those beside a save of ours
        newest: list[Path] = []
        tokens = torch.arange(_TOKENS)[None] % 256

        def compute() -> None:
            engine.backward(engine.forward(tokens, tokens, _TOKENS), last=True)

        def ours(saver: Saver) -> float:
            alone.append(harness.milliseconds(compute))
            ended = saver.save(len(alone), {"step": len(alone)})
            if saver is asynchronous:  # what a step computes before the optimizer changes anything
                beside.append(harness.milliseconds(compute))
            saver.wait_copied()
            while not ended:
                time.sleep(0.002)
                ended = saver.poll()
            if ended[-1].folder is None:
                raise ValueError(f"a checkpoint could not be written: {ended[-1].problem}")
            newest[:] = [ended[-1].folder]
            return 1e3 * ended[-1].stall_s

        def theirs(save: Callable[[], Any]) -> float:
            shutil.rmtree(target, ignore_errors=True)
            results: list[Any] = []
            stall = harness.milliseconds(lambda: results.append(save()))
            if isinstance(results[0], Future):
                results[0].result()
            return stall

        target = folder / "theirs"
        states = engine.state().tensors
        state = {f"{kind}/{name}": tensor for name, each in states.items() for kind, tensor in each.tensors.items()}
        contenders: dict[str, Callable[[], float]] = {
            "ours, synchronous": partial(ours, synchronous),
            "ours, asynchronous": partial(ours, asynchronous),
            "ours, verification before a load": partial(harness.milliseconds, lambda: verify(newest[0])),
            "DCP, dcp.save": partial(theirs, lambda: dcp.save(state, checkpoint_id=target)),
            "DCP, dcp.async_save": partial(theirs, lambda: dcp.async_save(state, checkpoint_id=target)),
            "DeepSpeed, save_checkpoint": partial(theirs, lambda: zero._engine.save_checkpoint(str(target), tag="it")),
        }
        stalls = harness.in_turns(contenders, args.repeats, args.warmup)
        zero.close()
        engine.close()
    idle, busy = (statistics.median(times[-args.repeats :]) for times in (alone, beside))
    columns = {
        "training stands still, ms": "{name}", "median": "{median:,.1f}", "least": "{least:,.1f}",
        "greatest": "{greatest:,.1f}", "of ours": "{ratio:.2f}",
    }  # fmt: skip
    note = (
        f"{size / 1e6:,.0f} MB. Ours is hashed, flushed and read back, DCP's is flushed, DeepSpeed's is "
        f"neither. Forward and backward of {_TOKENS} tokens, which run while ours is copied and written: {busy:.1f} "
        f"ms, {idle:.1f} ms alone ({busy / idle:.2f})."
    )
    rows = harness.timed_rows(stalls)
    harness.report(args, columns, rows, note, bytes=size, compute_alone_ms=idle, compute_beside_ms=busy)


def model_of_size(wanted: int) -> tuple[MegaConfig, int]:
    """About so many bytes of model and optimizer, by the number of layers; and how many they are."""

    def config(layers: int) -> MegaConfig:
        sizes = {"hidden": _HIDDEN, "shared": 128, "values": 2 * _HIDDEN, "states": 16, "chunk": 0}
        return MegaConfig(**mega_arguments({**sizes, "layers": layers, "vocabulary": 256}))

    with torch.device("meta"):
        one, two = (_BYTES_A_PARAMETER * MegaForCausalLM(config(layers)).num_parameters() for layers in (1, 2))
    more = max(round((wanted - one) / (two - one)), 0)
    return config(1 + more), one + more * (two - one)
