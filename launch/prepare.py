"""Tokenises a corpus into a folder of prepared data, in parallel; run again, it goes on where it was interrupted.

python launch/prepare.py prepared/code data.source=json 'data.path=corpus/*.jsonl.zst' data.tokenizer=tokenizers/code
python launch/pretrain.py run_dir=runs/code data.source=prepared data.path=prepared/code data.tokenizer=tokenizers/code
python launch/prepare.py prepared/code --verify
python launch/prepare.py prepared/web --executor slurm --tasks 500 --slurm partition=cpu time=12:00:00 data.source=...

Beyond one machine, datatrove runs it (pip install 'mega_scale[cluster]'); the files are the same.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mega_scale.config import parse
from mega_scale.parallel import check_single
from mega_scale.process import run_command
from mega_scale.settings import require


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError or OSError for what is refused."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s FOLDER [options] [--config FILE] [data.KEY=VALUE ...]",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="where the data goes, or lies")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once (default: one a core)")
    parser.add_argument("--shard-mb", type=int, default=128, help="text of one shard, MB (default: 128)")
    words = "processes of this machine; datatrove's local executor; or its Slurm executor, then a shared FOLDER"
    parser.add_argument("--executor", choices=("processes", "datatrove", "slurm"), default="processes", help=words)
    parser.add_argument("--tasks", type=int, default=1, help="of datatrove, each with its share of the shards")
    parser.add_argument("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the Slurm executor")
    words = "delete what was prepared in FOLDER, and begin anew; without it, the same command goes on with it"
    parser.add_argument("--overwrite", action="store_true", help=words)
    parser.add_argument("--verify", action="store_true", help="only compare the folder's files with their checksums")
    args, rest = parser.parse_known_args(arguments)
    check_single("launch/prepare.py", args)
    if args.verify:
        from mega_scale.data.tokens import check_content

        for name in check_content(args.folder):
            print(f"{name} is good", flush=True)
    else:
        prepare(args, rest)


def prepare(args: argparse.Namespace, rest: list[str]) -> None:
    """Make the folder, and say in one line what it holds and what was left out."""
    for option in ("processes", "shard_mb", "tasks"):
        value = getattr(args, option)
        require(value > 0, f"--{option.replace('_', '-')}", value, "give at least 1")
    keys = [word for word in args.slurm if word.startswith("data.")]
    slurm = dict(word.split("=", 1) for word in args.slurm if "=" in word and word not in keys)
    config = parse([*keys, *rest]).data
    config.validate()

    from tqdm import tqdm

    from mega_scale.data.prepare import LOCK, Preparation, run, run_on_cluster
    from mega_scale.data.tokenizer import load_tokenizer, unlike_training
    from mega_scale.files import FileLock

    # Every process has a core of its own already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, shard_bytes = load_tokenizer(config.tokenizer), args.shard_mb * 10**6
    if line := unlike_training(tokenizer, config.add_bos):
        print(line, flush=True)
    preparation = Preparation(args.folder, config, tokenizer, shard_bytes=shard_bytes, overwrite=args.overwrite)
    if args.executor != "processes":
        local = args.processes if args.executor == "datatrove" else None
        run_on_cluster(preparation, tasks=args.tasks, processes=local, slurm=slurm)
        if local is None:
            print(f"submitted; {args.folder / 'manifest.json'} is there when it is done")
            return
    with FileLock(args.folder / LOCK):
        missing, sizes = set(preparation.missing()), preparation.sizes
        done = sum(size for i, size in enumerate(sizes) if i not in missing)
        with tqdm(total=sum(sizes), initial=done, unit="B", unit_scale=True, disable=None) as bar:
            for number in run(preparation, args.processes):
                bar.update(sizes[number])
        manifest = preparation.finish()
    rows = manifest.tally
    found = {part: manifest.totals(part) for part in manifest.parts}
    lost = {"lost_bytes": sum(rows.lost.values())} if rows.lost else {}
    print(json.dumps({**found, "rows": rows.rows, "bad_rows": rows.by_cause(), **lost}), *rows.lines(), sep="\n")


if __name__ == "__main__":
    run_command(main)
