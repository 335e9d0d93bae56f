"""Trains a byte-level BPE tokenizer on a corpus, into a folder that data.tokenizer and AutoTokenizer load.

python launch/train_tokenizer.py tokenizers/code --vocab-size 32000 data.source=json 'data.path=corpus/*.jsonl'
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mega_scale.config import parse
from mega_scale.files import check_destination, write_folder
from mega_scale.parallel import check_single
from mega_scale.process import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError or OSError for what is refused."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s FOLDER [--vocab-size N] [--overwrite] [--config FILE] [data.KEY=VALUE ...]",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="where the tokenizer goes")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="ids, special ones included (default: 32000)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier tokenizer")
    args, rest = parser.parse_known_args(arguments)
    check_single("launch/train_tokenizer.py", args)
    check_destination(args.folder, overwrite=args.overwrite, kind="tokenizer", holds="tokenizer.json")
    config = parse(rest).data
    config.validate()
    if config.source == "prepared" or config.mixture is not None:
        raise ValueError("a tokenizer is trained on one source of text: set data.source and data.path to it")

    from mega_scale.data.sources import load_corpus
    from mega_scale.data.tokenizer import train_bpe

    documents = load_corpus(config).train
    tokenizer = train_bpe(documents, args.vocab_size)
    with write_folder(args.folder) as folder:
        tokenizer.save_pretrained(folder)
    made = {"vocab_size": len(tokenizer), "rows": documents.tally.rows}
    print(json.dumps(made), *documents.tally.lines(), sep="\n")


if __name__ == "__main__":
    run_command(main)
