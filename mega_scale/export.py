"""Turns a training checkpoint, of either engine and any number of ranks, into one Hugging Face folder.

`--format original` writes the files of the original Megalodon code instead.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mega_scale.checkpoint.folder import ALLOW_OLDER, read_key, read_state
from mega_scale.checkpoint.remote import localized
from mega_scale.config import load_config
from mega_scale.data import as_trained
from mega_scale.data.config import cache_folder
from mega_scale.files import check_destination, path_or_url
from mega_scale.hub.export import DEFAULT_SHARD_BYTES, model_card, write_export
from mega_scale.hub.megalodon import write_original
from mega_scale.model import MegalodonConfig
from mega_scale.parallel import check_single
from mega_scale.process import log_to_stderr
from mega_scale.training.trained_model import open_checkpoint, open_model

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_size(text: str) -> int:
    """Read a size of at least 1 byte: "5GB", "512MiB" or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at least 1 byte: write 5GB, 512MiB, or bytes")
    return size


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command, which its help calls `prog`. Raises ValueError or OSError for what is refused."""
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    words = "run folder (its newest checkpoint) or checkpoint folder; with --format original also a Hugging Face folder"
    parser.add_argument("checkpoint", type=path_or_url, help=words)
    parser.add_argument("out", type=Path, help="folder to create")
    words = "what to write (default: hf): a Hugging Face folder, or the original Megalodon code's config and pickles"
    parser.add_argument("--format", choices=("hf", "original"), default="hf", help=words)
    words = "of --format original: model-parallel ranks, a file each (default: 1)"
    parser.add_argument("--model-parallel", type=int, metavar="RANKS", help=words)
    words = "largest weight file (default: 5GB)"
    parser.add_argument("--max-shard-size", type=byte_size, help=words)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the parameters (default: fp32)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    words = "add the model's Python files: torch and transformers alone then load it, by trust_remote_code=True"
    parser.add_argument("--remote-code", action="store_true", help=words)
    words = "export the exponential average of the weights, of a run with train.weight_average"
    parser.add_argument("--average", action="store_true", help=words)
    parser.add_argument("--allow-older", action="store_true", help=ALLOW_OLDER)
    parser.add_argument("--key-file", help="secret with which the checkpoint is signed")
    args = parser.parse_args(arguments)
    check_single("launch/export.py", args)
    key = read_key(args.key_file)
    args.checkpoint = localized(args.checkpoint, cache_folder(None), key, log_to_stderr, older=args.allow_older)
    if args.format == "original":
        write_as_original(args)
        return
    if args.model_parallel is not None:
        raise ValueError("--model-parallel is for --format original: add that, or leave it out")
    check_destination(args.out, overwrite=args.overwrite)
    options = {"older": args.allow_older, "average": args.average}
    config, tensors, tokenizer, folder = open_checkpoint(args.checkpoint, key, **options)
    run = load_config(folder / "config.yaml")
    tokenizer = as_trained(tokenizer, run.data.add_bos)
    how = {"dtype": args.dtype, "with_code": args.remote_code}
    facts = {"tokenizer": tokenizer, "average": args.average}
    card = model_card(args.out.resolve().name, config, read_state(folder), asdict(run), **facts, **how)
    how |= {"max_shard_bytes": args.max_shard_size or DEFAULT_SHARD_BYTES, "overwrite": args.overwrite}
    write_export(args.out, tensors, config, tokenizer, card, **how)
    print(f"exported {folder} to {args.out}")


def write_as_original(args: argparse.Namespace) -> None:
    """Write the original Megalodon code's folder."""
    for name in ("remote_code", "max_shard_size"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for --format hf: leave it out")
    key, at_hand = read_key(args.key_file), (args.checkpoint / "config.json").is_file()
    if at_hand and args.average:
        raise ValueError(
            f"--average is for checkpoints, which hold one, and {args.checkpoint} is a Hugging Face folder"
        )
    options = {"older": args.allow_older, "average": args.average}
    opened = open_model(args.checkpoint, key) if at_hand else open_checkpoint(args.checkpoint, key, **options)
    config, tensors, tokenizer, folder = opened
    if not isinstance(config, MegalodonConfig):
        raise ValueError(f"{folder} holds a {config.model_type} model: the original's format is of Megalodon models")
    shards = args.model_parallel or 1
    how = {"shards": shards, "dtype": args.dtype, "overwrite": args.overwrite}
    write_original(args.out, tensors, config, tokenizer, **how)
    if shards > 1 and config.rescale_nffn:
        log_to_stderr("the original cannot compute rescale_nffn with several shards: write one")
    print(f"exported {folder} to {args.out}, {shards} shard(s) of the original's format")
