"""The `loader`, `prepare` and `reset` commands: text to tokens, tokens to batches, and documents kept apart."""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import torch
from torch import Tensor

from mega_scale import MegaForCausalLM
from mega_scale.data import DataConfig, Loader, PackedDataset, load_tokenizer
from mega_scale.data.config import Packing, PackingOrder
from mega_scale.data.prepare import Preparation
from mega_scale.data.prepare import run as prepare
from mega_scale.data.sources import Tally
from mega_scale.data.tokenizer import train_bpe
from mega_scale.data.tokens import PreparedManifest, ShardRecord, open_part, read_manifest, write_manifest

from .harness import Command, Option, Worker, in_turns, milliseconds, report, resident, spread, table
from .ours import model_config

_DOCUMENT = 1000  # tokens
_MIB = 2**20
_CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
_VOCABULARY = 512  # of `reset`
LOADER = {
    "megabytes": Option([10, 5000], "sizes of token files, MB"),
    "length": Option(2048, "tokens a sequence"),
    "batch": Option(8, "sequences a step"),
    "steps": Option(2000, "that are timed"),
    "packing": Option("concat", "as data.packing", get_args(Packing)),
    "packing-order": Option("in_order", "as data.packing_order", get_args(PackingOrder)),
    "workers": Option(0, "processes that read ahead", least=0),
    "model-rate": Option(20_000.0, "tokens/s that the model to feed consumes"),
}
PREPARE = {
    "megabytes": Option(200, "text to tokenise, MB"),
    "vocab-size": Option(16_000, "of the BPE tokenizer trained for it"),
    "shard-mb": Option(16, "text of one shard, MB"),
}
RESET = {
    "batch": Option(4, "sequences"),
    "length": Option(2048, "tokens a sequence"),
    "chunk": Option(256, "tokens a chunk"),
    "hidden": Option(512, "channels D; values, feed-forward 2 D, keys D / 4"),
    "layers": Option(2, "blocks"),
    "states": Option(16, "moving averages per channel"),
    "document": Option([100, 500, 2000], "mean length, tokens"),
    "activation": Option("softmax", "of attention", ["softmax", "laplace", "relu2"]),
    "clock": Option("cpu", "wall time, or this process's CPU time, which waits for no other", list(_CLOCKS)),
    "seed": Option(0, "of weights, tokens and documents", least=0),
}


def run_loader(args: argparse.Namespace) -> None:
    """Prepared data to batches, and what memory that takes; each size in a process of its own."""
    found = []
    options = {
        name: getattr(args, name) for name in ("length", "batch", "steps", "packing", "packing_order", "workers")
    }
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes:
            place = Path(folder) / str(megabytes)
            write_sparse(place, megabytes)
            arguments = {"folder": str(place), "options": options}
            with Worker("data:Reading", arguments, name=f"loader of {megabytes} MB", threads=args.threads) as worker:
                found.append({"megabytes": megabytes, **worker.call("measure")})
    rows = []
    for reading in found:
        rate = reading["tokens_per_second"]
        cells = [f"{rate / 1e6:.1f}", f"{rate / args.model_rate:.0f}", f"{reading['memory'] / _MIB:.1f}"]
        rows.append([reading["megabytes"], *cells])
    text = (
        f"Prepared data (uint16, documents of {_DOCUMENT} tokens) to batches of {args.batch} x {args.length}, "
        f"shuffled, packing {args.packing} {args.packing_order}, {args.workers} workers, {args.steps} steps; each "
        "size in a process of its own."
    )
    head = ["MB of tokens", "million tokens/s", f"times {args.model_rate:,.0f} tokens/s", "memory added, MiB"]
    report(args, [text, table(head, rows)], {"readings": found})


def write_sparse(folder: Path, megabytes: int) -> None:
    """Make a folder of prepared data whose tokens are all 0 and take no room on disk."""
    folder.mkdir()
    documents = megabytes * 10**6 // (2 * _DOCUMENT)
    with (folder / "train-00000.tokens").open("wb") as file:
        file.truncate(documents * _DOCUMENT * 2)
    for suffix in ("ends", "text_ends"):
        (np.arange(1, documents + 1, dtype="<i8") * _DOCUMENT).tofile(folder / f"train-00000.{suffix}")
    record = ShardRecord("train-00000", documents * _DOCUMENT, documents, documents * _DOCUMENT, {})
    write_manifest(folder, PreparedManifest("", "", "<u2", {"train": [record]}, Tally()))


