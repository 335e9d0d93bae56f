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

import yaml

from mega_scale.checkpoint import folder as store
from mega_scale.checkpoint.remote import RemoteRun, localized, split_url
from mega_scale.data.config import cache_folder
from mega_scale.files import path_or_url
from mega_scale.parallel import check_single
from mega_scale.process import log_to_stderr, run_command


def remote_run(path: str, key: bytes | None) -> RemoteRun:
    """A run in an object store."""
    return RemoteRun(split_url(path)[0], cache_folder(None), key, "path")


def run_list(args: argparse.Namespace, key: bytes | None) -> int:
    """Print a line for each checkpoint; 1 if one has a problem. Hashes of the state are not verified."""
    if isinstance(args.path, str):
        found = list(remote_run(args.path, key).summaries())
    else:
        found = [store.summary(folder, key) for folder in store.checkpoints(Path(args.path))]
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
    path, remote, one = Path(args.path), None, split_url(str(args.path))[1] is not None
    places: list[Any]
    if isinstance(args.path, str):
        remote = remote_run(args.path, key)
        places = [split_url(args.path)[1]] if one else list(reversed(remote.checkpoints()))
    else:
        one = store.is_checkpoint(path)
        places = [path] if one else store.checkpoints(path)
    if not places:
        raise ValueError(f"{args.path} has no checkpoints: give a checkpoint folder, or a run_dir")
    damaged = 0
    for place in places:
        folder = place if remote is None else f"{remote.url}/checkpoints/{place}"
        try:
            manifest = store.verify(Path(place), key) if remote is None else remote.verify(str(place))
        except store.CheckpointError as error:
            damaged += 1
            print(f"DAMAGED {error}")
        else:
            print(f"valid   {folder}: {len(manifest.files)} files, {manifest.bytes:,} bytes")
            for name in store.strays(place, manifest) if remote is None else ():
                print(f"stray   {folder}: {name!r} is none of its files, and nobody reads it")
    for other in [] if one or remote is not None else store.others(path):
        print(f"stray   {other.parent}: {other.name!r} is no checkpoint, and nobody reads it")
    return int(damaged > 0)


def is_stable(folder: Path) -> bool:
    """Whether the learning rate of the checkpoint's wsd run falls from it, so that another end can begin there."""
    path = folder / "config.yaml"
    saved = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    schedule, steps = saved.get("schedule", {}), saved.get("train", {}).get("steps", 0)
    if schedule.get("decay") != "wsd":
        return False
    from mega_scale.training.config import ScheduleConfig

    fall = ScheduleConfig(decay_steps=schedule.get("decay_steps", ScheduleConfig.decay_steps)).fall(steps)
    return folder.name == f"step-{steps - fall:08d}"


def run_prune(args: argparse.Namespace, key: bytes | None) -> None:
    """Delete checkpoints, or only say which would be; those that a wsd run falls from only if asked to."""
    newest, how = (args.keep, args.keep_every), {"damaged": args.damaged, "dry": args.dry_run}
    spared = (lambda folder: False) if args.stable else is_stable
    deleted: Sequence[Path | str]
    kept: Sequence[Path | str]
    if isinstance(args.path, str):
        deleted, kept = remote_run(args.path, key).prune(*newest, **how, spared=spared)
    else:
        deleted, kept = store.prune(args.path, *newest, key=key, **how, spared=spared)
    for place in deleted:
        print(f"{'would delete' if args.dry_run else 'deleted'} {place}")
    for place in kept:
        print(f"kept {place}: the learning rate of its wsd run falls from there; --stable deletes it, too")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError or OSError for what is refused."""
    # What reads a state imports models and engines, which takes a second: only where it is wanted.
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["export"]:
        from mega_scale import export

        export.main(given[1:], prog="checkpoint.py export")
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    words = "run folder, here or in an object store; to verify or convert, also a checkpoint folder"
    shared.add_argument(
        "path", type=path_or_url, help="run folder, here or in an object store; to verify or convert, also a checkpoint"
    )
    shared.add_argument("--key-file", help="secret with which the checkpoints are signed")
    command = commands.add_parser("list", help="a line for each of a run; the state is not read", parents=[shared])
    command.add_argument("--json", action="store_true", help="a JSON object for each")
    commands.add_parser("verify", help="compare every byte with the manifest; of a run, of all", parents=[shared])
    words = "write a checkpoint, of a run the newest, in more or fewer files, or with a secret"
    command = commands.add_parser("convert", help=words, parents=[shared])
    command.add_argument("out", type=Path, help="run folder to write it to, which can be resumed from")
    command.add_argument("--allow-older", action="store_true", help=store.ALLOW_OLDER)
    command.add_argument("--parts", type=int, default=1, help="files for the state (default: 1)")
    command.add_argument("--new-key-file", help="secret to sign the new checkpoint with")
    command = commands.add_parser("prune", help="delete old or damaged ones; the last valid stays", parents=[shared])
    command.add_argument("--keep", type=int, default=0, help="newest valid checkpoints to keep; 0 keeps all")
    command.add_argument("--keep-every", type=int, default=0, help="keep those of steps that this divides")
    command.add_argument("--damaged", action="store_true", help="delete damaged ones too")
    command.add_argument("--stable", action="store_true", help="delete those, too, from which a wsd run falls")
    command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    commands.add_parser("export", help="write a Hugging Face folder; takes what launch/export.py takes", add_help=False)
    args = parser.parse_args(given)
    check_single("launch/checkpoint.py", args)
    code, key = 0, store.read_key(args.key_file)
    match args.command:
        case "list":
            code = run_list(args, key)
        case "verify":
            code = run_verify(args, key)
        case "convert":
            from mega_scale.checkpoint.state import convert

            path = localized(args.path, cache_folder(None), key, log_to_stderr, older=args.allow_older)
            folder, notes = store.find_checkpoint(path, key, older=args.allow_older, proof=store.verify)
            if notes:
                log_to_stderr(f"{folder} is taken: {'; '.join(notes)}")
            print(f"wrote {convert(folder, args.out, args.parts, key, store.read_key(args.new_key_file))}")
        case "prune":
            if args.keep < 1 and not args.damaged:
                raise ValueError("nothing to do: give --keep with at least 1, or --damaged")
            run_prune(args, key)
    raise SystemExit(code)


if __name__ == "__main__":
    run_command(main)
