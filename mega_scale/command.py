"""The `mega-scale` command of an installed package: the scripts of `launch/`, by name.

mega-scale pretrain train.steps=200
mega-scale --nproc-per-node 2 pretrain --config enwik8-39m
"""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mega_scale import __version__
from mega_scale.files import shipped
from mega_scale.process import refuse

_USAGE = "usage: mega-scale [options of torchrun] COMMAND [arguments], mega-scale COMMAND --help, mega-scale --version"


def commands() -> dict[str, Path]:
    """Scripts by the name of their command; the benchmark's is a folder."""
    found = {path.stem: path for path in shipped("launch").glob("*.py") if not path.stem.startswith("_")}
    return found | {path.parent.name: path.parent for path in shipped("launch").glob("*/__main__.py")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script as `python launch/COMMAND.py` does, or under torchrun if its options come before the command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    scripts = commands()
    names = ", ".join(sorted(scripts))
    if not given or given[0] in ("--help", "-h"):
        print(f"{_USAGE}\n\ncommands: {names}")
        raise SystemExit(0 if given else 2)
    if given == ["--version"]:
        print(f"mega_scale {__version__}")
        return
    place = next((number for number, word in enumerate(given) if word in scripts), None)
    if place is None or (place and not given[0].startswith("-")):
        refuse(ValueError(f"mega-scale has no command {given[0]!r}: choose one of {names}"))
    options, command, rest = given[:place], given[place], given[place + 1 :]
    if options:
        os.execv(
            sys.executable, [sys.executable, "-m", "torch.distributed.run", *options, str(scripts[command]), *rest]
        )
    sys.argv[1:] = rest
    runpy.run_path(str(scripts[command]), run_name="__main__")


if __name__ == "__main__":
    main()
