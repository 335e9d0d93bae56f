"""The `decode` sub-command of benchmark.py: whether decoding stays as fast, and its cache as small, as a text grows.

Legend: B batch, T tokens, P checked positions, V vocabulary.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.decode_against import run_against
from launch.machine import hardware
from mega_scale import MegaCache, MegaConfig, MegaForCausalLM

TOLERANCE = 1e-4
_CHECKED = 64
_SEGMENTS = 8


class Place(NamedTuple):
    """Where decoding stands after a number of tokens.

    Args:
        position: tokens read.
        cache: of those tokens; a copy of its own.
        token: the next one, (B, 1) int64.
    """

    position: int
    cache: MegaCache
    token: Tensor

    def copy(self) -> "Place":
        """The same place with a cache of its own."""
        return Place(self.position, copy.deepcopy(self.cache), self.token)


class Decoded(NamedTuple):
    """What decoding a text left behind.

    Args:
        tokens: all of them, (B, T) int64.
        logits: those of the checked positions, (B, P, V).
        places: where each window begins.
    """

    tokens: Tensor
    logits: Tensor
    places: list[Place]


def add_decode_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Declare the options of the sub-command, but for those that all sub-commands share.

    Args:
        command: the parser of the sub-command.
        positive: reads an integer of at least 1.
    """
    sizes = {
        "tokens": (16384, "length of the text, the first token included"),
        "window": (1024, "tokens timed after the first chunk, and at the end"),
        "chunk": (128, "attention chunk, tokens"),
        "batch": (1, "sequences"),
        "hidden": (64, "channels D"),
        "layers": (2, "blocks"),
        "shared": (32, "width Z of queries and keys"),
        "values": (128, "width E of values"),
        "states": (16, "moving averages per channel N"),
        "vocabulary": (256, "number of token ids"),
    }
    for name, (default, text) in sizes.items():
        command.add_argument(f"--{name}", type=positive, default=default, help=text)
    activations = ["softmax", "laplace", "relu2"]
    command.add_argument("--activation", default="softmax", choices=activations, help="of attention")
    command.add_argument("--seed", type=int, default=0, help="of the model's weights")
    text = "instead of one text: tokens of context at which our step is compared, with each other and with a Llama"
    command.add_argument("--contexts", type=positive, nargs="+", default=None, help=text)
    command.add_argument("--peer-context", type=positive, default=2048, help="tokens of context of the other models")
    text = "interpreter with transformers 4.37.2, whose Mega is then compared too; with --contexts"
    command.add_argument("--peer-python", default=None, help=text)


def build_model(args: argparse.Namespace) -> MegaForCausalLM:
    """A chunked decoder with weights drawn from a seed.

    Args:
        args: the command line.

    Returns:
        The model in eval mode, fp32.
    """
    config = MegaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, num_hidden_layers=args.layers,
        intermediate_size=args.values, nffn_hidden_size=2 * args.hidden, ema_projection_size=args.states,
        shared_representation_size=args.shared, is_decoder=True, bidirectional=False, use_chunking=True,
        chunk_size=args.chunk, attention_activation=args.activation, normalization_type="layernorm",
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = MegaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # so that the text depends on what came before
    return model


def formula_bytes(config: MegaConfig, batch: int, element_size: int) -> int:
    """Bytes of the cache of a chunked model by the README's formula, `layers batch (4 D N + element C (Z + E))`.

    Args:
        config: of the model.
        batch: sequences.
        element_size: of keys and values, bytes.
    """
    averages = 4 * config.hidden_size * config.ema_projection_size
    widths = config.shared_representation_size + config.intermediate_size
    return config.num_hidden_layers * batch * (averages + element_size * config.chunk_size * widths)


@torch.no_grad()
def decode(model: MegaForCausalLM, batch: int, length: int, starts: Sequence[int], checked: Tensor) -> Decoded:
    """Decode greedily token by token, keeping the cache wherever a window begins.

    Args:
        model: the decoder.
        batch: sequences.
        length: T, tokens.
        starts: positions where windows begin, tokens.
        checked: positions whose logits are kept, ascending, (P,) int64.

    Raises:
        ValueError: the cache's size differs from the formula at some position.
    """
    expected = formula_bytes(model.config, batch, model.dtype.itemsize)
    wanted, token, cache = set(checked.tolist()), torch.arange(3, 3 + batch)[:, None], None
    tokens, logits, places = [], [], []
    for position in range(length):
        if position in starts and cache is not None:
            places.append(Place(position, cache, token).copy())
        out = model(token, past_key_values=cache, use_cache=True)
        tokens.append(token)
        cache, token = out.past_key_values, out.logits.argmax(-1)
        if cache.nbytes != expected:
            raise ValueError(f"the cache holds {cache.nbytes} bytes after {position + 1} tokens, expected {expected}")
        if position in wanted:
            logits.append(out.logits)
    return Decoded(torch.cat(tokens, 1), torch.cat(logits, 1), places)


@torch.no_grad()
def logit_error(model: MegaForCausalLM, decoded: Decoded, checked: Tensor) -> float:
    """Compare decoded logits with one forward over the whole text.

    Args:
        model: the decoder.
        decoded: what `decode` returned.
        checked: the positions of its logits, (P,) int64.

    Returns:
        Largest difference, relative to the largest logit.

    Raises:
        ValueError: it exceeds TOLERANCE; names the first such position.
    """
    truth = model(decoded.tokens, use_cache=False, logits_to_keep=checked).logits
    errors = (decoded.logits - truth).abs().amax((0, 2)) / truth.abs().max()
    wrong = ~(errors <= TOLERANCE)  # so that NaN is wrong
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"nothing is timed: decoded logits differ from the full forward by {errors[first]:.1e} of the largest "
            f"logit at position {int(checked[first])}; {TOLERANCE:.0e} is allowed"
        )
    return float(errors.max())


