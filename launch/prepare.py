"""Tokenises a corpus into a folder of prepared data, in parallel; run again, it goes on where it was interrupted.

python launch/prepare.py prepared/code data.source=json 'data.path=corpus/*.jsonl.zst' data.tokenizer=tokenizers/code
python launch/pretrain.py data.source=prepared data.path=prepared/code data.tokenizer=tokenizers/code
python launch/prepare.py prepared/code --verify
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mega_scale.config import parse, refuse
from mega_scale.data import load_tokenizer
from mega_scale.data.prepare import Preparation, run
from mega_scale.data.prepared import Manifest, check_content, read_manifest


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is refused is said in one line, with exit code 2."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s FOLDER [options] [--config FILE] [data.KEY=VALUE ...]",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="where the data goes, or lies")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once (default: one a core)")
    parser.add_argument("--shard-mb", type=int, default=128, help="text of one shard, MB (default: 128)")
    parser.add_argument("--verify", action="store_true", help="only compare the folder's files with their checksums")
    args, rest = parser.parse_known_args(arguments)
    try:
        if args.verify:
            for name in check_content(args.folder):
                print(f"{name} is good", flush=True)
            return
        for option, value in (("--processes", args.processes), ("--shard-mb", args.shard_mb)):
            if value < 1:
                raise ValueError(f"{option} {value} is not possible: give at least 1")
        config = parse(rest).data
        config.validate()
        # Every process has a core of its own already.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = load_tokenizer(config.tokenizer)
        preparation = Preparation(args.folder, config, tokenizer, shard_bytes=args.shard_mb * 10**6)
        missing = set(preparation.missing())
        sizes = [unit.size for unit in preparation.units]
        done = sum(size for i, size in enumerate(sizes) if i not in missing)
        with tqdm(total=sum(sizes), initial=done, unit="B", unit_scale=True, disable=None) as bar:
            for number in run(preparation, args.processes, config.max_bad_share):
                bar.update(sizes[number])
        preparation.finish()
        manifest = read_manifest(args.folder)
        print(describe(manifest), *manifest.tally.lines(), sep="\n")
    except (ValueError, OSError) as error:
        refuse(error)


def describe(manifest: Manifest) -> str:
    """One line on what a folder holds, and what was left out."""
    facts = {part: manifest.totals(part) for part in manifest.parts}
    rows = manifest.tally
    return json.dumps({**facts, "rows": rows.rows, "bad_rows": rows.by_cause()})


if __name__ == "__main__":
    main(sys.argv[1:])
