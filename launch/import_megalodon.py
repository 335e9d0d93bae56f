"""Turns a checkpoint of the original Megalodon code into one Hugging Face folder.

python launch/import_megalodon.py megalodon-7b exports/megalodon-7b --tokenizer llama-2

The folder also starts a run: `init_from=exports/megalodon-7b`. `launch/export.py --format original` goes the other way.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

import argparse
from collections.abc import Sequence
from pathlib import Path

from mega_scale.hub.megalodon import import_original
from mega_scale.parallel import check_single
from mega_scale.process import log_to_stderr, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError or OSError for what is refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and consolidated*.pth")
    parser.add_argument("out", type=Path, help="folder to create")
    words = "folder or name of a Hugging Face tokenizer (default: CHECKPOINT/tokenizer)"
    parser.add_argument("--tokenizer", help=words)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the parameters (default: fp32)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args(arguments)
    check_single("launch/import_megalodon.py", args)
    note = import_original(args.checkpoint, args.out, args.tokenizer, dtype=args.dtype, overwrite=args.overwrite)
    if note:
        log_to_stderr(note)
    print(f"converted {args.checkpoint} to {args.out}")


if __name__ == "__main__":
    run_command(main)
