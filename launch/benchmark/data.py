"""The `loader`, `prepare` and `reset` commands: text to tokens, tokens to batches, and documents kept apart."""

import argparse
import itertools
import json
import math
import os
import shutil
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

from mega_scale import MegaConfig, MegaForCausalLM
from mega_scale.data import DataConfig, Loader, PackedDataset, load_tokenizer
from mega_scale.data.config import Packing, PackingOrder
from mega_scale.data.prepare import Preparation
from mega_scale.data.prepare import run as prepare
from mega_scale.data.sources import Tally, stdlib_documents
from mega_scale.data.tokenizer import train_bpe
from mega_scale.data.tokens import PreparedManifest, ShardRecord, open_part, read_manifest, write_manifest

from . import harness
from .harness import Option, common
from .peers import mega_arguments

_DOCUMENT = 1000  # tokens
_CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
_VOCABULARY = 512  # of `reset`
LOADER = common(length=2048, batch=8) | {
    "megabytes": Option([10, 5000], "sizes of token files, MB"),
    "steps": Option(2000, "that are timed"),
    "packing": Option("concat", "as data.packing", get_args(Packing)),
    "packing-order": Option("in_order", "as data.packing_order", get_args(PackingOrder)),
    "workers": Option(0, "processes that read ahead", least=0),
}
PREPARE = common(repeats=1, warmup=0) | {
    "megabytes": Option(200, "text to tokenise, MB"),
    "vocab-size": Option(16_000, "of the BPE tokenizer trained for it"),
    "shard-mb": Option(16, "text of one shard, MB"),
}
RESET = common(batch=4, length=2048, layers=2, states=16, chunk=256, activation="softmax", seed=0) | {
    **common(repeats=15, warmup=2),
    "hidden": Option(512, "channels D; values, feed-forward 2 D, keys D / 4"),
    "document": Option([100, 500, 2000], "mean length, tokens"),
    "clock": Option("cpu", "wall time, or this process's CPU time, which waits for no other", list(_CLOCKS)),
}


def run_loader(args: argparse.Namespace) -> None:
    """Prepared data to batches, and what memory that takes; each size in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes:
            place = Path(folder) / str(megabytes)
            write_sparse(place, megabytes)
            sizes = (args.length, args.batch, args.steps, args.packing, args.packing_order, args.workers)
            with harness.worker("data", name=f"loader of {megabytes} MB") as call:
                rate, memory = call("read", str(place), *sizes)
            row = {"megabytes": megabytes, "tokens_per_second": rate, "memory": memory}
            rows.append({**row, "rate": rate / 1e6, "memory_mib": memory / 2**20})
    columns = {
        "MB of tokens": "{megabytes}", "million tokens/s": "{rate:.1f}", "memory added, MiB": "{memory_mib:.1f}",
    }  # fmt: skip
    harness.report(args, columns, rows, f"uint16, documents of {_DOCUMENT} tokens, shuffled; a process for each size.")


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


def read(
    folder: str, length: int, batch: int, steps: int, packing: Packing, order: PackingOrder, workers: int
) -> tuple[float, int]:
    """Tokens per second of a run that reads prepared data, and the most bytes by which that grows the process."""
    before = most = harness.resident("VmRSS")
    store = open_part(Path(folder), read_manifest(Path(folder)), "train")
    packed = PackedDataset(store, length, packing, order=order)
    loader = Loader(packed, global_batch_size=batch, micro_batch_size=batch, rank=0, world_size=1, workers=workers)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        loader.batches(step)
        if step % 10 == 0:
            most = max(most, harness.resident("VmRSS"))
    seconds = time.perf_counter() - began
    loader.close()
    return steps * batch * length / seconds, most - before


def run_prepare(args: argparse.Namespace) -> None:
    """MB/s of one core against `datasets.map`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        documents, size = [document for document in stdlib_documents() if document], 0
        with text.open("w", encoding="utf-8") as out:
            for document in itertools.cycle(documents):
                out.write(json.dumps({"text": f"{size}\n{document}"}) + "\n")
                size += len(document.encode())
                if size >= args.megabytes * 10**6:
                    break
        train_bpe(documents[:1000], args.vocab_size).save_pretrained(folder / "tokenizer")
        config = DataConfig("json", [str(text)], tokenizer=str(folder / "tokenizer"))
        tokenizer = load_tokenizer(config.tokenizer)
        texts = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder / "arrow"))
        options: dict[str, Any] = {"batched": True, "remove_columns": ["text"], "load_from_cache_file": False}

        def ours() -> None:
            shutil.rmtree(folder / "prepared", ignore_errors=True)
            preparation = Preparation(folder / "prepared", config, tokenizer, shard_bytes=args.shard_mb * 10**6)
            for _ in prepare(preparation, 1):
                pass
            preparation.finish()

        def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"input_ids": tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]}

        runs = {"launch/prepare.py": ours, "datasets.map": lambda: texts.map(tokenise, **options)}
        contenders = {name: partial(harness.milliseconds, run) for name, run in runs.items()}
        rows = harness.timed_rows(harness.in_turns(contenders, args.repeats, args.warmup))
    for row in rows:
        row |= {"seconds": row["least"] / 1e3, "rate": size / 1e3 / row["least"]}
    note = f"{size / 1e6:.0f} MB of Python sources and documentation, one process each."
    columns = {"": "{name}", "seconds": "{seconds:.1f}", "MB/s": "{rate:.2f}"}
    harness.report(args, columns, rows, note, bytes=size)