@torch.no_grad()
def time_steps(model: MegaForCausalLM, place: Place, steps: int) -> tuple[Place, float]:
    """Decode on from a place.

    Args:
        model: the decoder.
        place: where to start; its cache is used up.
        steps: tokens.

    Returns:
        The place reached, and milliseconds per token.
    """
    position, cache, token = place
    start = time.perf_counter()
    for _ in range(steps):
        token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
    return Place(position + steps, cache, token), 1e3 * (time.perf_counter() - start) / steps


def time_windows(model: MegaForCausalLM, places: Sequence[Place], window: int, rounds: int) -> list[list[float]]:
    """Time all windows in turns, a short segment of one after a segment of the other, so that load meets all alike.

    Args:
        model: the decoder.
        places: where the windows begin.
        window: tokens of each.
        rounds: how often each is decoded.

    Returns:
        For each window its segments' milliseconds per token.
    """
    durations: list[list[float]] = [[] for _ in places]
    for turn in range(rounds):
        now = [place.copy() for place in places]
        for segment in range(_SEGMENTS):
            steps = window * (segment + 1) // _SEGMENTS - window * segment // _SEGMENTS
            order = range(len(now)) if (turn + segment) % 2 == 0 else reversed(range(len(now)))
            for i in order if steps else ():
                now[i], milliseconds = time_steps(model, now[i], steps)
                durations[i].append(milliseconds)
    return durations


class Report(NamedTuple):
    """What the `decode` sub-command found.

    Args:
        windows: first and last position of each, tokens.
        milliseconds: per token, of every segment of each window.
        held: bytes of the cache at the beginning of each window.
        formula: bytes that the README's formula gives.
        error: of decoded logits against the full forward, relative to the largest logit.
        checked: number of positions where they were compared.
    """

    windows: list[tuple[int, int]]
    milliseconds: list[list[float]]
    held: list[int]
    formula: int
    error: float
    checked: int

    @property
    def medians(self) -> list[float]:
        """Milliseconds per token of each window."""
        return [statistics.median(times) for times in self.milliseconds]

    @property
    def ratio(self) -> float:
        """Time per token of the last window over that of the first."""
        return self.medians[-1] / self.medians[0]

    def lines(self) -> list[str]:
        """The report as text."""
        rows = [
            f"Checked before: logits at {self.checked} positions equal those of one full forward, largest error "
            f"{self.error:.1e} of the largest logit.",
            "",
            "| tokens | median ms/token | min | max | cache bytes |",
            "| --- | --- | --- | --- | --- |",
        ]
        for (first, last), times, held in zip(self.windows, self.milliseconds, self.held, strict=True):
            middle = statistics.median(times)
            rows.append(f"| {first} to {last} | {middle:.4f} | {min(times):.4f} | {max(times):.4f} | {held} |")
        return [
            *rows,
            "",
            f"Time per token, last window over first: {self.ratio:.3f}.",
            f"Formula: layers * batch * (4*D*N + element_size*C*(Z+E)) = {self.formula} bytes.",
        ]


def measure(args: argparse.Namespace) -> Report:
    """Decode a text, check it, and time its first and last window.

    Args:
        args: the command line.

    Raises:
        ValueError: windows overlap, cached and full logits differ, or the cache's size is not the formula's.
    """
    if args.tokens < args.chunk + 2 * args.window:
        raise ValueError(
            f"--tokens {args.tokens} must hold a chunk of {args.chunk} and two windows of {args.window} tokens: "
            f"pass --tokens {args.chunk + 2 * args.window} or more"
        )
    model = build_model(args)
    starts = [args.chunk, args.tokens - args.window]
    drawn = torch.randint(args.tokens, (_CHECKED,), generator=torch.Generator().manual_seed(args.seed))
    checked = torch.cat([drawn, torch.tensor([0, args.chunk - 1, args.chunk, args.tokens - 1])]).unique()
    decoded = decode(model, args.batch, args.tokens, starts, checked)
    error = logit_error(model, decoded, checked)
    held = [place.cache.nbytes for place in decoded.places]
    time_windows(model, decoded.places, args.window, args.warmup)
    return Report(
        windows=[(start, start + args.window - 1) for start in starts],
        milliseconds=time_windows(model, decoded.places, args.window, args.repeats),
        held=held,
        formula=formula_bytes(model.config, args.batch, model.dtype.itemsize),
        error=error,
        checked=len(checked),
    )


def run_decode(args: argparse.Namespace) -> None:
    """The `decode` sub-command: measure and print.

    Args:
        args: the command line.
    """
    if args.contexts:
        run_against(args)
        return
    report = measure(args)
    sizes = {name: value for name, value in vars(args).items() if isinstance(value, (int, str)) and name != "json"}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    head = f"Greedy decoding, fp32, windows in turns: {', '.join(f'{name} {value}' for name, value in sizes.items())}."
    machine = f"Machine: {hardware()}. Versions: {', '.join(' '.join(version) for version in versions.items())}."
    print(head, machine, *report.lines(), sep="\n")
    if args.json:
        content: dict[str, Any] = {"benchmark": "decode", "sizes": sizes, "hardware": hardware(), "versions": versions}
        content |= {**report._asdict(), "median_ms": report.medians, "last_over_first": report.ratio}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
