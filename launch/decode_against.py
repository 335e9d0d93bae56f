"""`benchmark.py decode --contexts`: time per token at several contexts, against models of transformers, in turns.

Each contender decodes a window as long as our chunk, centred on its context: our step meets every place of a chunk, and
a model whose cache grows has the named context on average. Windows are cut into segments that take turns.

Legend: B batch (1), L tokens, V vocabulary.
"""

import argparse
import contextlib
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from launch.machine import hardware
from launch.worker_process import WorkerProcess
from mega_scale import MegaCache, MegaConfig, MegaForCausalLM

TOLERANCE = 1e-3
_SEGMENTS = 8
_CHECKED = 16
_PREFILL = 8192
_WORKER = Path(__file__).with_name("decode_worker.py")


class Contender(Protocol):
    """What decodes from one context."""

    name: str
    parameters: int
    context: int

    def error(self) -> float:
        """Largest difference of decoded logits from those of a forward, relative to the largest logit."""

    def restart(self) -> None:
        """Go back to the beginning of the window."""

    def run(self, steps: int) -> float:
        """Decode on; milliseconds a token."""


class OurStep:
    """A step of this project.

    Args:
        model: the decoder, in eval mode.
        cache: of the tokens before the window; changed by nothing.
        context: tokens at the window's middle.
    """

    def __init__(self, model: MegaForCausalLM, cache: MegaCache, context: int) -> None:
        self.name, self.context = f"mega_scale at {context}", context
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._model, self._past = model, cache
        self.restart()

    def restart(self) -> None:
        """See `Contender`."""
        self._cache, self._token = copy.deepcopy(self._past), torch.tensor([[3]])

    @torch.no_grad()
    def run(self, steps: int) -> float:
        """See `Contender`."""
        start = time.perf_counter()
        for _ in range(steps):
            self._token = self._model(self._token, past_key_values=self._cache, use_cache=True).logits.argmax(-1)
        return 1e3 * (time.perf_counter() - start) / steps

    @torch.no_grad()
    def error(self) -> float:
        """Against one call with all tokens after the same cache, which goes the way that prefill goes."""
        self.restart()
        tokens, logits = [], []
        for _ in range(_CHECKED):
            tokens.append(self._token)
            logits.append(self._model(self._token, past_key_values=self._cache, use_cache=True).logits)
            self._token = logits[-1].argmax(-1)
        truth = self._model(torch.cat(tokens, 1), past_key_values=copy.deepcopy(self._past), use_cache=True).logits
        return float((torch.cat(logits, 1) - truth).abs().max() / truth.abs().max())


class TheirStep:
    """A step of a model of transformers, in another process.

    Args:
        label: for the table.
        kind: mega or llama, see decode_worker.py.
        python: the interpreter.
        sizes: of the model.
        threads: CPU threads.
        folder: for what it says.
        context: tokens at the window's middle.
    """

    def __init__(
        self, label: str, kind: str, python: str, sizes: dict[str, int], threads: int, folder: Path, context: int
    ) -> None:
        command = [python, str(_WORKER), kind, json.dumps(sizes), str(threads)]
        errors = (folder / f"{kind}-{context}.txt").open("w+", encoding="utf-8")
        self.worker = WorkerProcess(command, threads, errors)
        ready = self.worker.ready
        self.name, self.context = f"{label} (transformers {ready['transformers']}) at {context}", context
        self.parameters = int(ready["parameters"])

    def error(self) -> float:
        """See `Contender`."""
        return float(self.worker.ask(f"check {_CHECKED}")["value"])

    def restart(self) -> None:
        """See `Contender`."""
        self.worker.ask("restart")

    def run(self, steps: int) -> float:
        """See `Contender`."""
        return float(self.worker.ask(f"run {steps}")["value"])


