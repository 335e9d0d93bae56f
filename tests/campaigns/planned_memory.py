"""Plans beside real ranks: the peak of live tensors and every collective, in 22 runs of two ranks and nine layouts; and
how far a process grows.

Real ranks are processes over gloo, whose tensors a meter counts; a plan follows the same run on tensors without memory.
Without a meter, larger ranks grow from before a model is laid out to the peak of its second step. There, freed memory
goes back to the system at once (MALLOC_MMAP_THRESHOLD_), and what is allocated counts as far as it is written.
"""

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))
sys.path.append(str(Path(__file__).parents[2]))  # for launch

import layout_study
import planned_study
import torch
from ranks import run_ranks

from launch.benchmark import harness
from mega_scale.model import causal_lm_class
from mega_scale.parallel import ParallelConfig, World, parallelize, seeded_values
from mega_scale.training.config import build_optimizer

LAYOUT_SIZES = planned_study.SIZES.replace("global_batch_size=4", "global_batch_size=8")
RESIDENT_SIZES = """model.vocab_size=512 model.hidden_size=512 model.intermediate_size=1024 model.nffn_hidden_size=1024
    model.shared_representation_size=128 model.ema_projection_size=8 model.num_hidden_layers=4 model.chunk_size=256
    data.sequence_length=2048 train.global_batch_size=2 train.micro_batch_size=1 train.eval_every=0
    train.sample_every=0 train.steps=10 schedule.warmup_steps=0 parallel.device=cpu"""
RESIDENT_CASES = {
    "fsdp dp2, two micro-batches": "parallel.engine=fsdp train.global_batch_size=4",
    "fsdp dp2, recomputed": "parallel.engine=fsdp parallel.activation_checkpoint=1 data.sequence_length=4096",
    "zero-3 dp2": "parallel.engine=deepspeed",
    "zero-3 dp2, bf16": "parallel.engine=deepspeed train.dtype=bf16",
}
# Loads libraries and starts threads.
WARM_UP = {engine: f"parallel.engine={engine} data.sequence_length=256" for engine in ("fsdp", "deepspeed")}
_MIB = 2**20


def layout_cases() -> dict[str, str]:
    """The nine layouts of the layout tests, with and without recomputation, in both engines by turns."""
    found = {}
    for number, (name, shape) in enumerate(layout_study.LAYOUTS.items()):
        axes = " ".join(f"parallel.{axis}={size}" for axis, size in shape._asdict().items())
        engine = ("fsdp", "deepspeed")[number % 2]
        for every in (0, 1):
            key = f"{name} {engine}{', recomputed' if every else ''}"
            found[key] = f"parallel.engine={engine} parallel.activation_checkpoint={every} {axes}"
    return found


def compare(cases: dict[str, str], sizes: str, ranks: int) -> bool:
    """Print each case, of the last rank; whether all are within a percent, and send the same."""
    with tempfile.TemporaryDirectory() as folder:
        real = run_ranks(planned_study.real, ranks, Path(folder), cases, sizes, timeout_s=1800)
    sound = True
    for case, words in cases.items():
        began = time.process_time()
        found: dict[str, Any] = real[-1][case]
        planned = asdict(planned_study.planned(words, ranks - 1, sizes, ranks))
        share = planned["peak"] / found["peak"]
        step = planned["places"]["optimizer"] / found["places"]["optimizer"]
        same = all(planned[what] == _of_steps(found[what]) for what in ("calls", "sent"))
        calls = round(sum(sum(part.values()) for part in found["calls"].values()))
        print(
            f"{case:<34} | peak {found['peak'] / 2**20:9.3f} MiB, planned {share:.4f} of it, in the "
            f"optimizer's step {step:.4f} | {calls:4d} collectives "
            f"{'the same' if same else 'DIFFER'} | {time.process_time() - began:.1f} s",
            flush=True,
        )
        sound &= same and max(abs(share - 1), abs(step - 1)) < 0.01
    return sound


def grown(cases: dict[str, str]) -> dict[str, int]:
    """Bytes that a rank's resident memory grows by, up to the peak of its second step, in each case."""
    found = {}
    with World.start(ParallelConfig(device="cpu")) as world:
        for case, words in cases.items():
            config, model, _ = planned_study.as_planned(planned_study.run_of(words, RESIDENT_SIZES), world.size)
            own = planned_study.lay_out(world, config)
            before = harness.resident("VmRSS")
            with torch.device("meta"):
                module = causal_lm_class(model)(model)
            engine = parallelize(
                module, seeded_values(model, 0), config.engine_config(world.size), own,
                lambda sharded, config=config: build_optimizer(sharded, config.optimizer, config.train.dtype),
            )  # fmt: skip
            with contextlib.closing(engine):
                engine.module.train()
                text = torch.randint(3, 512, (1, config.data.sequence_length + 1))
                accumulation = config.engine_config(world.size).accumulation
                for _ in range(2):
                    already, peak = harness.resident("VmRSS"), harness.watch_peak()
                    for number in range(accumulation):
                        loss = engine.forward(text[:, :-1].contiguous(), text[:, 1:].contiguous(), text.numel())
                        engine.backward(loss, last=number == accumulation - 1)
                    del loss
                    engine.step(1e-3)
                    found[case] = already - before + peak()
            del engine, module
            gc.collect()
    return found


def compare_resident() -> bool:
    """Print each case, of the last rank; whether all plans are within a tenth of the growth."""
    os.environ |= harness.GIVES_BACK  # read by the C library as the ranks' server starts
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(grown, 2, Path(folder), WARM_UP | RESIDENT_CASES, timeout_s=1800)[-1]
    sound = True
    for case, words in RESIDENT_CASES.items():
        real, planned = found[case], planned_study.planned(words, 1, RESIDENT_SIZES).peak
        print(f"{case:<34} | grown {real / _MIB:7.1f} MiB, planned {planned / real:.4f} of it", flush=True)
        sound &= real > 200 * _MIB and abs(planned / real - 1) < 0.1
    return sound


def _of_steps(table: dict[str, Any]) -> dict[str, Any]:
    """Without DeepSpeed's comparison of ranks, once a run."""
    return {part: {key: n for key, n in own.items() if "broadcast" not in key} for part, own in table.items()}


def main() -> None:
    """Compare; exit code 1 where a plan is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["memory", "layouts", "resident"], help="one of the parts")
    args = parser.parse_args()
    sound = True
    if args.only in (None, "memory"):
        sound &= compare(planned_study.CASES, planned_study.SIZES, 2)
    if args.only in (None, "layouts"):
        for ranks in (2, 4):
            cases = layout_cases().items()
            own = {name: words for name, words in cases if layout_study.LAYOUTS[name.split()[0]].size == ranks}
            sound &= compare(own, LAYOUT_SIZES, ranks)
    if args.only in (None, "resident"):
        sound &= compare_resident()
    raise SystemExit(not sound)


if __name__ == "__main__":
    main()
