"""The `checkpoint` command: for how long a save stops training, and what verification costs.

One process holds model and AdamW state of a given size. Ours, DCP's and DeepSpeed's saves take turns; before anything
is timed, a checkpoint of ours is loaded into another engine and compared, bit for bit.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mega_scale import MegaConfig, MegaForCausalLM
from mega_scale.checkpoint.folder import STATE, CheckpointConfig, verify
from mega_scale.checkpoint.restore import load_checkpoint
from mega_scale.checkpoint.saver import Saver
from mega_scale.checkpoint.state import StateReader
from mega_scale.parallel import Engine, ParallelConfig, World
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


class Save(NamedTuple):
    """Milliseconds of a save.

    Args:
        stall: for which training stands still.
        compute: of a forward and backward pass before the save, or beside it; NaN where there is none.
    """

    stall: float
    compute: float = float("nan")


class Saves:
    """One save in every way that is compared.

    Args:
        engine: FSDP2's, which ours and DCP save.
        zero: DeepSpeed's, with ZeRO stage 3.
        folder: where to write.
        world: of this process alone.
    """

    def __init__(self, engine: Engine, zero: DeepSpeedEngine, folder: Path, world: World) -> None:
        self._engine, self._zero, self._folder = engine, zero, folder
        self._tokens = torch.arange(_TOKENS)[None] % 256
        self._turn = {"synchronous": 0, "asynchronous": 0}
        self._savers = {
            way: Saver(
                folder / way,
                engine,
                world,
                lambda path: None,
                CheckpointConfig(asynchronous=way == "asynchronous", keep=1),
            )
            for way in self._turn
        }

    def contenders(self) -> dict[str, Callable[[], Save]]:
        """By name."""
        return {
            "ours, synchronous": self.synchronous,
            "ours, asynchronous": self.asynchronous,
            "ours, verification before a load": self.verification,
            "DCP, dcp.save": self.dcp,
            "DCP, dcp.async_save": self.asynchronous_dcp,
            "DeepSpeed, save_checkpoint": self.deepspeed,
        }

    def synchronous(self) -> Save:
        """Ours, after a forward and backward pass that nothing runs beside."""
        alone = self._compute()
        return Save(self._save("synchronous")[0], alone)

    def asynchronous(self) -> Save:
        """Ours, in the background of what a step computes before the optimizer changes anything."""
        return Save(*self._save("asynchronous"))

    def verification(self) -> Save:
        """Of the last synchronous checkpoint."""
        name = f"step-{self._turn['synchronous']:08d}"
        return Save(milliseconds(lambda: verify(self._folder / "synchronous/checkpoints" / name)))

    def dcp(self) -> Save:
        """PyTorch's distributed checkpoint."""
        state, target = self._state(), self._folder / "dcp"
        shutil.rmtree(target, ignore_errors=True)
        return Save(milliseconds(lambda: dcp.save(state, checkpoint_id=target)))

    def asynchronous_dcp(self) -> Save:
        """The same in the background."""
        state, target = self._state(), self._folder / "dcp-async"
        shutil.rmtree(target, ignore_errors=True)
        began = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=target)
        stall = 1e3 * (time.perf_counter() - began)
        future.result()  # type: ignore[union-attr]
        return Save(stall)

    def deepspeed(self) -> Save:
        """DeepSpeed's own."""
        target = self._folder / "deepspeed"
        shutil.rmtree(target, ignore_errors=True)
        return Save(milliseconds(lambda: self._zero._engine.save_checkpoint(str(target), tag="zero")))

    def _save(self, way: str) -> tuple[float, float]:
        """Milliseconds of standing still, and of a forward and backward pass beside the save."""
        self._turn[way] += 1
        saver = self._savers[way]
        ended = saver.save(self._turn[way], {"step": self._turn[way]})
        beside = self._compute() if way == "asynchronous" else float("nan")
        saver.wait_copied()
        while not ended:
            time.sleep(0.002)
            ended = saver.poll()
        if ended[-1].folder is None:
            raise ValueError(f"a checkpoint could not be written: {ended[-1].problem}")
        return 1e3 * ended[-1].stall_s, beside

    def _compute(self) -> float:
        def step() -> None:
            self._engine.backward(self._engine.forward(self._tokens, self._tokens, _TOKENS), last=True)

        return milliseconds(step)

    def _state(self) -> dict[str, Tensor]:
        held = self._engine.state().tensors
        return {f"{kind}/{name}": tensor for name, each in held.items() for kind, tensor in each.tensors.items()}


def run(args: argparse.Namespace) -> None:
    """Check, time and print.

    Raises:
        ValueError: a checkpoint does not come back as it was.
    """
    with tempfile.TemporaryDirectory(dir=args.folder) as name, World.start(ParallelConfig()) as world:
        folder = Path(name)
        config = model_of_size(args.megabytes * 10**6)
        engine, other = (build_engine(config, ParallelConfig(engine="fsdp"), world, seed=seed) for seed in (1, 2))
        _require_exact(engine, other, folder / "exact", world)
        zero = build_engine(config, ParallelConfig(engine="deepspeed", zero_stage=3), world, seed=1)
        assert isinstance(zero, DeepSpeedEngine)
        saves = Saves(engine, zero, folder, world)
        found = in_turns(saves.contenders(), args.repeats, args.warmup)
        zero.close()
        engine.close()
    stalls = {name: [save.stall for save in each] for name, each in found.items()}
    alone, beside = (
        statistics.median(save.compute for save in found[f"ours, {way}"]) for way in ("synchronous", "asynchronous")
    )
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


def _require_exact(engine: Engine, other: Engine, folder: Path, world: World) -> None:
    """Save one engine, load the other one, and compare."""
    for held in engine.state().tensors.values():
        for moment in ("exp_avg", "exp_avg_sq"):
            held.tensors[moment].uniform_()
    saver = Saver(folder, engine, world, lambda path: None, CheckpointConfig(asynchronous=False))
    (saved,) = saver.save(1, {"step": 1, "tokens": 0, "data": {}, "layout": {}})
    if saved.folder is None:
        raise ValueError(f"a checkpoint could not be written: {saved.problem}")
    verify(saved.folder)
    load_checkpoint(saved.folder, other, world)
    reader, loaded = StateReader(saved.folder / STATE), other.state().tensors
    for name, held in engine.state().tensors.items():
        for kind, tensor in held.tensors.items():
            stored = reader.read(name, kind, held.shard, 0, len(tensor))
            if not (torch.equal(tensor, stored) and torch.equal(tensor, loaded[name].tensors[kind])):
                raise ValueError(f"{kind} of {name} does not come back as it was saved")
    other.close()
    shutil.rmtree(folder)


COMMANDS = {"checkpoint": Command(OPTIONS, run, repeats=7, warmup=1)}
