"""Perplexity and bits per byte of a trained model on text files; under a launcher, the ranks share the text.

python launch/evaluate.py runs/debug README.md
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mega_scale.checkpoint.folder import read_key
from mega_scale.checkpoint.remote import localized
from mega_scale.data import DataConfig, load_whole, validation_batches
from mega_scale.data.config import cache_folder
from mega_scale.data.tokenizer import adds_bos
from mega_scale.files import path_or_url
from mega_scale.parallel import ParallelConfig, World, placement
from mega_scale.parallel.engine import loss_of
from mega_scale.process import log_to_stderr, refuse, run_command
from mega_scale.settings import local_paths, require
from mega_scale.training.trained_model import evaluate, load_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is refused is said in one line, with exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words = "run (its newest checkpoint) or checkpoint, here or in an object store, export or HF folder"
    parser.add_argument("model", type=path_or_url, help=words)
    parser.add_argument("text", nargs="+", help="files or globs")
    parser.add_argument("--source", choices=("text", "json", "parquet", "arrow"), default="text", help="kind of file")
    parser.add_argument("--text-column", default="text", help="column that holds the text, in json, parquet and arrow")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens read at once (default: 1024)")
    words = "how documents share sequences, as in data.packing (default: concat)"
    parser.add_argument("--packing", choices=("concat", "reset", "none"), default="concat", help=words)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in one forward of one rank (default: 8)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--key-file", help="secret with which the checkpoint is signed")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON line")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # added by launchers
    args = parser.parse_args(arguments)
    rank, size = placement()[:2]
    try:
        local_paths(args)
        require(args.batch_size > 0, "--batch-size", args.batch_size, "give at least 1")
        how: Any = {"sequence_length": args.sequence_length, "packing": args.packing, "validation_fraction": 0.0}
        settings = DataConfig(args.source, args.text, text_column=args.text_column, **how)
        log = log_to_stderr if rank == 0 else lambda line: None
        key = read_key(args.key_file)
        path = localized(args.model, cache_folder(None), key, log)
        model, tokenizer, folder = load_model(path, torch.device("cpu"), key=key, log=log)
        dataset = load_whole(replace(settings, add_bos=adds_bos(tokenizer)), tokenizer)
        batches = validation_batches(dataset, len(dataset), args.batch_size, rank, size)
    except (ValueError, OSError) as error:
        refuse(error, quiet=rank != 0)
    with World.start(ParallelConfig(device=args.device)) as world:
        try:
            if not world.all_agree(world.broadcast(str(folder)) == str(folder)):
                raise ValueError(f"the ranks find different checkpoints of {args.model}: name one of them")
            model = nn.Module.to(model, world.device)
            found = evaluate(model, partial(loss_of, model), batches, dataset.tokens / dataset.bytes, world)
            problem = None
        except ValueError as error:  # all ranks raise alike, and leave in peace
            problem = error
    if problem is not None:
        refuse(problem, quiet=rank != 0)
    if rank == 0:
        print(*dataset.tally.lines(), sep="\n", end="\n" if dataset.tally.bad else "", file=sys.stderr)
        line = (
            f"loss {found.loss:.4f} nats/token | perplexity {found.perplexity:.3f} | "
            f"{found.bits_per_byte:.4f} bits/byte | {found.tokens:,} tokens, {dataset.bytes:,} bytes | {folder}"
        )
        print(json.dumps({"model": str(folder), **found._asdict()}) if args.json else line)


if __name__ == "__main__":
    run_command(main)
