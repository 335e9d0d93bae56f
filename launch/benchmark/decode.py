"""The `decode` command: whether decoding stays as fast, and its cache as small, as a text grows.

Every contender decodes a window as long as our chunk, centred on its context: ours meets every place of a chunk, and
a model whose cache grows has the named context on average.
"""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mega_scale import MegaCache, MegaConfig, MegaForCausalLM, MegalodonConfig, MegalodonForCausalLM, MegaStaticCache

from . import harness
from .harness import Option, common
from .ours import megalodon_config
from .peers import PEERS, Decoding, mega_arguments

TOLERANCE = 1e-3
_CHECKED = 16  # tokens of a window whose logits are compared
_PREFILL = 8192
DECODE = common(chunk=128, hidden=64, layers=2, shared=32, values=128, states=16, vocabulary=256) | {
    "contexts": Option([1024, 2048, 16384], "tokens of context at which our step is timed"),
    "megalodon": Option(False, "also time our Megalodon of as many parameters"),
    "static": Option(False, "also time our compiled step with a static cache, after the first of --contexts"),
    "peer-context": Option(2048, "tokens of context of the other models, one of --contexts"),
    **common(activation="softmax", seed=0, peer_python=None, repeats=5, warmup=1),
}


def cache_bytes(config: MegaConfig | MegalodonConfig, element_size: int) -> int:
    """Bytes of a chunked model's cache of one sequence by README.md's formula; keys have `element_size` bytes."""
    averages = 4 * config.hidden_size * config.ema_projection_size
    widths = config.shared_representation_size + config.intermediate_size
    keys, layers = element_size * config.chunk_size * widths, config.num_hidden_layers
    if isinstance(config, MegaConfig):
        return layers * (averages + keys)
    moments = 8 * config.timestep_norm_groups + 8  # mean and variance of every group, and the number of tokens
    return layers * (2 * averages + moments + keys) + moments


class StaticDecoding(Decoding):
    """The same text's end, decoded by one compiled step with a static cache."""

    def __init__(self, model: Any, cache: MegaCache, token: Tensor) -> None:
        super().__init__(model, cache, token)
        self._static, self._compiled = MegaStaticCache(model.config), torch.compile(model, fullgraph=True)

    def _restart(self) -> None:
        self._static.fill(self._past)
        self._cache, self._token = self._static, self._first

    def _forward(self, tokens: Tensor, cache: Any) -> Any:
        return (self._compiled if cache is self._static else self.model)(tokens, past_key_values=cache, use_cache=True)


class _Operators(TorchDispatchMode):
    """Counts what PyTorch dispatches, but for views: on a GPU, launches."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def operators(decoding: Decoding) -> int:
    """Operators of one of its steps, views left out."""
    decoding._restart()
    with _Operators() as counted:
        decoding._step()
    return counted.count


def static_window(window: Decoding) -> tuple[StaticDecoding, str]:
    """The window with a static cache, and how many graphs, kernels and library calls its steps were compiled to."""
    import torch._dynamo
    import torch._inductor.metrics as compiled

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.reset()
    static = StaticDecoding(window.model, window._past, window._first)
    static.run(2 * window.model.config.chunk_size + 1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    calls = torch._dynamo.utils.counters["inductor"]["extern_calls"]
    return static, (
        f"{operators(window)} operators a token; with a static cache, over two chunks, {graphs} graph of "
        f"{compiled.generated_kernel_count} kernels and {calls} library calls"
    )


@torch.no_grad()
def our_windows(model: Any, contexts: Sequence[int], window: int, seed: int) -> list[Decoding]:
    """Read one text, and keep the cache where each window of so many tokens begins, about ascending contexts.

    Raises ValueError where the cache's size is not that of the formula.
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
        windows.append(Decoding(model, cache, torch.tensor([[3]])))
    return windows


