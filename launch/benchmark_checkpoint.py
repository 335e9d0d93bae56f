"""The `checkpoint` sub-command of benchmark.py: for how long a save stops training, and what verification costs.

One process holds model and AdamW state of a given size. Ours, DCP's and DeepSpeed's saves take turns; before anything
is timed, a checkpoint of ours is loaded into another engine and compared, bit for bit.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from launch.machine import hardware
from mega_scale import MegaConfig, MegaForCausalLM
from mega_scale.checkpoint.folder import STATE, CheckpointConfig, verify
from mega_scale.checkpoint.restore import load_checkpoint
from mega_scale.checkpoint.saver import Saver
from mega_scale.checkpoint.state import StateReader
from mega_scale.parallel import Engine, EngineConfig, ParallelConfig, World, parallelize, seeded_values
from mega_scale.parallel.deepspeed import DeepSpeedEngine
from mega_scale.training.optimizer import OptimizerConfig, build_optimizer

_BYTES_A_PARAMETER = 12  # weight and two moments, fp32
_HIDDEN = 512
_TOKENS = 128
_TURN = "{:<46} {:>9.1f} {:>9.1f} {:>9.1f} {:>10.2f}"


def add_checkpoint_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Options of the sub-command."""
    command.add_argument("--megabytes", type=positive, default=200, help="size of model and optimizer, 10^6 bytes")
    command.add_argument("--folder", default=None, help="where to write; a temporary folder if not given")


