"""Turns a checkpoint of the original fairseq Mega code into one Hugging Face folder.

python launch/import_fairseq.py enwik8/model.pt exports/enwik8 --dictionary data-bin/enwik8/dict.txt

A language model's folder also starts a run: `init_from=exports/enwik8`.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mega_scale.hub.fairseq import CHECKPOINT_LAYOUTS, EMA_INPUTS, convert_checkpoint, tokenizer_from_dictionary
from mega_scale.model import MegaConfig
from mega_scale.parallel import check_single
from mega_scale.process import run_command


def field_value(text: str) -> tuple[str, Any]:
    """Read FIELD=VALUE, the value as YAML."""
    field, separator, value = text.partition("=")
    if not separator or not hasattr(MegaConfig, field):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE with a field of MegaConfig")
    return field, yaml.safe_load(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError or OSError for what is refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="fairseq's file, such as checkpoint_best.pt")
    parser.add_argument("out", type=Path, help="folder to create")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--dictionary", type=Path, help="fairseq's dict.txt, to make a tokenizer of")
    words.add_argument("--tokenizer", help="folder or name of a Hugging Face tokenizer, in place of --dictionary")
    text = "lm (mega_lm, or an encoder-decoder's decoder), encoder (of one), lra (sentence encoder); default: by names"
    parser.add_argument("--layout", choices=CHECKPOINT_LAYOUTS, help=text)
    text = "what weighs the moving average's input: delta in published checkpoints (default), alpha in the last code"
    parser.add_argument("--ema-input", choices=EMA_INPUTS, default="delta", help=text)
    text = "field of MegaConfig that replaces what the checkpoint says, such as truncation=null; may be repeated"
    parser.add_argument("--set", dest="changes", type=field_value, action="append", metavar="FIELD=VALUE", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args(arguments)
    check_single("launch/import_fairseq.py", args)
    tokenizer: PreTrainedTokenizerBase | None = None
    if args.dictionary is not None:
        tokenizer = tokenizer_from_dictionary(args.dictionary)
    elif args.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    how = {"layout": args.layout, "ema_input": args.ema_input, "overwrite": args.overwrite}
    layout = convert_checkpoint(args.checkpoint, args.out, tokenizer, changes=dict(args.changes or ()), **how)
    print(f"converted {args.checkpoint} ({layout}) to {args.out}")


if __name__ == "__main__":
    run_command(main)
