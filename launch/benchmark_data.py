"""The `loader` and `prepare` sub-commands of launch/benchmark.py: how fast text becomes tokens, and tokens batches."""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import datasets
import numpy as np
import psutil
from transformers import PreTrainedTokenizerBase

from launch.machine import hardware
from mega_scale.data import DataConfig, Loader, PackedDataset, load_tokenizer
from mega_scale.data.config import Packing, PackingOrder
from mega_scale.data.prepare import Preparation, run
from mega_scale.data.prepared import Manifest, open_part, read_manifest, write_manifest
from mega_scale.data.rows import Tally
from mega_scale.data.token_files import ShardRecord
from mega_scale.data.train_tokenizer import train_bpe

_DOCUMENT = 1000  # tokens
_MIB = 2**20


class Reading(NamedTuple):
    """What reading a prepared file cost.

    Args:
        megabytes: Size of the file of tokens.
        tokens_per_second: Delivered as batches to one process.
        memory: Bytes that the process holds after it, more than before.
    """

    megabytes: int
    tokens_per_second: float
    memory: int


def add_loader_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Declare the options of `loader`."""
    command.add_argument("--megabytes", type=positive, nargs="+", default=[10, 5000], help="sizes of token files, MB")
    command.add_argument("--length", type=positive, default=2048, help="tokens a sequence")
    command.add_argument("--batch", type=positive, default=8, help="sequences a step")
    command.add_argument("--steps", type=positive, default=2000, help="steps that are timed")
    command.add_argument("--packing", choices=get_args(Packing), default="concat", help="as data.packing")
    command.add_argument("--packing-order", choices=get_args(PackingOrder), default="in_order", help="as the data key")
    command.add_argument("--workers", type=int, default=0, help="processes that read ahead")
    command.add_argument("--model-rate", type=float, default=20_000, help="tokens/s that the model to feed consumes")


def run_loader(args: argparse.Namespace) -> None:
    """The `loader` sub-command: prepared data to batches, and what memory that takes."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes:
            place = Path(folder) / str(megabytes)
            write_sparse(place, megabytes)
            found.append(_in_child(measure_loader, place, megabytes, args))
    lines = [
        f"Prepared data (uint16, documents of {_DOCUMENT} tokens) to batches of {args.batch} x {args.length}, "
        f"shuffled, packing {args.packing} {args.packing_order}, {args.workers} workers, {args.steps} steps; each "
        "size in a process of its own.",
        f"Machine: {hardware()}.",
        "",
        f"| MB of tokens | million tokens/s | times {args.model_rate:,.0f} tokens/s | memory added, MiB |",
        "| --- | --- | --- | --- |",
    ]
    for reading in found:
        rate = reading.tokens_per_second
        cells = [
            reading.megabytes,
            f"{rate / 1e6:.1f}",
            f"{rate / args.model_rate:.0f}",
            f"{reading.memory / _MIB:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    print("\n".join(lines))
    _write(args.json, "loader", {"readings": [reading._asdict() for reading in found]})


def write_sparse(folder: Path, megabytes: int) -> None:
    """Make a folder of prepared data whose tokens are all 0 and take no room on disk."""
    folder.mkdir()
    documents = megabytes * 10**6 // (2 * _DOCUMENT)
    with (folder / "train-00000.tokens").open("wb") as file:
        file.truncate(documents * _DOCUMENT * 2)
    for suffix in ("ends", "text_ends"):
        (np.arange(1, documents + 1, dtype="<i8") * _DOCUMENT).tofile(folder / f"train-00000.{suffix}")
    record = ShardRecord("train-00000", documents * _DOCUMENT, documents, documents * _DOCUMENT, {})
    write_manifest(folder, Manifest("", "", "<u2", {"train": [record]}, Tally()))


def measure_loader(folder: Path, megabytes: int, args: argparse.Namespace) -> Reading:
    """Time a loader on a folder of prepared data."""
    before = psutil.Process().memory_info().rss
    store = open_part(folder, read_manifest(folder), "train")
    loader = Loader(
        PackedDataset(store, args.length, args.packing, order=args.packing_order),
        global_batch_size=args.batch,
        micro_batch_size=args.batch,
        rank=0,
        world_size=1,
        workers=args.workers,
    )
    loader.batches(0)
    began = time.perf_counter()
    most = 0
    for step in range(1, args.steps + 1):
        loader.batches(step)
        if step % 10 == 0:
            most = max(most, psutil.Process().memory_info().rss)
    seconds = time.perf_counter() - began
    loader.close()
    return Reading(megabytes, args.steps * args.batch * args.length / seconds, most - before)


def add_prepare_arguments(command: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Declare the options of `prepare`."""
    command.add_argument("--megabytes", type=positive, default=200, help="text to tokenise, MB")
    command.add_argument("--vocab-size", type=positive, default=16_000, help="of the BPE tokenizer trained for it")
    command.add_argument("--shard-mb", type=positive, default=16, help="text of one shard, MB")
    command.add_argument("--processes", type=positive, default=2, help="of the interrupted preparation")


def run_prepare(args: argparse.Namespace) -> None:
    """The `prepare` sub-command: MB/s of one core against `datasets.map`, and the same bytes after a kill."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_corpus(folder / "text.jsonl", args.megabytes * 10**6)
        with (folder / "text.jsonl").open(encoding="utf-8") as file:
            sample = [json.loads(line)["text"] for _, line in zip(range(1000), file, strict=False)]
        train_bpe(sample, args.vocab_size).save_pretrained(folder / "tokenizer")
        config = DataConfig("json", [str(folder / "text.jsonl")], tokenizer=str(folder / "tokenizer"))
        tokenizer = load_tokenizer(config.tokenizer)
        seconds: dict[str, list[float]] = {"launch/prepare.py, 1 process": [], "datasets.map, 1 process": []}
        for i in range(args.repeats):
            seconds["launch/prepare.py, 1 process"].append(
                _timed(_prepare, folder / f"{i}", config, tokenizer, args, 1)
            )
            seconds["datasets.map, 1 process"].append(_timed_map(folder, tokenizer))
        shards = kill_half_way(folder / "killed", config, tokenizer, args)
        _prepare(folder / "killed", config, tokenizer, args, args.processes)
        equal = _contents(folder / "killed") == _contents(folder / "0")
    lines = [
        f"{size / 1e6:.0f} MB of Python sources and documentation, BPE of {args.vocab_size} ids, in turns.",
        f"Machine: {hardware()}.",
        "",
        "|  | seconds | MB/s per core |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {min(times):.1f} | {size / 1e6 / min(times):.2f} |" for name, times in seconds.items()]
    lines += ["", f"Killed after {shards[0]} of {shards[1]} shards, and resumed: files equal to the byte: {equal}."]
    print("\n".join(lines))
    _write(args.json, "prepare", {"bytes": size, "seconds": seconds, "killed_after": shards, "equal": equal})
    if not equal:
        raise ValueError("the resumed preparation gave other files")


def write_corpus(path: Path, size: int) -> int:
    """Write real text of this machine as jsonl, over again where there is too little; the bytes of text."""
    roots = [Path(os.__file__).parent, *(Path(place) for place in sys.path if place.endswith("site-packages"))]
    files = sorted(
        {file for root in roots for pattern in ("*.py", "*.md", "*.rst", "*.txt") for file in root.rglob(pattern)}
    )
    written = copy = 0
    with path.open("w", encoding="utf-8") as out:
        while written < size:
            for text in _texts(files):
                marked = text if copy == 0 else f"{copy}\n{text}"
                out.write(json.dumps({"text": marked}, ensure_ascii=False) + "\n")
                written += len(marked.encode())
                if written >= size:
                    break
            copy += 1
    return written


def kill_half_way(
    folder: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[int, int]:
    """Kill a preparation with all its processes when half its shards are done; shards done, and all of them."""
    process = multiprocessing.get_context("fork").Process(
        target=_prepare, args=(folder, config, tokenizer, args, args.processes)
    )
    process.start()
    total = -(-(Path(config.path[0]).stat().st_size if config.path else 0) // (args.shard_mb * 10**6))
    while len(list(folder.glob("[0-9]*.json"))) < total // 2:
        if process.exitcode is not None:
            raise ValueError("the preparation ended before half of it was done")
        time.sleep(0.01)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.send_signal(signal.SIGKILL)
    process.join()
    return len(list(folder.glob("[0-9]*.json"))), total


def _texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            yield text


def _prepare(
    folder: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, processes: int
) -> None:
    preparation = Preparation(folder, config, tokenizer, shard_bytes=args.shard_mb * 10**6)
    for _ in run(preparation, processes, config.max_bad_share):
        pass
    preparation.finish()


def _timed(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def _timed_map(folder: Path, tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokenise with `datasets.map`; reading the text into Arrow is not counted."""
    cache = folder / "map"
    text = datasets.load_dataset("json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=str(cache))

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]}

    began = time.perf_counter()
    text.map(tokenise, batched=True, remove_columns=["text"], load_from_cache_file=False)
    seconds = time.perf_counter() - began
    shutil.rmtree(cache)
    return seconds


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, whose memory nothing else has used."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_answer, args=(queue, function, arguments))
    child.start()
    found = queue.get()
    child.join()
    if isinstance(found, Exception):
        raise found
    return found


def _answer(queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        queue.put(function(*arguments))
    except (ValueError, OSError, RuntimeError) as error:
        queue.put(error)


def _write(file: str | None, name: str, figures: dict[str, Any]) -> None:
    if file:
        report = {"benchmark": name, "hardware": hardware(), **figures}
        Path(file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