def run_checkpoint(args: argparse.Namespace) -> None:
    """Time the saves, and print a table.

    Raises:
        ValueError: a checkpoint does not come back as it was.
    """
    with tempfile.TemporaryDirectory(dir=args.folder) as name, World.start(ParallelConfig()) as world:
        folder = Path(name)
        config = _config(args.megabytes)
        engine, size = _engine(config, "fsdp", 1, world), _size(config)
        _require_exact(engine, _engine(config, "fsdp", 2, world), folder / "exact", world)
        zero = _engine(config, "deepspeed", 1, world)
        seconds: dict[str, list[tuple[float, float]]] = {}
        alone: list[float] = []
        beside: list[float] = []
        contenders = _contenders(engine, zero, folder, world, alone, beside)
        for turn in range(args.warmup + args.repeats):
            for label, save in contenders.items():
                found = save(turn)
                if turn >= args.warmup:
                    seconds.setdefault(label, []).append(found)
        zero.close()
        engine.close()
    base = statistics.median(stall for stall, _ in seconds["ours, synchronous"])
    print(
        f"Saving {size / 1e6:,.0f} MB of model and optimizer, one process, {args.threads} CPU thread(s), "
        f"{args.repeats} repeats after {args.warmup} for warm-up, in turns; ours is hashed, flushed and "
        f"read back, DCP's is flushed, DeepSpeed's is neither.\nMachine: {hardware()}. torch {torch.__version__}.\n"
    )
    print(f"{'training stands still, ms':<46} {'median':>9} {'least':>9} {'greatest':>9} {'of ours':>10}")
    for label, pairs in seconds.items():
        stalls = sorted(stall * 1e3 for stall, _ in pairs)
        median = statistics.median(stalls)
        print(_TURN.format(label, median, stalls[0], stalls[-1], median / base / 1e3))
    least, most = (statistics.median(times[-args.repeats :]) for times in (alone, beside))
    print(
        f"\nForward and backward of {_TOKENS} tokens, which run while ours is copied and written: "
        f"{most * 1e3:.1f} ms, {least * 1e3:.1f} ms alone ({most / least:.2f})."
    )
    if args.json:
        content = {"benchmark": "checkpoint", "bytes": size, "hardware": hardware(), "seconds": seconds}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _contenders(
    engine: Engine, zero: Engine, folder: Path, world: World, alone: list[float], beside: list[float]
) -> dict[str, Callable[[int], tuple[float, float]]]:
    """By name: saves once, and returns for how long training stood still and until all was written, seconds.

    Times of a forward and backward pass are added to two lists: alone, and beside an asynchronous save of ours.
    """

    tokens = torch.arange(_TOKENS)[None] % 256

    def compute() -> float:
        began = time.perf_counter()
        engine.backward(engine.forward(tokens, tokens, _TOKENS), last=True)
        return time.perf_counter() - began

    def ours(asynchronous: bool) -> Callable[[int], tuple[float, float]]:
        config = CheckpointConfig(asynchronous=asynchronous, keep=1)
        saver = Saver(folder / f"ours-{asynchronous}", engine, world, lambda path: None, config)

        def save(turn: int) -> tuple[float, float]:
            alone.append(compute())
            ended = saver.save(turn, {"step": turn})
            if asynchronous:  # what a step computes before the optimizer changes anything
                beside.append(compute())
            saver.wait_copied()
            while not ended:
                time.sleep(0.002)
                ended = saver.poll()
            if ended[-1].folder is None:
                raise ValueError(f"a checkpoint could not be written: {ended[-1].problem}")
            return ended[-1].stall_s, ended[-1].write_s

        return save

    def verification(turn: int) -> tuple[float, float]:
        began = time.perf_counter()
        verify(folder / "ours-False" / "checkpoints" / f"step-{turn:08d}")
        return (time.perf_counter() - began,) * 2

    def plain_dcp(turn: int) -> tuple[float, float]:
        state, target = _state_dict(engine), folder / "dcp"
        shutil.rmtree(target, ignore_errors=True)
        began = time.perf_counter()
        dcp.save(state, checkpoint_id=target)
        return (time.perf_counter() - began,) * 2

    def asynchronous_dcp(turn: int) -> tuple[float, float]:
        state, target = _state_dict(engine), folder / "dcp-async"
        shutil.rmtree(target, ignore_errors=True)
        began = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=target)
        stall = time.perf_counter() - began
        future.result()  # type: ignore[union-attr]
        return stall, time.perf_counter() - began

    def deepspeed(turn: int) -> tuple[float, float]:
        assert isinstance(zero, DeepSpeedEngine)
        shutil.rmtree(folder / "deepspeed", ignore_errors=True)
        began = time.perf_counter()
        zero._engine.save_checkpoint(str(folder / "deepspeed"), tag="zero")
        return (time.perf_counter() - began,) * 2

    return {
        "ours, synchronous": ours(False),
        "ours, asynchronous": ours(True),
        "ours, verification before a load": verification,
        "DCP, dcp.save": plain_dcp,
        "DCP, dcp.async_save": asynchronous_dcp,
        "DeepSpeed, save_checkpoint": deepspeed,
    }


def _state_dict(engine: Engine) -> dict[str, torch.Tensor]:
    state = engine.state()
    return {f"{kind}/{name}": tensor for name, held in state.tensors.items() for kind, tensor in held.tensors.items()}


def _config(megabytes: int) -> MegaConfig:
    """As many layers as fit, and a vocabulary that fills the rest."""
    wanted = megabytes * 10**6

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
    while _size(config(layers + 1, smallest)) < wanted:
        layers += 1
    left = wanted - _size(config(layers, smallest))
    return config(layers, smallest + max(left // (_HIDDEN * _BYTES_A_PARAMETER), 0))


def _size(config: MegaConfig) -> int:
    with torch.device("meta"):
        return _BYTES_A_PARAMETER * sum(parameter.numel() for parameter in MegaForCausalLM(config).parameters())


def _engine(config: MegaConfig, engine: str, seed: int, world: World) -> Engine:
    with torch.device("meta"):
        model = MegaForCausalLM(config)
    return parallelize(
        model,
        seeded_values(config, seed),
        EngineConfig(ParallelConfig(engine=engine, zero_stage=3)),  # type: ignore[arg-type]
        world,
        lambda module: build_optimizer(module, OptimizerConfig()),
    )


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
