"""The `checkpoint` command: for how long a save stops training, and what verification costs.

One process holds model and AdamW state of a given size. Ours, DCP's and DeepSpeed's saves take turns.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from mega_scale import MegaConfig, MegaForCausalLM
from mega_scale.checkpoint.folder import CheckpointConfig, verify
from mega_scale.checkpoint.saver import Saver
from mega_scale.parallel import Engine, EngineConfig, ParallelConfig, World
from mega_scale.parallel.deepspeed import DeepSpeedEngine

from .harness import Command, Option, in_turns, milliseconds, report, spread, table
from .ours import build_engine
from .peers import parameter_count

_BYTES_A_PARAMETER = 12  # weight and two moments, fp32
_HIDDEN = 512
_TOKENS = 128


OPTIONS = {
    "megabytes": Option(200, "size of model and optimizer, 10^6 bytes"),
    "folder": Option(None, "where to write; a temporary folder if not given"),
}


class Saves:
    """A save in every way that is compared; each returns the milliseconds for which training stands still.

    Args:
        engine: FSDP2's, which ours and DCP save.
        zero: DeepSpeed's, with ZeRO stage 3.
        folder: where to write.
        world: of this process alone.

    Attributes:
        alone: milliseconds of forward and backward passes that nothing runs beside.
        beside: of those beside a save of ours.
    """

    def __init__(self, engine: Engine, zero: DeepSpeedEngine, folder: Path, world: World) -> None:
        self.alone: list[float] = []
        self.beside: list[float] = []
        self._engine, self._zero, self._folder = engine, zero, folder
        self._step = 0
        described: dict[str, bytes] = {}
        self._synchronous, self._asynchronous = (
            Saver(folder / f"ours-{which}", engine, world, described, CheckpointConfig(asynchronous=which, keep=1))
            for which in (False, True)
        )

    def contenders(self) -> dict[str, Callable[[], float]]:
        """By name."""
        return {
            "ours, synchronous": partial(self._ours, self._synchronous),
            "ours, asynchronous": partial(self._ours, self._asynchronous),
            "ours, verification before a load": self._verification,
            "DCP, dcp.save": partial(self._dcp, dcp.save),
            "DCP, dcp.async_save": partial(self._dcp, dcp.async_save),
            "DeepSpeed, save_checkpoint": self._deepspeed,
        }

    def _ours(self, saver: Saver) -> float:
        self._step += 1
        self.alone.append(milliseconds(self._compute))
        ended = saver.save(self._step, {"step": self._step})
        if saver is self._asynchronous:  # what a step computes before the optimizer changes anything
            self.beside.append(milliseconds(self._compute))
        saver.wait_copied()
        while not ended:
            time.sleep(0.002)
            ended = saver.poll()
        if ended[-1].folder is None:
            raise ValueError(f"a checkpoint could not be written: {ended[-1].problem}")
        self._newest = ended[-1].folder
        return 1e3 * ended[-1].stall_s

    def _verification(self) -> float:
        return milliseconds(lambda: verify(self._newest))

    def _dcp(self, save: Callable[..., Any]) -> float:
        states = self._engine.state().tensors
        state = {f"{kind}/{name}": tensor for name, each in states.items() for kind, tensor in each.tensors.items()}
        target = self._folder / save.__name__
        shutil.rmtree(target, ignore_errors=True)
        began = time.perf_counter()
        future = save(state, checkpoint_id=target)
        stall = 1e3 * (time.perf_counter() - began)
        if save is dcp.async_save:
            future.result()
        return stall

    def _deepspeed(self) -> float:
        target = self._folder / "deepspeed"
        shutil.rmtree(target, ignore_errors=True)
        return milliseconds(lambda: self._zero._engine.save_checkpoint(str(target), tag="zero"))

    def _compute(self) -> None:
        tokens = torch.arange(_TOKENS)[None] % 256
        self._engine.backward(self._engine.forward(tokens, tokens, _TOKENS), last=True)


def run(args: argparse.Namespace) -> None:
    """Time saves, and print a table. Raises ValueError where a checkpoint cannot be written."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name, World.start(ParallelConfig()) as world:
        folder = Path(name)
        config = model_of_size(args.megabytes * 10**6)
        engine = build_engine(config, EngineConfig(ParallelConfig(engine="fsdp")), world)
        zero = build_engine(config, EngineConfig(ParallelConfig(engine="deepspeed", zero_stage=3)), world)
        assert isinstance(zero, DeepSpeedEngine)
        saves = Saves(engine, zero, folder, world)
        stalls = in_turns(saves.contenders(), args.repeats, args.warmup)
        zero.close()
        engine.close()
    alone, beside = (statistics.median(times[-args.repeats :]) for times in (saves.alone, saves.beside))
    ours = statistics.median(stalls["ours, synchronous"])
    rows = [[name, *spread(each, 1), f"{statistics.median(each) / ours:.2f}"] for name, each in stalls.items()]
    text = [
        f"Saving {_bytes(config) / 1e6:,.0f} MB of model and optimizer, one process, {args.threads} CPU thread(s), "
        f"{args.repeats} repeats after {args.warmup} for warm-up, in turns. Ours is hashed, flushed and read back, "
        "DCP's is flushed, DeepSpeed's is neither.",
        table(["training stands still, ms", "median", "least", "greatest", "of ours"], rows),
        f"Forward and backward of {_TOKENS} tokens, which run while ours is copied and written: {beside:.1f} ms, "
        f"{alone:.1f} ms alone ({beside / alone:.2f}).",
    ]
    figures = {"bytes": _bytes(config), "stall_ms": stalls, "compute_alone_ms": alone, "compute_beside_ms": beside}
    report(args, text, figures)


def model_of_size(wanted: int) -> MegaConfig:
    """As many layers as fit in so many bytes of model and optimizer, and a vocabulary that fills the rest."""

    def config(layers: int, vocabulary: int) -> MegaConfig:
        return MegaConfig(
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            is_decoder=True,
            bidirectional=False,
            hidden_size=_HIDDEN,
            intermediate_size=2 * _HIDDEN,
            nffn_hidden_size=2 * _HIDDEN,
        )

    smallest = 256
    layers = 1
    while _bytes(config(layers + 1, smallest)) < wanted:
        layers += 1
    left = wanted - _bytes(config(layers, smallest))
    return config(layers, smallest + max(left // (_HIDDEN * _BYTES_A_PARAMETER), 0))


def _bytes(config: MegaConfig) -> int:
    with torch.device("meta"):
        return _BYTES_A_PARAMETER * parameter_count(MegaForCausalLM(config))


COMMANDS = {"checkpoint": Command(OPTIONS, run, repeats=7, warmup=1)}
