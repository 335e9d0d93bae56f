"""The `long` sub-command of benchmark.py: the memory of one training step of a recipe's model on one long sequence.

The step is the trainer's own: its engine, sliced loss, recomputation and optimizer, on this process alone. The
sequence's tokens are drawn at random, as only sizes matter.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.machine import hardware, return_freed_memory
from mega_scale.config import load_config, model_config
from mega_scale.data import load_tokenizer
from mega_scale.model import MegaForCausalLM
from mega_scale.model.flops import training_flops_per_token
from mega_scale.parallel import EngineConfig, ParallelConfig, World, parallelize, seeded_values
from mega_scale.parallel.mesh import check_segments
from mega_scale.training.optimizer import build_optimizer


def add_long_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Options of the sub-command.

    Args:
        command: the parser of the sub-command.
        positive: reads an integer of at least 1.
    """
    command.add_argument("--config", default="configs/enwik8-39m.yaml", help="run whose model is trained")
    command.add_argument("--length", type=positive, default=131072, help="tokens of the sequence")
    command.add_argument("--segment", type=int, default=8192, help="parallel.activation_checkpoint_segment, tokens")
    command.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of forward and backward")
    command.add_argument("--limit-gb", type=float, default=8.0, help="memory of the process that is allowed, 1e9 bytes")


def run_long(args: argparse.Namespace) -> None:
    """Take one step, and print what it needed.

    Raises:
        ValueError: the model cannot be trained like this, or the step needed more memory than is allowed.
    """
    return_freed_memory()
    run = load_config(args.config)
    config = model_config(run.model, load_tokenizer(run.data.tokenizer))
    parallel = ParallelConfig(
        engine="fsdp", activation_checkpoint=1, activation_checkpoint_segment=args.segment, device="cpu"
    )
    check_segments(config, args.segment, 1, 1)
    tokens = torch.randint(config.vocab_size, (1, args.length + 1), generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        model = MegaForCausalLM(config)
    with World.start(parallel) as world:
        engine = parallelize(
            model,
            seeded_values(config, 0),
            EngineConfig(parallel, dtype=args.dtype, max_grad_norm=run.optimizer.max_grad_norm),
            world,
            lambda sharded: build_optimizer(sharded, run.optimizer),
        )
        try:
            engine.module.train()
            before = _peak_gb()
            began = time.perf_counter()
            loss = engine.forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), args.length)
            engine.backward(loss, last=True)
            loss = loss.detach()
            norm = engine.step(run.optimizer.lr)
            seconds = time.perf_counter() - began
        finally:
            engine.close()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, Any] = {
        "config": args.config, "parameters": parameters, "length": args.length, "segment": args.segment,
        "dtype": args.dtype, "threads": args.threads, "loss": float(loss), "gradient_norm": norm, "seconds": seconds,
        "tokens_per_s": args.length / seconds, "before_gb": before, "peak_gb": _peak_gb(),
        "flops_per_token": training_flops_per_token(config, args.length), "hardware": hardware(),
    }  # fmt: skip
    print(
        f"One training step of {args.config} ({parameters / 1e6:.1f}M parameters, {args.dtype}) on a sequence of "
        f"{args.length:,} tokens, blocks recomputed {args.segment:,} tokens at a time, {args.threads} CPU thread(s).\n"
        f"Machine: {hardware()}. torch {torch.__version__}.\n\n"
        "| peak memory of the process, GB | before the step | seconds | tokens/s | loss | gradient norm |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        f"| {found['peak_gb']:.2f} | {before:.2f} | {seconds:.1f} | {found['tokens_per_s']:,.0f} | {loss:.4f} | "
        f"{norm:.4f} |"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"benchmark": "long", **found}, indent=2) + "\n", encoding="utf-8")
    if found["peak_gb"] > args.limit_gb:
        raise ValueError(f"the step needed {found['peak_gb']:.2f} GB, --limit-gb {args.limit_gb:g} allows no more")


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