def run_decode(args: argparse.Namespace) -> None:
    """Check, time and print. Raises ValueError where what is decoded is wrong, or options do not fit."""
    contexts = sorted(set(args.contexts))
    if contexts[0] <= args.chunk // 2:
        raise ValueError(f"windows of --chunk {args.chunk} are centred: contexts must exceed {args.chunk // 2} tokens")
    if args.peer_context not in contexts:
        raise ValueError(f"--peer-context {args.peer_context} is not among --contexts {contexts}: add it")
    sizes = harness.integers(args) | {"feed_forward": 2 * args.hidden, "normalization": "layernorm"}
    torch.manual_seed(args.seed)
    model = MegaForCausalLM(MegaConfig(**mega_arguments(sizes), attention_activation=args.activation)).eval()
    windows = our_windows(model, contexts, args.chunk, args.seed)
    contenders: dict[str, Callable[..., Any]] = {
        f"mega_scale at {context}": window for context, window in zip(contexts, windows, strict=True)
    }
    known = {name: windows[0].describe() for name in contenders}
    notes = []
    if args.static:
        static, counted = static_window(windows[0])
        name = f"mega_scale, static cache at {contexts[0]}"
        contenders[name], known[name] = static, windows[0].describe()
        notes.append(f"Mega: {counted}.")
    if args.megalodon:
        other = MegalodonForCausalLM(megalodon_config(sizes)).eval()
        more = our_windows(other, contexts, args.chunk, args.seed)
        named = {f"mega_scale, Megalodon at {context}": each for context, each in zip(contexts, more, strict=True)}
        contenders |= named
        known |= {name: more[0].describe() for name in named}
        notes.append(f"Megalodon's cache holds {cache_bytes(other.config, other.dtype.itemsize)} bytes.")
        if args.static:
            static, counted = static_window(more[0])
            name = f"mega_scale, Megalodon, static cache at {contexts[0]}"
            contenders[name], known[name] = static, more[0].describe()
            notes.append(f"Megalodon: {counted}.")
    sizes["parameters"] = windows[0].describe()["parameters"]
    arguments = {"sizes": sizes, "start": args.peer_context - args.chunk // 2, "seed": args.seed}
    with contextlib.ExitStack() as stack:
        for kind in ("llama", *(["mega"] if args.peer_python else [])):
            label = "Mega, unchunked" if kind == "mega" else PEERS[kind][0]
            how: Any = {"name": label, "python": args.peer_python if kind == "mega" else None}
            call = stack.enter_context(harness.worker("peers:peer_decoding", {"kind": kind, **arguments}, **how))
            found = call("describe")
            name = f"{label} (transformers {found['transformers']}) at {args.peer_context}"
            contenders[name], known[name] = call, found
        errors = {name: call("error", _CHECKED) for name, call in contenders.items()}
        for name, error in errors.items():
            harness.check_errors(name, {"decoded logits": error}, TOLERANCE)
        runs = {name: partial(call, "run", args.chunk) for name, call in contenders.items()}
        times = harness.in_turns(runs, args.repeats, args.warmup)
    rows = harness.timed_rows(times, beside=f"mega_scale at {args.peer_context}")
    for row in rows:
        row |= {"error": errors[row["name"]], "parameters": known[row["name"]]["parameters"]}
    medians = [row["median"] for row in rows[: len(contexts)]]
    held, growth = cache_bytes(model.config, model.dtype.itemsize), max(medians) / min(medians)
    columns = {
        "": "{name}", "parameters": "{parameters:,}", "median ms/token": "{median:.3f}", "min": "{least:.3f}",
        "max": "{greatest:.3f}", "times ours": "{ratio:.2f}", "largest error": "{error:.1e}",
    }  # fmt: skip
    note = f"Ours, slowest context over fastest: {growth:.3f}; its cache holds {held} bytes at each. {' '.join(notes)}"
    harness.report(args, columns, rows, note, cache_bytes=held, slowest_over_fastest_context=growth)