@torch.no_grad()
def our_steps(model: MegaForCausalLM, contexts: list[int], window: int, seed: int) -> list[OurStep]:
    """Read one text, and keep the cache where each window begins.

    Args:
        model: the decoder.
        contexts: ascending, tokens.
        window: tokens.
        seed: of the text.
    """
    text = torch.randint(3, model.config.vocab_size, (1, contexts[-1]), generator=torch.Generator().manual_seed(seed))
    cache, read, steps = MegaCache(model.config.num_hidden_layers), 0, []
    for context in contexts:
        start = context - window // 2
        while read < start:
            until = min(read + _PREFILL, start)
            cache = model(text[:, read:until], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            read = until
        steps.append(OurStep(model, copy.deepcopy(cache), context))
    return steps


def time_in_turns(contenders: list[Contender], window: int, rounds: int) -> list[list[float]]:
    """Milliseconds a token of each contender's windows, one a round, after one short segment that is not counted."""
    pieces = [window * (i + 1) // _SEGMENTS - window * i // _SEGMENTS for i in range(_SEGMENTS)]
    durations: list[list[float]] = [[] for _ in contenders]
    for contender in contenders:
        contender.run(max(pieces))
    for turn in range(rounds):
        totals = [0.0] * len(contenders)
        for contender in contenders:
            contender.restart()
        for i, steps in enumerate(pieces):
            order = list(range(len(contenders)))
            for which in order if (turn + i) % 2 == 0 else reversed(order):
                totals[which] += contenders[which].run(steps) * steps
        for times, total in zip(durations, totals, strict=True):
            times.append(total / window)
    return durations


def build(args: argparse.Namespace) -> MegaForCausalLM:
    """Our model as it is initialised, fp32, in eval mode."""
    config = MegaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, num_hidden_layers=args.layers,
        intermediate_size=args.values, nffn_hidden_size=2 * args.hidden, ema_projection_size=args.states,
        shared_representation_size=args.shared, is_decoder=True, bidirectional=False, use_chunking=True,
        chunk_size=args.chunk, attention_activation=args.activation, normalization_type="layernorm",
        relative_positional_bias="rotary", add_token_type_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    return MegaForCausalLM(config).eval()


def run_against(args: argparse.Namespace) -> None:
    """Measure, check, print.

    Args:
        args: the command line.

    Raises:
        ValueError: a context is shorter than half a chunk or not among ours, or a contender's decoding is not right.
    """
    contexts, model = sorted(set(args.contexts)), build(args)
    if contexts[0] <= args.chunk // 2 or args.peer_context <= args.chunk // 2:
        raise ValueError(f"windows of --chunk {args.chunk} are centred: contexts must exceed {args.chunk // 2} tokens")
    if args.peer_context not in contexts:
        raise ValueError(f"--peer-context {args.peer_context} is not among --contexts {contexts}: add it")
    ours = our_steps(model, contexts, args.chunk, args.seed)
    at_peers = contexts.index(args.peer_context)
    sizes = {name: getattr(args, name) for name in ("vocabulary", "hidden", "layers", "states", "shared", "values")}
    sizes |= {"feed_forward": 2 * args.hidden, "seed": args.seed, "parameters": ours[0].parameters}
    sizes["start"] = args.peer_context - args.chunk // 2
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        peers = [("Llama, sdpa", "llama", sys.executable)]
        peers += [("Mega, unchunked", "mega", args.peer_python)] if args.peer_python else []
        theirs = []
        for label, kind, python in peers:
            theirs.append(TheirStep(label, kind, python, sizes, args.threads, Path(name), args.peer_context))
            stack.callback(theirs[-1].worker.close)
        contenders: list[Contender] = [*ours, *theirs]
        errors = [contender.error() for contender in contenders]
        for contender, error in zip(contenders, errors, strict=True):
            if not error <= TOLERANCE:  # so that NaN fails
                raise ValueError(f"{contender.name} is not timed: decoded logits are off by {error:.1e} of the largest")
        durations = time_in_turns(contenders, args.chunk, args.repeats)
    medians = [statistics.median(times) for times in durations]
    report: dict[str, Any] = {
        "benchmark": "decode against peers",
        "sizes": sizes | {"chunk": args.chunk, "activation": args.activation, "threads": args.threads},
        "hardware": hardware(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "contenders": [
            {"name": c.name, "context": c.context, "parameters": c.parameters, "error": e, "ms": t, "median_ms": m}
            for c, e, t, m in zip(contenders, errors, durations, medians, strict=True)
        ],
        "slowest_over_fastest_context": max(medians[: len(ours)]) / min(medians[: len(ours)]),
        # Of windows of one round, which met the same load.
        "times_as_fast_as": {
            c.name: statistics.median(t / o for t, o in zip(times, durations[at_peers], strict=True))
            for c, times in zip(contenders[len(ours) :], durations[len(ours) :], strict=True)
        },
    }
    _print(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _print(report: dict[str, Any]) -> None:
    print(
        f"Greedy decoding, fp32, B=1, windows of one chunk about each context, in turns: {report['sizes']}.\n"
        f"Machine: {report['hardware']}. Versions: {report['versions']}.\n\n"
        "| | parameters | median ms/token | min | max | largest error |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for row in report["contenders"]:
        times = f"{row['median_ms']:.3f} | {min(row['ms']):.3f} | {max(row['ms']):.3f}"
        print(f"| {row['name']} | {row['parameters']:,} | {times} | {row['error']:.1e} |")
    print(f"\nOurs, slowest context over fastest: {report['slowest_over_fastest_context']:.3f}.")
    for name, ratio in report["times_as_fast_as"].items():
        print(f"Ours is {ratio:.2f} times as fast as {name}.")