def run_reset(args: argparse.Namespace) -> None:
    """Forward and backward of a model, documents kept apart against concatenated ones.

    Raises ValueError where a document changes with those before it.
    """
    torch.manual_seed(args.seed)
    sizes = harness.integers(args) | {"vocabulary": _VOCABULARY, "shared": args.hidden // 4, "values": 2 * args.hidden}
    model = MegaForCausalLM(MegaConfig(**mega_arguments(sizes), attention_activation=args.activation)).train()
    tokens = torch.randint(3, _VOCABULARY, (args.batch, args.length + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(starts: Tensor | None) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=inputs, shift_labels=labels, document_starts=starts, use_cache=False).loss.backward()

    clock = _CLOCKS[args.clock]
    contenders: dict[str, Callable[[], float]] = {"concat": partial(harness.milliseconds, partial(step, None), clock)}
    mixed = {}
    for mean in args.document:
        starts = documents(args.batch, args.length, mean, args.seed)
        earlier = starts.flip(1).cumsum(1).flip(1) > starts.long()  # tokens before their row's last document
        with torch.no_grad():
            one, two = (
                model(input_ids=ids, document_starts=starts, use_cache=False, output_hidden_states=True).hidden_states
                for ids in (inputs, torch.where(earlier, inputs.flip(1), inputs))
            )
        if not torch.equal(one[-1][~earlier], two[-1][~earlier]):
            raise ValueError("reset is not timed: a document changes with those before it")
        name = f"reset, {mean} tokens"
        chunks = starts.unflatten(1, (-1, min(args.chunk, args.length)))
        mixed[name] = float(chunks[..., 1:].any(-1).float().mean())
        contenders[name] = partial(harness.milliseconds, partial(step, starts), clock)
    rows = harness.timed_rows(harness.in_turns(contenders, args.repeats, args.warmup))
    for row in rows[1:]:
        row |= {"cost": row["ratio"] - 1, "mixed": mixed[row["name"]]}
    columns = {
        "documents": "{name}", "median ms": "{median:.0f}", "min": "{least:.0f}", "max": "{greatest:.0f}",
        "cost over concat": "{cost:+.1%}", "chunks with several": "{mixed:.0%}",
    }  # fmt: skip
    harness.report(args, columns, rows, "Forward and backward, fp32; lengths of documents are log-normal.")


def documents(batch: int, length: int, mean: int, seed: int) -> Tensor:
    """Where documents start in rows cut from one long text, (batch, length) bool; lengths are log-normal."""
    generator = torch.Generator().manual_seed(seed)
    count = 4 * batch * length // mean + 100
    drawn = torch.randn(count, generator=generator).exp() * (mean / math.exp(0.5))
    places = drawn.clamp(min=1).long().cumsum(0)
    starts = torch.zeros(batch * length, dtype=torch.bool)
    starts[places[places < len(starts)]] = True
    return starts.view(batch, length)
