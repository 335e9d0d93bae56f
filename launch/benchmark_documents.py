"""The `reset` sub-command of launch/benchmark.py: what it costs to keep the documents of a row apart."""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from launch.machine import hardware
from mega_scale.model import MegaConfig, MegaForCausalLM

_CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def add_reset_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Declare the options of `reset`."""
    command.add_argument("--batch", type=positive, default=4, help="sequences")
    command.add_argument("--length", type=positive, default=2048, help="tokens a sequence")
    command.add_argument("--chunk", type=positive, default=256, help="tokens a chunk")
    command.add_argument(
        "--hidden", type=positive, default=512, help="channels D; values, feed-forward 2 D, keys D / 4"
    )
    command.add_argument("--layers", type=positive, default=2, help="blocks")
    command.add_argument("--states", type=positive, default=16, help="moving averages per channel")
    command.add_argument("--document", type=positive, nargs="+", default=[100, 500, 2000], help="mean length, tokens")
    command.add_argument(
        "--activation", choices=("softmax", "laplace", "relu2"), default="softmax", help="of attention"
    )
    words = "wall time, or this process's CPU time, which waits for no other"
    command.add_argument("--clock", choices=tuple(_CLOCKS), default="cpu", help=words)
    command.add_argument("--seed", type=int, default=0, help="of weights, tokens and documents")


def run_reset(args: argparse.Namespace) -> None:
    """The `reset` sub-command: forward and backward of a model, documents kept apart against end to end."""
    torch.manual_seed(args.seed)
    model = _model(args)
    tokens = torch.randint(3, model.config.vocab_size, (args.batch, args.length + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    ways: dict[str, Tensor | None] = {"concat": None}
    shares = {}
    for mean in args.document:
        starts = documents(args.batch, args.length, mean, args.seed)
        _require_apart(model, inputs, starts)
        chunks = starts.unflatten(1, (-1, min(args.chunk, args.length)))
        shares[f"reset, {mean} tokens"] = float(chunks[..., 1:].any(-1).float().mean())
        ways[f"reset, {mean} tokens"] = starts
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.warmup + args.repeats):
        for name, marks in ways.items():
            taken = _step(model, inputs, labels, marks, _CLOCKS[args.clock])
            if turn >= args.warmup:
                seconds[name].append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    # Turn by turn, so that a load that comes and goes meets both.
    costs = {
        name: statistics.median(a / b for a, b in zip(times, seconds["concat"], strict=True)) - 1
        for name, times in seconds.items()
        if name != "concat"
    }
    lines = [
        f"Forward + backward of {args.layers} blocks, D {args.hidden}, N {args.states}, {args.activation}, "
        f"{args.batch} x {args.length} tokens, chunk {args.chunk}, fp32, {args.threads} CPU thread(s), {args.repeats} "
        f"repeats after {args.warmup} for warm-up, in turns. Lengths of documents are log-normal.",
        f"Times are {args.clock} times of this process; cost is the median over turns of the time over "
        "that of concat in the same turn.",
        f"Machine: {hardware()}. torch {torch.__version__}.",
        "",
        "| documents | median ms | min | max | cost over concat | chunks with several |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, times in seconds.items():
        figures = [f"{1e3 * value:.0f}" for value in (medians[name], min(times), max(times))]
        extra = [f"{costs[name]:+.1%}", f"{shares[name]:.0%}"] if name in costs else ["", ""]
        lines.append(f"| {' | '.join([name, *figures, *extra])} |")
    print("\n".join(lines))
    if args.json:
        report = {"benchmark": "reset", "hardware": hardware(), "seconds": seconds, "cost": costs, "mixed": shares}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def documents(batch: int, length: int, mean: int, seed: int) -> Tensor:
    """Where documents start in rows cut from one long text, (batch, length) bool; lengths are log-normal."""
    generator = torch.Generator().manual_seed(seed)
    count = 4 * batch * length // mean + 100
    drawn = torch.randn(count, generator=generator).exp() * (mean / math.exp(0.5))
    places = drawn.clamp(min=1).long().cumsum(0)
    starts = torch.zeros(batch * length, dtype=torch.bool)
    starts[places[places < len(starts)]] = True
    return starts.view(batch, length)


def _model(args: argparse.Namespace) -> MegaForCausalLM:
    config = MegaConfig(
        vocab_size=512,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        intermediate_size=2 * args.hidden,
        nffn_hidden_size=2 * args.hidden,
        shared_representation_size=args.hidden // 4,
        ema_projection_size=args.states,
        use_chunking=True,
        chunk_size=args.chunk,
        attention_activation=args.activation,
        is_decoder=True,
        bidirectional=False,
        dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        nffn_activation_dropout_prob=0.0,
    )
    return MegaForCausalLM(config).train()


def _step(
    model: MegaForCausalLM, inputs: Tensor, labels: Tensor, starts: Tensor | None, clock: Callable[[], float]
) -> float:
    """Seconds of a forward and backward."""
    model.zero_grad(set_to_none=True)
    began = clock()
    model(input_ids=inputs, shift_labels=labels, document_starts=starts, use_cache=False).loss.backward()
    return clock() - began


@torch.no_grad()
def _require_apart(model: MegaForCausalLM, inputs: Tensor, starts: Tensor) -> None:
    """Refuse to time what lets one document see another: other tokens before a row's last document change nothing."""
    last = [int(row.nonzero()[-1]) if row.any() else 0 for row in starts]
    other = inputs.clone()
    for row, place in zip(other, last, strict=True):
        row[:place] = row[:place].flip(0)
    one, two = (
        model(input_ids=ids, document_starts=starts, use_cache=False, output_hidden_states=True).hidden_states[-1]
        for ids in (inputs, other)
    )
    for a, b, place in zip(one, two, last, strict=True):
        if not torch.equal(a[place:], b[place:]):
            raise ValueError("reset is not timed: a document changes with those before it")
