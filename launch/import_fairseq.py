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

from mega_scale.hub import (
    check_destination,
    config_from_args,
    fairseq_to_mega,
    find_layout,
    read_fairseq,
    tokenizer_from_dictionary,
    write_export,
)
from mega_scale.hub.export import write_then_rename
from mega_scale.hub.fairseq import EMA_INPUTS
from mega_scale.hub.tokenizer_files import write_tokenizer
from mega_scale.model import MegaConfig, MegaModel
from mega_scale.parallel import check_single
from mega_scale.process import refuse, run_command
from mega_scale.settings import local_paths

_LAYOUTS = ("lm", "encoder", "lra")


def field_value(text: str) -> tuple[str, Any]:
    """Read FIELD=VALUE, the value as YAML.

    Args:
        text: such as "truncation=null".

    Returns:
        Field of MegaConfig and value.

    Raises:
        argparse.ArgumentTypeError: the text is no such pair, or MegaConfig has no such field.
    """
    field, separator, value = text.partition("=")
    if not separator or not hasattr(MegaConfig, field):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE with a field of MegaConfig")
    return field, yaml.safe_load(value)


def convert(
    checkpoint: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    layout: str | None,
    ema_input: str,
    changes: dict[str, Any],
    overwrite: bool,
) -> str:
    """Write a fairseq checkpoint's model as a Hugging Face folder.

    Args:
        checkpoint: fairseq's file.
        out: the folder to create.
        tokenizer: saved with the model; a language model needs one.
        layout: kind of model, see `fairseq_to_mega`; none means to tell it by the names.
        ema_input: see `fairseq_to_mega`.
        changes: fields of MegaConfig that replace what the checkpoint says.
        overwrite: whether an earlier export is replaced.

    Returns:
        The layout.

    Raises:
        ValueError: the checkpoint is not readable, has parts without counterpart, or the destination is taken.
    """
    check_destination(out, overwrite=overwrite)
    read = read_fairseq(checkpoint)
    layout = find_layout(read.state) if layout is None else layout
    config = config_from_args(read, layout, changes)
    tensors = fairseq_to_mega(read.state, config, layout=layout, ema_input=ema_input)
    card = f"# {out.resolve().name}\n\nA Mega model (arXiv 2209.10655), converted from fairseq's `{checkpoint.name}`.\n"
    if layout == "lm":
        if tokenizer is None:
            raise ValueError("a language model needs a tokenizer: give --dictionary dict.txt, or --tokenizer")
        write_export(out, tensors, config, tokenizer, card, overwrite=overwrite)
        return layout
    model = MegaModel(config, add_pooling_layer=False)
    model.load_state_dict(tensors, strict=True)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer)

    write_then_rename(out, write)
    return layout


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is refused is said in one line, with exit code 2.

    Args:
        arguments: the command line, without the program's name; none means this process's.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="fairseq's file, such as checkpoint_best.pt")
    parser.add_argument("out", type=Path, help="folder to create")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--dictionary", type=Path, help="fairseq's dict.txt, to make a tokenizer of")
    words.add_argument("--tokenizer", help="folder or name of a Hugging Face tokenizer, in place of --dictionary")
    parser.add_argument(
        "--layout",
        choices=_LAYOUTS,
        help="lm (mega_lm, or an encoder-decoder's decoder), encoder (of an encoder-decoder), lra (sentence encoder); "
        "default: told by the names",
    )
    parser.add_argument(
        "--ema-input",
        choices=EMA_INPUTS,
        default="delta",
        help="what weighs the moving average's input in the code that trained the model: delta in the version of the "
        "published checkpoints, alpha in the last one (default: delta)",
    )
    parser.add_argument(
        "--set",
        dest="changes",
        type=field_value,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="field of MegaConfig that replaces what the checkpoint says, such as truncation=null; may be repeated",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args(arguments)
    try:
        check_single("launch/import_fairseq.py")
        local_paths(args)
        tokenizer: PreTrainedTokenizerBase | None = None
        if args.dictionary is not None:
            tokenizer = tokenizer_from_dictionary(args.dictionary)
        elif args.tokenizer is not None:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
        layout = convert(
            args.checkpoint,
            args.out,
            tokenizer,
            layout=args.layout,
            ema_input=args.ema_input,
            changes=dict(args.changes),
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        refuse(error)
    print(f"converted {args.checkpoint} ({layout}) to {args.out}")


if __name__ == "__main__":
    run_command(main)