class Reading:
    """Reads a folder of prepared data as a run does; in a worker, whose memory nothing else has used."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        self._folder, self._options = Path(folder), options

    def measure(self) -> dict[str, float]:
        """Tokens per second, and bytes that the process holds at most, more than before."""
        before = most = resident("VmRSS")
        batch, length, steps = (self._options[name] for name in ("batch", "length", "steps"))
        store = open_part(self._folder, read_manifest(self._folder), "train")
        loader = Loader(
            PackedDataset(store, length, self._options["packing"], order=self._options["packing_order"]),
            global_batch_size=batch,
            micro_batch_size=batch,
            rank=0,
            world_size=1,
            workers=self._options["workers"],
        )
        loader.batches(0)
        began = time.perf_counter()
        for step in range(1, steps + 1):
            loader.batches(step)
            if step % 10 == 0:
                most = max(most, resident("VmRSS"))
        seconds = time.perf_counter() - began
        loader.close()
        return {"tokens_per_second": steps * batch * length / seconds, "memory": most - before}


def run_prepare(args: argparse.Namespace) -> None:
    """MB/s of one core against `datasets.map`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        size = write_corpus(text, args.megabytes * 10**6)
        with text.open(encoding="utf-8") as file:
            sample = [json.loads(line)["text"] for line in itertools.islice(file, 1000)]
        train_bpe(sample, args.vocab_size).save_pretrained(folder / "tokenizer")
        config = DataConfig("json", [str(text)], tokenizer=str(folder / "tokenizer"))
        tokenizer = load_tokenizer(config.tokenizer)
        rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder / "arrow"))
        options: dict[str, Any] = {"batched": True, "remove_columns": ["text"], "load_from_cache_file": False}

        def ours() -> None:
            shutil.rmtree(folder / "prepared", ignore_errors=True)
            preparation = Preparation(folder / "prepared", config, tokenizer, shard_bytes=args.shard_mb * 10**6)
            for _ in prepare(preparation, 1, config.max_bad_share):
                pass
            preparation.finish()

        def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"input_ids": tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]}

        contenders: dict[str, Callable[[], float]] = {
            "launch/prepare.py": partial(milliseconds, ours),
            "datasets.map": partial(milliseconds, lambda: rows.map(tokenise, **options)),
        }
        times = in_turns(contenders, args.repeats, args.warmup)
    lines = [[name, f"{min(each) / 1e3:.1f}", f"{size / 1e3 / min(each):.2f}"] for name, each in times.items()]
    words = f"{size / 1e6:.0f} MB of Python sources and documentation, BPE of {args.vocab_size} ids, one process each."
    report(args, [words, table(["", "seconds", "MB/s"], lines)], {"bytes": size, "milliseconds": times})


def write_corpus(path: Path, size: int) -> int:
    """Write real text of this machine as jsonl, over again where there is too little; the bytes of text."""
    roots = [Path(os.__file__).parent, *(Path(place) for place in sys.path if place.endswith("site-packages"))]
    patterns = ("*.py", "*.md", "*.rst", "*.txt")
    files = sorted({file for root in roots for pattern in patterns for file in root.rglob(pattern)})
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for copy, file in ((copy, file) for copy in itertools.count() for file in files):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                text = f"{copy}\n{file.read_text(encoding='utf-8')}"
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
            if written >= size:
                break
    return written


def run_reset(args: argparse.Namespace) -> None:
    """Forward and backward of a model, documents kept apart against concatenated ones.

    Raises:
        ValueError: a document changes with those before it.
    """
    torch.manual_seed(args.seed)
    sizes = {"vocabulary": _VOCABULARY, "hidden": args.hidden, "layers": args.layers, "shared": args.hidden // 4}
    sizes |= {"expanded": 2 * args.hidden, "averages": args.states, "chunk": args.chunk}
    model = MegaForCausalLM(model_config(sizes, attention_activation=args.activation)).train()
    tokens = torch.randint(3, _VOCABULARY, (args.batch, args.length + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(starts: Tensor | None) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=inputs, shift_labels=labels, document_starts=starts, use_cache=False).loss.backward()

    clock = _CLOCKS[args.clock]
    contenders: dict[str, Callable[[], float]] = {"concat": partial(milliseconds, partial(step, None), clock)}
    mixed = {}
    for mean in args.document:
        starts = documents(args.batch, args.length, mean, args.seed)
        _require_apart(model, inputs, starts)
        name = f"reset, {mean} tokens"
        chunks = starts.unflatten(1, (-1, min(args.chunk, args.length)))
        mixed[name] = float(chunks[..., 1:].any(-1).float().mean())
        contenders[name] = partial(milliseconds, partial(step, starts), clock)
    times = in_turns(contenders, args.repeats, args.warmup)
    # Turn by turn, so that a load that comes and goes meets both.
    costs = {
        name: statistics.median(a / b for a, b in zip(times[name], times["concat"], strict=True)) - 1 for name in mixed
    }
    rows = [
        [name, *spread(each, 0), *([f"{costs[name]:+.1%}", f"{mixed[name]:.0%}"] if name in costs else ["", ""])]
        for name, each in times.items()
    ]
    text = (
        f"Forward and backward of {args.layers} blocks, D {args.hidden}, N {args.states}, {args.activation}, "
        f"{args.batch} x {args.length} tokens, chunk {args.chunk}, fp32, {args.threads} CPU thread(s), {args.repeats} "
        f"repeats after {args.warmup} for warm-up, in turns. Lengths of documents are log-normal. Times are "
        f"{args.clock} times of this process; cost is the median over turns of the time over that of concat in the "
        "same turn."
    )
    head = ["documents", "median ms", "min", "max", "cost over concat", "chunks with several"]
    report(args, [text, table(head, rows)], {"milliseconds": times, "cost": costs, "mixed": mixed})


def documents(batch: int, length: int, mean: int, seed: int) -> Tensor:
    """Where documents start in rows cut from one long text, (batch, length) bool; lengths are log-normal."""
    generator = torch.Generator().manual_seed(seed)
    count = 4 * batch * length // mean + 100
    drawn = torch.randn(count, generator=generator).exp() * (mean / math.exp(0.5))
    places = drawn.clamp(min=1).long().cumsum(0)
    starts = torch.zeros(batch * length, dtype=torch.bool)
    starts[places[places < len(starts)]] = True
    return starts.view(batch, length)


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


COMMANDS = {
    "loader": Command(LOADER, run_loader),
    "prepare": Command(
        PREPARE, run_prepare, repeats=1, replaced={"--processes": "tests/data/test_prepare.py kills a preparation"}
    ),
    "reset": Command(RESET, run_reset, repeats=15, warmup=2),
}
