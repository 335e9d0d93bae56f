"""One contender of `benchmark.py mfu`, in a process of its own: training steps on the GPU, at several lengths.

Started as `PYTHON launch/mfu_worker.py KIND SIZES.json`; prints a JSON line for every length, and nothing else on
standard output.
"""

import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mega_scale.config import load_config, model_config
from mega_scale.model import MegaConfig, MegaForCausalLM
from mega_scale.model.flops import training_flops_per_token
from mega_scale.ops.cross_entropy import linear_cross_entropy
from mega_scale.parallel import EngineConfig, ParallelConfig, World, parallelize, seeded_values
from mega_scale.parallel.shard import Values
from mega_scale.training.optimizer import OptimizerConfig, build_optimizer

_PATTERN = 2**20  # numbers of a large tensor that are drawn; the rest repeats them, as only sizes matter


def repeated_values(config: MegaConfig) -> Values:
    """Initial values of the right size and spread, without the time that drawing a billion numbers takes."""
    drawn = seeded_values(config, 0)

    def value(name: str, owner: nn.Module, local_name: str) -> Tensor:
        parameter = owner._parameters.get(local_name)
        if parameter is None or parameter.numel() <= _PATTERN:
            return drawn(name, owner, local_name)
        pattern = torch.empty(_PATTERN).normal_(0.0, config.initializer_range)
        return pattern.repeat(-(-parameter.numel() // _PATTERN))[: parameter.numel()].view(parameter.shape)

    return value


class Ours:
    """This project's trainer: its engine on one process, sliced loss, fused AdamW, bf16 with fp32 masters."""

    def __init__(self, sizes: dict[str, Any], recompute: int, segment: int, world: World) -> None:
        run = load_config(sizes["config"])
        self.config = model_config(run.model)
        parallel = ParallelConfig(
            engine="fsdp", activation_checkpoint=recompute, activation_checkpoint_segment=segment, device="cuda"
        )
        with torch.device("meta"):
            model = MegaForCausalLM(self.config)
        self.engine = parallelize(
            model,
            repeated_values(self.config),
            EngineConfig(parallel, dtype="bf16", compile=sizes["compile"]),
            world,
            lambda sharded: build_optimizer(sharded, OptimizerConfig()),
        )
        self.engine.module.train()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    def step(self, tokens: Tensor) -> float:
        """Forward, loss, backward, clipping, AdamW; returns the loss."""
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = self.engine.forward(inputs, labels, labels.numel())
        self.engine.backward(loss, last=True)
        loss = loss.detach()
        self.engine.step(1e-4)
        return float(loss)

    def flops_per_token(self, length: int) -> float:
        """Of a training step, recomputation not counted."""
        return training_flops_per_token(self.config, length)


class Llama:
    """transformers' Llama with flash attention (sdpa) under autocast, our sliced loss, fused AdamW."""

    def __init__(self, sizes: dict[str, Any], recompute: int, segment: int, world: World) -> None:
        del segment, world
        from transformers import LlamaConfig, LlamaForCausalLM

        run = load_config(sizes["config"])
        own = model_config(run.model)
        self.config = LlamaConfig(
            vocab_size=own.vocab_size, hidden_size=own.hidden_size, num_hidden_layers=own.num_hidden_layers,
            intermediate_size=sizes["llama_expanded"], num_attention_heads=own.hidden_size // 128,
            max_position_embeddings=max(sizes["lengths"]), tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        self.config._attn_implementation = "sdpa"
        with torch.device("cuda"):
            self.model = LlamaForCausalLM(self.config).train()
        for number, layer in enumerate(self.model.model.layers, start=1):
            if sizes["compile"]:
                layer.forward = torch.compile(layer.forward)
            if recompute and number % recompute == 0:
                layer.forward = _checkpointed(layer.forward)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, tokens: Tensor) -> float:
        """Forward, loss, backward, clipping, AdamW; returns the loss."""
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = self.model.model(input_ids=inputs).last_hidden_state
            loss = linear_cross_entropy(hidden, self.model.lm_head.weight, None, labels) / labels.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def flops_per_token(self, length: int) -> float:
        """Of a training step: six a weight, and causal attention, whose queries see half of the keys on average."""
        d, layers = self.config.hidden_size, self.config.num_hidden_layers
        weights = layers * d * (4 * d + 3 * self.config.intermediate_size) + d * self.config.vocab_size
        return 3 * (2 * weights + layers * 4 * d * (length + 1) / 2)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


KINDS: dict[str, type[Ours | Llama]] = {"ours": Ours, "llama": Llama}


def measure(trainer: Ours | Llama, sizes: dict[str, Any], length: int) -> dict[str, Any]:
    """Milliseconds of a training step and the GPU's peak memory."""
    batch = max(sizes["tokens"] // length, 1)
    high = trainer.config.vocab_size
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(3, high, (batch, length + 1), device="cuda", generator=generator)
    loss = math.nan
    for _ in range(sizes["warmup"]):
        loss = trainer.step(tokens)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(sizes["repeats"]):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        trainer.step(tokens)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    if sizes["profile"]:
        _profile(trainer, tokens)
    return {
        "batch": batch, "milliseconds": times, "median_ms": statistics.median(times), "loss": loss,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "flops_per_token": trainer.flops_per_token(length),
        "parameters": trainer.parameters,
    }  # fmt: skip


def _profile(trainer: Ours | Llama, tokens: Tensor) -> None:
    """Where a step's time goes, on standard error."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        trainer.step(tokens)
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    print(f"{total / 1e3:.1f} ms in {sum(event.count for event in kernels)} kernels", file=sys.stderr)
    for event in kernels[:30]:
        print(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} {event.key[:110]}", file=sys.stderr)


def main() -> None:
    """Measure every length."""
    kind, file = sys.argv[1:]
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sizes = json.loads(Path(file).read_text(encoding="utf-8"))
    trainer, built = None, None
    with World.start(ParallelConfig(engine="fsdp", device="cuda")) as world:
        for length, recompute, segment in zip(sizes["lengths"], sizes["recompute"], sizes["segment"], strict=True):
            try:
                if trainer is None or built != (recompute, segment):
                    trainer = None
                    _release()
                    trainer, built = KINDS[kind](sizes, recompute, segment, world), (recompute, segment)
                found = measure(trainer, sizes, length)
            except torch.OutOfMemoryError:
                found, trainer = {"out_of_memory": True}, None
            answers.write(json.dumps({"kind": kind, "length": length, "recompute": recompute, **found}) + "\n")
            _release()


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
