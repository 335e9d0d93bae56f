"""Looks after checkpoints: lists, verifies, converts, exports and prunes them, without starting a run.

python launch/checkpoint.py list runs/debug
python launch/checkpoint.py verify runs/debug
python launch/checkpoint.py convert runs/debug archive/debug --parts 1
python launch/checkpoint.py export runs/debug exports/debug
python launch/checkpoint.py prune runs/debug --keep 3 --keep-every 1000 --damaged
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mega_scale import export
from mega_scale.checkpoint.folder import (
    checkpoints,
    find_checkpoint,
    is_checkpoint,
    look,
    others,
    prune,
    read_state,
    verify,
)
from mega_scale.checkpoint.manifest import CheckpointError, claimed_serial, read_key, strays
from mega_scale.checkpoint.saver import convert
from mega_scale.parallel import check_single
from mega_scale.process import refuse, run_command
from mega_scale.settings import local_paths
from mega_scale.training.restore import say_to_stderr


def rows(run_dir: Path, key: bytes | None) -> list[dict[str, Any]]:
    """Facts about the checkpoints of a run, in the order in which they were written.

    Args:
        run_dir: folder of the run.
        key: the secret with which they must be signed, if there is one.

    Returns:
        For each: `folder`, `serial`, and `problem` (a text, or none); of those without a problem also `step`, `bytes`,
        `tokens`, `loss` on the validation text (or none) and `layout`. Hashes of the state are not verified.
    """
    found = []
    for folder in checkpoints(run_dir):
        row: dict[str, Any] = {"folder": str(folder), "serial": claimed_serial(folder), "problem": None}
        try:
            manifest = look(folder, key)
            state = read_state(folder)
            row |= {"step": manifest.step, "bytes": manifest.bytes, "tokens": state["tokens"]}
            row |= {"loss": state.get("validation", {}).get("loss"), "layout": state["layout"]}
        except ValueError as error:
            row["problem"] = str(error)
        found.append(row)
    return found


def run_list(args: argparse.Namespace, key: bytes | None) -> int:
    """Print a line for each checkpoint; 1 if one has a problem."""
    found = rows(args.path, key)
    if not found:
        raise ValueError(f"{args.path} has no checkpoints: give the run_dir of a run that has saved")
    for row in found:
        if args.json:
            print(json.dumps(row))
        elif row["problem"]:
            print(f"{row['folder']} | DAMAGED: {row['problem']}")
        else:
            layout, loss = row["layout"], row["loss"]
            print(
                f"{row['folder']} | {row['bytes'] / 1e6:,.1f} MB | {row['tokens']:,} tokens | "
                f"{'no validation' if loss is None else f'validation loss {loss:.4f}'} | "
                f"{layout['engine']} stage {layout['zero_stage']} on {layout['world_size']} ranks"
            )
    return int(any(row["problem"] for row in found))


def run_verify(args: argparse.Namespace, key: bytes | None) -> int:
    """Verify one checkpoint, or all of a run; 1 if one is damaged."""
    folders = [args.path] if is_checkpoint(args.path) else checkpoints(args.path)
    if not folders:
        raise ValueError(f"{args.path} has no checkpoints: give a checkpoint folder, or a run_dir")
    damaged = 0
    for folder in folders:
        try:
            manifest = verify(folder, key)
        except CheckpointError as error:
            damaged += 1
            print(f"DAMAGED {error}")
        else:
            print(f"valid   {folder}: {len(manifest.files)} files, {manifest.bytes:,} bytes")
            for name in strays(folder, manifest):
                print(f"stray   {folder}: {name!r} is none of its files, and nobody reads it")
    for path in [] if is_checkpoint(args.path) else others(args.path):
        print(f"stray   {path.parent}: {path.name!r} is no checkpoint, and nobody reads it")
    return int(damaged > 0)


def run_convert(args: argparse.Namespace, key: bytes | None) -> int:
    """Rewrite a checkpoint."""
    folder, notes = find_checkpoint(args.path, key, older=args.allow_older, proof=verify)
    if notes:
        say_to_stderr(f"{folder} is taken: {'; '.join(notes)}")
    print(f"wrote {convert(folder, args.out, args.parts, key, read_key(args.new_key_file))}")
    return 0


def run_prune(args: argparse.Namespace, key: bytes | None) -> int:
    """Delete checkpoints."""
    if args.keep < 1 and not args.damaged:
        raise ValueError("nothing to do: give --keep with at least 1, or --damaged")
    for folder in prune(args.path, args.keep, args.keep_every, damaged=args.damaged, key=key, dry=args.dry_run):
        print(f"{'would delete' if args.dry_run else 'deleted'} {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    listing = commands.add_parser("list", help="a line for each checkpoint of a run; hashes of the state are not read")
    listing.add_argument("path", type=Path, help="run folder")
    listing.add_argument("--json", action="store_true", help="a JSON object for each")
    listing.set_defaults(act=run_list)

    verifying = commands.add_parser("verify", help="read every byte, and compare it with the manifest")
    verifying.add_argument("path", type=Path, help="checkpoint folder, or run folder (all of its checkpoints)")
    verifying.set_defaults(act=run_verify)

    converting = commands.add_parser("convert", help="write a checkpoint in more or fewer files, or with a secret")
    converting.add_argument("path", type=Path, help="checkpoint folder, or run folder (its newest checkpoint)")
    converting.add_argument("--allow-older", action="store_true", help=export.ALLOW_OLDER)
    converting.add_argument("out", type=Path, help="run folder to write it to, which can be resumed from")
    converting.add_argument("--parts", type=int, default=1, help="files for the state (default: 1)")
    converting.add_argument("--new-key-file", help="secret to sign the new checkpoint with")
    converting.set_defaults(act=run_convert)

    pruning = commands.add_parser("prune", help="delete old or damaged checkpoints; the last valid one stays")
    pruning.add_argument("path", type=Path, help="run folder")
    pruning.add_argument("--keep", type=int, default=0, help="newest valid checkpoints to keep; 0 keeps all")
    pruning.add_argument("--keep-every", type=int, default=0, help="keep those of steps that this divides")
    pruning.add_argument("--damaged", action="store_true", help="delete damaged ones too")
    pruning.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    pruning.set_defaults(act=run_prune)

    for command in (listing, verifying, converting, pruning):
        command.add_argument("--key-file", help="secret with which the checkpoints are signed")
    commands.add_parser("export", help="write a Hugging Face folder; takes what launch/export.py takes", add_help=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is refused is said in one line, with exit code 2.

    Args:
        arguments: the command line, without the program's name; none means this process's.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["export"]:
        export.main(given[1:], prog="checkpoint.py export")
        return
    args = _parser().parse_args(given)
    try:
        check_single("launch/checkpoint.py")
        local_paths(args)
        code = args.act(args, read_key(args.key_file))
    except (ValueError, OSError) as error:
        refuse(error)
    raise SystemExit(code)


if __name__ == "__main__":
    run_command(main)
