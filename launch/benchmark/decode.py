"""The `decode` command: whether decoding stays as fast, and its cache as small, as a text grows.

Our step is timed at several contexts, and beside it models of transformers at one of them. Every contender decodes a
window as long as our chunk, centred on its context, so that our step meets every place of a chunk, and a model whose
cache grows has the named context on average. Windows are cut into segments that take turns.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from mega_scale import MegaCache, MegaConfig, MegaForCausalLM

from .harness import Command, Option, Worker, check_errors, report, spread, table
from .ours import model_config
from .peers import Decoding, parameter_count

TOLERANCE = 1e-3
_CHECKED = 16  # tokens of a window whose logits are compared
_SEGMENTS = 8
_PREFILL = 8192
OPTIONS = {
    "contexts": Option([1024, 2048, 16384], "tokens of context at which our step is timed"),
    "peer-context": Option(2048, "tokens of context of the other models, one of --contexts"),
    "chunk": Option(128, "attention chunk, tokens"),
    "hidden": Option(64, "channels D"),
    "layers": Option(2, "blocks"),
    "shared": Option(32, "width Z of queries and keys"),
    "values": Option(128, "width E of values"),
    "states": Option(16, "moving averages per channel N"),
    "vocabulary": Option(256, "number of token ids"),
    "activation": Option("softmax", "of attention", ["softmax", "laplace", "relu2"]),
    "seed": Option(0, "of weights and text", least=0),
    "peer-python": Option(None, "interpreter with transformers 4.37.2, whose Mega is then compared too"),
}
REPLACED = {
    "--tokens": "pass --contexts, such as --contexts 1024 16384",
    "--window": "windows are as long as --chunk",
    "--batch": "one sequence is decoded",
}


class OurDecoding(Decoding):
    """Greedy decoding with a model of this project."""

    def call(self, method: str, *arguments: int) -> float:
        """As a worker is called."""
        return getattr(self, method)(*arguments)

    def truth(self, tokens: Tensor) -> Tensor:
        """Logits of one call with all tokens after the same cache, which goes the way that prefill goes."""
        return self.model(tokens, past_key_values=self.past(), use_cache=True).logits


def cache_bytes(config: MegaConfig, element_size: int) -> int:
    """Bytes of a chunked model's cache of one sequence by README.md's formula; keys have `element_size` bytes."""
    averages = 4 * config.hidden_size * config.ema_projection_size
    widths = config.shared_representation_size + config.intermediate_size
    return config.num_hidden_layers * (averages + element_size * config.chunk_size * widths)


@torch.no_grad()
def our_windows(model: MegaForCausalLM, contexts: Sequence[int], window: int, seed: int) -> list[OurDecoding]:
    """Read one text, and keep the cache where each window of so many tokens begins, about ascending contexts.

    Raises:
        ValueError: the cache's size is not that of the formula.
    """
    text = torch.randint(3, model.config.vocab_size, (1, contexts[-1]), generator=torch.Generator().manual_seed(seed))
    expected = cache_bytes(model.config, model.dtype.itemsize)
    cache, read, windows = MegaCache(model.config.num_hidden_layers), 0, []
    for context in contexts:
        start = context - window // 2
        while read < start:
            until = min(read + _PREFILL, start)
            cache = model(text[:, read:until], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            read = until
        if cache.nbytes != expected:
            raise ValueError(f"the cache holds {cache.nbytes} bytes after {start} tokens, expected {expected}")
        windows.append(OurDecoding(model, cache, torch.tensor([[3]])))
    return windows


def time_windows(contenders: Sequence[OurDecoding | Worker], window: int, rounds: int) -> list[list[float]]:
    """Decode windows in turns, a short segment of one after a segment of the next, so that load meets all alike.

    Returns:
        For each contender the milliseconds per token of its rounds.
    """
    segments = min(_SEGMENTS, window)
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds):
        for contender, found in zip(contenders, times, strict=True):
            contender.call("restart")
            found.append(0.0)
        for segment in range(segments):
            order = range(len(contenders))
            for i in order if (turn + segment) % 2 == 0 else reversed(order):
                times[i][-1] += contenders[i].call("run", window // segments) / segments
    return times


def run(args: argparse.Namespace) -> None:
    """Check, time and print. Raises ValueError where what is decoded is wrong, or options do not fit."""
    contexts = sorted(set(args.contexts))
    if contexts[0] <= args.chunk // 2:
        raise ValueError(f"windows of --chunk {args.chunk} are centred: contexts must exceed {args.chunk // 2} tokens")
    if args.peer_context not in contexts:
        raise ValueError(f"--peer-context {args.peer_context} is not among --contexts {contexts}: add it")
    sizes = {name: getattr(args, name) for name in ("vocabulary", "hidden", "layers", "shared", "chunk")}
    sizes |= {"expanded": args.values, "feed_forward": 2 * args.hidden, "averages": args.states}
    torch.manual_seed(args.seed)
    options = {"attention_activation": args.activation, "normalization_type": "layernorm"}
    model = MegaForCausalLM(model_config(sizes, **options)).eval()
    sizes["parameters"] = parameter_count(model)
    ours = [f"mega_scale at {context}" for context in contexts]
    windows = our_windows(model, contexts, args.chunk, args.seed)
    contenders: dict[str, OurDecoding | Worker] = dict(zip(ours, windows, strict=True))
    parameters = dict.fromkeys(ours, sizes["parameters"])
    peers = {"llama": ("Llama, sdpa", sys.executable)}
    if args.peer_python:
        peers["mega"] = ("Mega, unchunked", args.peer_python)
    with contextlib.ExitStack() as stack:
        for kind, (label, python) in peers.items():
            start = args.peer_context - args.chunk // 2
            arguments = {"kind": kind, "sizes": sizes, "start": start, "seed": args.seed}
            worker = Worker("peers:PeerDecoding", arguments, name=label, threads=args.threads, python=python)
            known = stack.enter_context(worker).call("describe")
            name = f"{label} (transformers {known['transformers']}) at {args.peer_context}"
            contenders[name], parameters[name] = worker, known["parameters"]
        errors = {name: contender.call("error", _CHECKED) for name, contender in contenders.items()}
        for name, error in errors.items():
            check_errors(name, {"decoded logits": error}, TOLERANCE)
        time_windows(list(contenders.values()), args.chunk, args.warmup)
        found = time_windows(list(contenders.values()), args.chunk, args.repeats)
    times = dict(zip(contenders, found, strict=True))
    medians = [statistics.median(times[name]) for name in ours]
    at_peers = times[f"mega_scale at {args.peer_context}"]
    ratios = {
        # Of windows of one round, which met the same load.
        name: statistics.median(theirs / own for theirs, own in zip(times[name], at_peers, strict=True))
        for name in list(times)[len(ours) :]
    }
    held = cache_bytes(model.config, model.dtype.itemsize)
    head = ["", "parameters", "median ms/token", "min", "max", "largest error"]
    rows = [[name, f"{parameters[name]:,}", *spread(times[name], 3), f"{errors[name]:.1e}"] for name in contenders]
    text = [
        f"Greedy decoding, fp32, B=1, windows of one chunk ({args.chunk} tokens) about each context, in turns.",
        table(head, rows),
        f"Ours, slowest context over fastest: {max(medians) / min(medians):.3f}; its cache holds {held} bytes at each.",
        *(f"Ours is {ratio:.2f} times as fast as {name}." for name, ratio in ratios.items()),
    ]
    figures = {"milliseconds": times, "parameters": parameters, "errors": errors, "cache_bytes": held}
    ratio = {"slowest_over_fastest_context": max(medians) / min(medians), "times_as_fast_as": ratios}
    report(args, text, {**figures, **ratio})


COMMANDS = {"decode": Command(OPTIONS, run, repeats=5, warmup=1, replaced=REPLACED)}
